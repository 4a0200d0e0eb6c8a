"""A data set whose samples say which they are, as ``QMFLoss`` needs to know."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch.utils.data import Dataset, IterableDataset


class IndexedDataset(Dataset[Any]):
    """Give each sample its place in the data set, 0 to N - 1: in a mapping under ``key``, else behind the parts.

    Wrap what is whole: ``IndexedDataset(ConcatDataset([a, b]))``, as indices of two wrapped parts would collide.
    ``Subset(IndexedDataset(data), chosen)`` keeps the indices of all the data, ``IndexedDataset(Subset(data, chosen))``
    counts the subset; ``num_samples`` of the criterion is the length of what is wrapped.

    Args:
        dataset: with ``__len__`` and ``__getitem__``; a Hugging Face data set too. A stream has no places: see
            "Training loops" in the docs for indices of its own.
        key: where the index goes in a sample that is a mapping.

    Raises:
        TypeError: a data set without a length.
        ValueError: samples that have the key already.

    Example:
        >>> IndexedDataset([(1.5, 0), (2.5, 1)])[1]
        (2.5, 1, 1)
        >>> IndexedDataset([{"rgb": 1.5, "labels": 0}])[0]
        {'rgb': 1.5, 'labels': 0, 'index': 0}
    """

    def __init__(self, dataset: Any, key: str = "index") -> None:
        # PyTorch's own streams inherit a __getitem__ that only raises.
        if isinstance(dataset, IterableDataset) or not (
            hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        ):
            raise TypeError(
                f"dataset must have a length and samples by number, got {type(dataset).__name__}: let a stream's "
                "samples carry indices of their own"
            )
        self.dataset, self.key = dataset, key

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = self._place(index)
        return self._with_index(self.dataset[index], index)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch at once, where the data set can."""
        places = [self._place(index) for index in indices]
        many = getattr(self.dataset, "__getitems__", None)
        samples = [self.dataset[place] for place in places] if many is None else many(places)
        return [self._with_index(sample, place) for sample, place in zip(samples, places, strict=True)]

    def _place(self, index: int) -> int:
        place = int(index)
        if not -len(self) <= place < len(self):
            raise IndexError(f"index must be within the {len(self)} samples, got {place}")
        return place % len(self)

    def _with_index(self, sample: Any, index: int) -> Any:
        if isinstance(sample, Mapping):
            if self.key in sample:
                raise ValueError(f"key must be a name that no sample has, got {self.key!r} of {sorted(sample)}")
            return {**sample, self.key: index}
        if isinstance(sample, list):
            return [*sample, index]
        return (*sample, index) if isinstance(sample, tuple) else (sample, index)
