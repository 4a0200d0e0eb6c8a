"""FOOD101 and MVSA: how texts and images become tensors, and which networks each method is made of."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..data.catalogue import DATA_SETS
from ..data.paired_images import check_every_class
from ..data.text_images import TextImages, read_rows
from ..models.image_encoders import ImageEncoder
from ..models.learners import (
    Head,
    Joint,
    LateFusion,
    Learner,
    QualityAware,
    RankedAverage,
    Trusted,
    Whole,
    classifier,
    make_fusion,
    objective_options,
)
from ..models.mmbt import MultimodalBert
from ..models.text_encoders import BagOfWords, BertEncoder, Numbering, WordNumbers, load_bert, load_numbering, pad
from ..models.vocabulary import Vocabulary
from .settings import Settings

BAGS = ("bow", "concatbow")
TEXT_ALONE = ("bow", "bert")


def build_learner(
    settings: Settings, num_classes: int, num_samples: int, numbering: Numbering, pretrained: bool = True
) -> Learner:
    """The method's networks, with pretrained weights where they matter; see ``paired_batches.build_learner``."""
    method = settings.method

    def image() -> ImageEncoder:
        return ImageEncoder(settings.backbone, settings.weights if pretrained else "none", settings.regions)

    def bert() -> BertEncoder:
        return load_bert(settings.text_model, numbering, pretrained)

    def bag() -> BagOfWords:
        assert isinstance(numbering, WordNumbers)
        vectors = Path(settings.word_vectors) if settings.word_vectors else None
        return BagOfWords(numbering.vocabulary, vectors)

    def head(width: int) -> torch.nn.Module:
        return classifier(width, num_classes, settings.hidden, settings.dropout)

    if method == "image":
        pictures = image()
        return Joint({"image": pictures}, head(pictures.width))
    text = bag() if method in BAGS else bert()
    if method in TEXT_ALONE:
        return Joint({"text": text}, head(text.width))
    pictures = image()
    if method in ("concatbow", "concatbert"):
        return Joint({"text": text, "image": pictures}, head(text.width + pictures.width))
    if method == "mmbt":
        assert isinstance(text, BertEncoder)
        network = MultimodalBert(text, pictures, numbering.cls_id, numbering.sep_id)
        # What is frozen of BERT are its layers, not the embeddings, which are the image's too.
        encoders = {"image": pictures, "text": text.bert.encoder}
        return Whole(network, ("image", "text"), head(network.width), encoders)
    heads = {"text": Head(text, head(text.width)), "image": Head(pictures, head(pictures.width))}
    if method == "late":
        return LateFusion(heads)
    if method in ("tmc", "etmc"):
        return Trusted(heads, head(text.width + pictures.width) if method == "etmc" else None)
    fusion = make_fusion(method, tuple(heads), num_classes, settings.detach_weights)
    objective = objective_options(method, settings.ranking_weight, settings.form, settings.pairs)
    fused = RankedAverage if method == "ranking-only" else QualityAware
    return fused(heads, num_samples, objective, fusion)


@dataclass(frozen=True)
class TextImageData:
    """The training and the selection (dev) samples, as tensors, and what the model must know of them."""

    train: Dataset[Any]
    select: Dataset[Any]
    num_classes: int
    num_samples: int
    classes: tuple[str, ...]
    faults: int
    numbering: Numbering


def load_training(settings: Settings) -> TextImageData:
    """Read and check the data; the epoch is chosen on dev, as in the released code, or with ``"test"`` on test."""
    numbering = load_texts_numbering(settings)
    train = load_texts(settings, "train", numbering)
    check_every_class(train.classes, train.labels, Path(settings.data_root) / "train.jsonl")
    select = load_texts(settings, "test" if settings.selection == "test" else "dev", numbering)
    faults = len(train.faults) + len(select.faults)
    return TextImageData(train, select, len(train.classes), len(train), tuple(train.classes), faults, numbering)


def load_test(settings: Settings, numbering: Numbering, corrupt: Any = None, corrupt_text: Any = None) -> TextImages:
    """The test split; ``corrupt`` acts on the resized image before the crop, as in the released code."""
    return load_texts(settings, "test", numbering, corrupt, corrupt_text)


def load_texts_numbering(settings: Settings) -> Numbering:
    """How the run's texts become numbers; a vocabulary is that of the training split's words."""
    known = DATA_SETS[settings.data_set]
    rows, _ = read_rows(known, Path(settings.data_root) / "train.jsonl")
    texts = [row.text for row in rows]
    if settings.method in BAGS:
        return WordNumbers(Vocabulary(texts), settings.max_tokens)
    return load_numbering(settings.text_model, texts, settings.max_tokens)


def load_texts(
    settings: Settings, split: str, numbering: Numbering, corrupt: Any = None, corrupt_text: Any = None
) -> TextImages:
    """One split, as tensors and numbers; see ``load_test`` for the corruptions."""
    known = DATA_SETS[settings.data_set]
    return TextImages(
        known,
        Path(settings.data_root),
        split,
        images=settings.method not in TEXT_ALONE,
        transform=v2.Resize(settings.load_size),
        text_transform=numbering,
        corrupt=corrupt,
        corrupt_text=corrupt_text,
        finish=v2.Compose(
            [
                v2.CenterCrop(settings.image_size),
                v2.ToImage(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(known.mean, known.std),
            ]
        ),
        skip_bad=settings.skip_bad,
    )


def collate(samples: list[Any]) -> dict[str, Any]:
    """A batch: ``inputs`` by modality, texts padded to the longest; ``label`` and ``index`` ``[B]``."""
    inputs: dict[str, Any] = {"text": pad([sample["text"] for sample in samples])}
    if "image" in samples[0]:
        inputs["image"] = torch.stack([sample["image"] for sample in samples])
    return {
        "inputs": inputs,
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
