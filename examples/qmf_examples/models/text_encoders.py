"""Text encoders: any model of Transformers with its tokenizer, and the bag of words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import CommandError
from .hub import quieten_hub
from .vocabulary import Vocabulary

TINY: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 64,
}
BAG_WIDTH = 300
"""As GloVe's vectors, which the released code sums."""


class TextEncoder(nn.Module):
    """A text as one vector: ``input_ids`` and ``attention_mask``, ``[B, L]`` each, to ``[B, width]``.

    Args:
        model: an encoder of Transformers.
        marks: the numbers of its [CLS] and [SEP]; None where it has none.
        pooling: the tokens' ``"mean"``, the ``"first"`` of them, or what BERT's ``"pooler"`` makes of that one.
    """

    def __init__(self, model: Any, marks: tuple[int | None, int | None], pooling: str = "pooler") -> None:
        super().__init__()
        self.model, self.marks, self.pooling = model, marks, pooling
        self.width = int(model.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.pool(self.model(input_ids=input_ids, attention_mask=attention_mask), attention_mask)

    def pool(self, output: Any, attention_mask: Tensor) -> Tensor:
        """``[B, width]`` of what the model has answered."""
        if self.pooling == "pooler":
            return output.pooler_output
        tokens = output.last_hidden_state
        if self.pooling == "first":
            return tokens[:, 0]
        there = attention_mask[..., None].to(tokens.dtype)
        return (tokens * there).sum(1) / there.sum(1).clamp(min=1)


class BagOfWords(nn.Module):
    """The sum of the words' vectors: ``input_ids`` ``[B, L]``, 0 where there is none, to ``[B, 300]``.

    Args:
        vocabulary: what numbers the words.
        vectors: a file in GloVe's text format, whose vectors are kept as they are, as in the released code (words it
            lacks have the vector 0); None learns them.

    Raises:
        CommandError: a file that cannot be read.
    """

    def __init__(self, vocabulary: Vocabulary, vectors: Path | None = None) -> None:
        super().__init__()
        table = None if vectors is None else read_vectors(vectors, vocabulary)
        self.width = BAG_WIDTH if table is None else table.shape[1]
        self.words = nn.EmbeddingBag(len(vocabulary), self.width, mode="sum", padding_idx=0, _weight=table)
        self.words.weight.requires_grad_(table is None)
        self.learned = table is None

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.words(input_ids)


def read_vectors(path: Path, vocabulary: Vocabulary) -> Tensor:
    """Vectors ``[words, width]`` of the vocabulary's words, 0 where the file has none.

    Raises:
        CommandError: a file that is not there, or a line that is no word and numbers.
    """
    found: dict[int, list[float]] = {}
    line_number = 0
    try:
        with path.open(encoding="utf-8") as lines:
            for line in lines:
                line_number += 1
                word, _, rest = line.partition(" ")
                if word in vocabulary.numbers:
                    found[vocabulary.numbers[word]] = [float(value) for value in rest.split()]
    except OSError as error:
        raise CommandError(f"--word-vectors: {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise CommandError(f"--word-vectors: {path}, line {line_number}: must be a word and numbers") from error
    widths = {len(vector) for vector in found.values()}
    if len(widths) != 1 or 0 in widths:
        raise CommandError(f"--word-vectors: {path}: vectors of one width for the texts' words, got {sorted(widths)}")
    table = torch.zeros(len(vocabulary), widths.pop())
    for row, vector in found.items():
        table[row] = torch.tensor(vector)
    return table


@dataclass(frozen=True)
class WordNumbers:
    """Texts as the numbers of their words, for the bag of words and the tiny BERT."""

    vocabulary: Vocabulary
    max_tokens: int
    framed: bool = False
    """Whether [CLS] stands before and [SEP] behind, numbered after the words."""

    @property
    def cls_id(self) -> int:
        return len(self.vocabulary)

    @property
    def sep_id(self) -> int:
        return len(self.vocabulary) + 1

    def __call__(self, text: str) -> list[int]:
        if not self.framed:
            return self.vocabulary.encode(text)[: self.max_tokens]
        return [self.cls_id, *self.vocabulary.encode(text)[: self.max_tokens - 2], self.sep_id]


@dataclass(frozen=True)
class WordPieces:
    """Texts as a Transformers tokenizer cuts them, [CLS] before and [SEP] behind."""

    tokenizer: Any
    max_tokens: int

    @property
    def cls_id(self) -> int | None:
        return self.tokenizer.cls_token_id

    @property
    def sep_id(self) -> int | None:
        return self.tokenizer.sep_token_id

    def __call__(self, text: str) -> list[int]:
        longest = min(self.max_tokens, self.tokenizer.model_max_length)
        return list(self.tokenizer(text, truncation=True, max_length=longest)["input_ids"])


Numbering = WordNumbers | WordPieces


def pad(rows: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    """``input_ids`` and ``attention_mask``, ``[B, L]``, padded with 0 to the longest row.

    Example:
        >>> pad([[5, 6], [7]])["input_ids"].tolist()
        [[5, 6], [7, 0]]
    """
    longest = max(1, *(len(row) for row in rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def load_numbering(text_encoder: str, texts: Iterable[str], max_tokens: int) -> Numbering:
    """The tokenizer of ``text_encoder``, a name or a folder; for ``"tiny"``, the words of ``texts``.

    Raises:
        CommandError: it cannot be had.
    """
    if text_encoder == "tiny":
        return WordNumbers(Vocabulary(texts), min(max_tokens, 48), framed=True)
    with _hub_errors(text_encoder):
        return WordPieces(transformers.AutoTokenizer.from_pretrained(text_encoder), max_tokens)


def load_text_encoder(
    text_encoder: str, numbering: Numbering, pooling: str = "pooler", pretrained: bool = True
) -> TextEncoder:
    """The encoder of ``text_encoder``; for ``"tiny"``, a BERT of one layer with random weights.

    Args:
        text_encoder: a name or a folder.
        numbering: what cuts its texts.
        pooling: see ``TextEncoder``.
        pretrained: whether its weights matter, or will be replaced at once.

    Raises:
        CommandError: it cannot be had, is no encoder, lacks weights, or has no pooler that it should be pooled by.
    """
    if isinstance(numbering, WordNumbers):
        config = transformers.BertConfig(vocab_size=len(numbering.vocabulary) + 2, **TINY)
        return TextEncoder(transformers.BertModel(config), (numbering.cls_id, numbering.sep_id), pooling)
    missing: list[str] = []
    with _hub_errors(text_encoder):
        config = transformers.AutoConfig.from_pretrained(text_encoder)
        if getattr(config, "is_encoder_decoder", False) or not hasattr(config, "hidden_size"):
            raise CommandError(f"--text-encoder {text_encoder}: must be an encoder of texts, got a {config.model_type}")
        if pretrained:
            model, found = transformers.AutoModel.from_pretrained(text_encoder, output_loading_info=True)
            missing = sorted(found["missing_keys"])
        else:
            model = transformers.AutoModel.from_config(config)
    without = getattr(model, "pooler", None) is None or any(name.startswith("pooler.") for name in missing)
    if pooling == "pooler" and without:
        raise CommandError(
            f"--text-encoder {text_encoder}: a {type(model).__name__} without a trained pooler: give --text-pooling "
            "mean or first"
        )
    missing = [name for name in missing if not name.startswith("pooler.")]
    if missing:  # which Transformers would draw at random
        raise CommandError(
            f"--text-encoder {text_encoder}: its file lacks weights of the {type(model).__name__}, {missing[0]} and "
            f"{len(missing) - 1} more"
        )
    # Files in half precision would be computed with in half precision.
    return TextEncoder(model.float(), (numbering.cls_id, numbering.sep_id), pooling)


class _hub_errors:  # noqa: N801 - reads as a function
    def __init__(self, text_encoder: str) -> None:
        self.text_encoder = text_encoder

    def __enter__(self) -> None:
        quieten_hub()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError):
            reason = " ".join(str(error).split())[:160]
            raise CommandError(
                f"--text-encoder {self.text_encoder}: cannot be loaded ({reason}): go online, so that it is downloaded "
                "from the Hugging Face hub, or give the folder of a copy that has config.json, the weights and the "
                "tokenizer's files"
            ) from error
