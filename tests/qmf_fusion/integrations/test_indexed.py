"""Every sample's own index, through whatever stands around a data set."""

import pytest
import torch
from torch.utils.data import ConcatDataset, DataLoader, IterableDataset, Subset, TensorDataset

from qmf_fusion.integrations import IndexedDataset

X = torch.arange(10.0)


def indices_of(loader):
    """Of batches whose values are their samples' numbers."""
    found = []
    for batch in loader:
        value, index = (batch["x"], batch["index"]) if isinstance(batch, dict) else (batch[0], batch[-1])
        assert index.dtype == torch.int64
        found += list(zip(value.tolist(), index.tolist(), strict=True))
    return sorted(found)


KINDS = {
    "tensors": lambda: TensorDataset(X, X > 4),
    "list of mappings": lambda: [{"x": x, "labels": 0} for x in X.tolist()],
    "list of values": X.tolist,
    "concatenated": lambda: ConcatDataset([TensorDataset(X[:4], X[:4] > 4), TensorDataset(X[4:], X[4:] > 4)]),
    "Hugging Face": lambda: pytest.importorskip("datasets").Dataset.from_dict({"x": X.tolist(), "labels": [0] * 10}),
    "Hugging Face, tensors": lambda: (
        pytest.importorskip("datasets").Dataset.from_dict({"x": X.tolist()}).with_format("torch")
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_the_index_is_the_place(kind):
    data = IndexedDataset(KINDS[kind]())
    assert len(data) == 10
    assert indices_of(DataLoader(data, 3, shuffle=True)) == [(i, i) for i in range(10)]
    chosen = [7, 2, 5]
    assert indices_of(DataLoader(Subset(data, chosen), 2)) == [(2, 2), (5, 5), (7, 7)]
    assert indices_of(DataLoader(IndexedDataset(Subset(KINDS[kind](), chosen)), 2)) == [(2, 1), (5, 2), (7, 0)]


def test_places_from_the_end_and_beyond_it():
    data = IndexedDataset(TensorDataset(X))
    assert [int(v) for v in data[-1]] == [9, 9]
    for place in (10, -11):
        with pytest.raises(IndexError, match=rf"index must be within the 10 samples, got {place}"):
            data[place]


def test_what_has_no_places_and_what_has_the_key():
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(X)

    with pytest.raises(TypeError, match="dataset must have a length and samples by number, got Stream: let a stream's"):
        IndexedDataset(Stream())
    Stream.__len__ = lambda _: len(X)  # as some streams say theirs, which has no more places for that
    with pytest.raises(TypeError, match="dataset must have a length and samples by number, got Stream: let a stream's"):
        IndexedDataset(Stream())
    with pytest.raises(ValueError, match=r"key must be a name that no sample has, got 'index' of \['index'\]"):
        IndexedDataset([{"index": 3}])[0]
    assert IndexedDataset([{"index": 3}], key="row")[0] == {"index": 3, "row": 0}


def test_a_list_is_many_values_as_for_default_collate():
    assert IndexedDataset([[1.5, 0], [2.5, 1]])[1] == [2.5, 1, 1]
