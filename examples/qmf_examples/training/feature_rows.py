"""Batches of features: what frozen encoders have seen of a split, as samples to train heads on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset


class FeatureRows(Dataset[Any]):
    """Samples of a split as features, a batch at a time.

    Args:
        rows: by modality, ``[copies, N, width]``.
        labels: ``[N]``.
        places: which of the N samples these are.
        augmented: whether a sample is any of its copies, the same in all modalities, drawn from PyTorch's own generator
            as crops are; else it is the first.
    """

    def __init__(self, rows: dict[str, Tensor], labels: Tensor, places: Sequence[int], augmented: bool) -> None:
        self.rows, self.labels, self.places = rows, labels, torch.tensor(places)
        self.copies = len(next(iter(rows.values()))) if augmented else 1

    def __len__(self) -> int:
        return len(self.places)

    def __getitems__(self, which: list[int]) -> dict[str, Any]:
        """A whole batch, in place of samples to put together: heads are faster than a collation."""
        index = self.places[which]
        copies = torch.randint(self.copies, index.shape) if self.copies > 1 else torch.zeros_like(index)
        inputs = {name: x[copies, index] for name, x in self.rows.items()}
        return {"inputs": inputs, "label": self.labels[index], "index": index}


def collate(batch: dict[str, Any]) -> dict[str, Any]:
    """The batch, which ``FeatureRows`` gives whole."""
    return batch
