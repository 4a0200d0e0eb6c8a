"""The multimodal bitransformer (Kiela et al. 2019): image regions as tokens of BERT's own input."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import CommandError
from .image_encoders import ImageEncoder
from .learners import Answer, Learner
from .text_encoders import TextEncoder


class MultimodalBert(nn.Module):
    """BERT over ``[CLS] regions [SEP] text [SEP]``, pooled as its text encoder is.

    Every region goes through one linear layer into the space of word vectors. Image and text are the two segments
    (token types 0 and 1), and each counts its positions from 0.

    Args:
        text: BERT, whose embeddings serve both.
        image: the encoder whose regions become tokens.

    Raises:
        CommandError: the text encoder is no BERT: others have no segments, or place their tokens otherwise.

    Shapes: images ``[B, 3, H, W]``, ``input_ids`` and ``attention_mask`` ``[B, L]`` beginning with [CLS], to
    ``[B, width]``.
    """

    def __init__(self, text: TextEncoder, image: ImageEncoder) -> None:
        super().__init__()
        cls, sep = text.marks
        if not isinstance(text.model, transformers.BertModel) or cls is None or sep is None:
            raise CommandError(
                f"mmbt needs a BERT with [CLS] and [SEP] as its text encoder, got a {type(text.model).__name__}"
            )
        self.text, self.image, self.marks = text, image, (cls, sep)
        self.into_words = nn.Linear(image.region_width, text.width)
        self.width = text.width

    def forward(self, images: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        words = self.text.model.get_input_embeddings()
        # The text's own [CLS] gives way to the one before the regions.
        input_ids, attention_mask = input_ids[:, 1:], attention_mask[:, 1:]
        regions = self.into_words(self.image.look(images))
        batch, num = regions.shape[:2]
        cls, sep = (words(input_ids.new_full((batch, 1), number)) for number in self.marks)
        tokens = torch.cat([cls, regions, sep, words(input_ids)], 1)
        ahead, length = num + 2, input_ids.shape[1]
        places = torch.cat([torch.arange(ahead), torch.arange(length)]).to(input_ids.device)
        segments = torch.cat([torch.zeros(ahead), torch.ones(length)]).long().to(input_ids.device)
        there = torch.cat([attention_mask.new_ones(batch, ahead), attention_mask], 1)
        answer = self.text.model(
            inputs_embeds=tokens,
            attention_mask=there,
            token_type_ids=segments.expand(batch, -1),
            position_ids=places.expand(batch, -1),
        )
        return self.text.pool(answer, there)


class MMBT(Learner):
    """The bitransformer and its classifier.

    What can be frozen of BERT are its layers, not the embeddings, which are the image's too.
    """

    def __init__(self, text: TextEncoder, image: ImageEncoder, classifier: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.network = MultimodalBert(text, image)
        self.classifier = classifier(self.network.width)
        self.encoders = {"image": image, "text": text.model.encoder}

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        return Answer(self.classifier(self.network(inputs["image"], **inputs["text"])))
