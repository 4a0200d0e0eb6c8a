"""What a data set's loader hands to a run."""

from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from ..models.text_encoders import Numbering


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
    numbering: Numbering | None = None
    """How texts became numbers."""
