"""Text encoders: BERT and its tokenizer from Transformers, and the bag of words."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from ..errors import CommandError
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


class BertEncoder(nn.Module):
    """BERT's pooled output: ``input_ids`` and ``attention_mask``, ``[B, L]`` each, to ``[B, width]``.

    Args:
        bert: Transformers' model, with its pooler.
        marks: the numbers of its [CLS] and [SEP].
    """

    def __init__(self, bert: Any, marks: tuple[int, int]) -> None:
        super().__init__()
        self.bert, self.marks = bert, marks
        self.width = int(bert.config.hidden_size)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.bert(input_ids=input_ids, attention_mask=attention_mask).pooler_output


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
    def cls_id(self) -> int:
        return int(self.tokenizer.cls_token_id)

    @property
    def sep_id(self) -> int:
        return int(self.tokenizer.sep_token_id)

    def __call__(self, text: str) -> list[int]:
        return list(self.tokenizer(text, truncation=True, max_length=self.max_tokens)["input_ids"])


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


def load_numbering(text_model: str, texts: Iterable[str], max_tokens: int) -> Numbering:
    """The tokenizer of ``text_model``, a name or a folder; for ``"tiny"``, the words of ``texts``.

    Raises:
        CommandError: it cannot be had.
    """
    if text_model == "tiny":
        return WordNumbers(Vocabulary(texts), min(max_tokens, 48), framed=True)
    with _hub_errors(text_model):
        return WordPieces(transformers.AutoTokenizer.from_pretrained(text_model), max_tokens)


def load_bert(text_model: str, numbering: Numbering, pretrained: bool = True) -> BertEncoder:
    """The encoder of ``text_model``; for ``"tiny"``, a BERT of one layer with random weights.

    Args:
        text_model: a name or a folder.
        numbering: what cuts its texts.
        pretrained: whether its weights matter, or will be replaced at once.

    Raises:
        CommandError: it cannot be had, or is no BERT.
    """
    if isinstance(numbering, WordNumbers):
        config = transformers.BertConfig(vocab_size=len(numbering.vocabulary) + 2, **TINY)
        return BertEncoder(transformers.BertModel(config), (numbering.cls_id, numbering.sep_id))
    with _hub_errors(text_model):
        if pretrained:
            bert = transformers.AutoModel.from_pretrained(text_model)
        else:
            bert = transformers.AutoModel.from_config(transformers.AutoConfig.from_pretrained(text_model))
    if getattr(bert, "pooler", None) is None:
        raise CommandError(f"--text-model {text_model}: must be a BERT with a pooler, got {type(bert).__name__}")
    return BertEncoder(bert, (numbering.cls_id, numbering.sep_id))


class _hub_errors:  # noqa: N801 - reads as a function
    def __init__(self, text_model: str) -> None:
        self.text_model = text_model

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        if isinstance(error, OSError | ValueError):
            reason = " ".join(str(error).split())[:160]
            raise CommandError(
                f"--text-model {self.text_model}: cannot be loaded ({reason}): go online, so that it is downloaded "
                "from the Hugging Face hub, or give the folder of a copy that has config.json, the weights and the "
                "tokenizer's files"
            ) from error
