"""What a data set's loader hands to a run."""

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset

from ..data.image_cache import ImageCache, default_folder
from ..models.text_encoders import Numbering
from .settings import Settings


@dataclass(frozen=True)
class TrainingData:
    """The training and the selection samples, as tensors, and what the method must know of them."""

    train: Dataset[Any]
    select: Dataset[Any]
    classes: tuple[str, ...]
    num_samples: int
    """Of the whole training split: indices run over it."""
    faults: int
    """Rows that were skipped."""
    fingerprint: str
    """Of the rows to train on and to select by: which they are, their labels and their order."""
    numbering: Numbering | None = None
    """How texts became numbers."""
    features: Mapping[str, Tensor] | None = None
    """What frozen encoders have seen of the samples to train on, ``[B, width]`` by modality."""
    encoders: str = ""
    """A digest of these encoders' weights."""

    @property
    def widths(self) -> dict[str, int] | None:
        """Of these features."""
        return None if self.features is None else {name: x.shape[1] for name, x in self.features.items()}


def fingerprint(*parts: Iterable[Any]) -> str:
    """A digest of rows of plain values, part by part, that changes with any value and with the order.

    Example:
        >>> fingerprint([("a.png", 0), ("b.png", 1)]) == fingerprint([("b.png", 1), ("a.png", 0)])
        False
    """
    digest = hashlib.sha256()
    for part in parts:
        for row in part:
            digest.update(json.dumps(row).encode() + b"\n")
        digest.update(b"\n")
    return digest.hexdigest()


def image_cache(settings: Settings, say: Callable[[str], object]) -> ImageCache | None:
    """Where decoded images are kept, as ``--cache`` says; None for nowhere."""
    if settings.cache == "off":
        return None
    return ImageCache(default_folder() if settings.cache == "on" else Path(settings.cache), say)
