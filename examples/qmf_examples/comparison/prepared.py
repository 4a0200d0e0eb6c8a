"""A seed's data: a set split, scaled by what its training part shows, and its test part under every condition."""

import zlib
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..corruption import features, view_copies
from ..corruption.conditions import CLEAN, FEATURES, VIEW_COPIES, Condition
from ..data.multiview import Array, MultiView

Ids = NDArray[np.int64]
Scale = Callable[[Array], Array]


class Damaged(NamedTuple):
    """The test set under one condition."""

    condition: Condition
    views: dict[str, Tensor]
    """``[B, D]`` each."""
    corrupted: Tensor
    """bool ``[V, B]``."""


class Prepared(NamedTuple):
    """One seed's data."""

    train: dict[str, Tensor]
    train_labels: Tensor
    tests: list[Damaged]
    """The clean one first."""
    test_labels: Tensor
    num_classes: int


class Protocol(NamedTuple):
    """How a comparison treats its sets."""

    split: Callable[[NDArray[np.int64], int], tuple[Ids, Ids]]
    """From labels and a seed to the numbers of the training and the test samples."""
    fit: Callable[[Array], Scale]
    """From a view's training part to what scales the view."""
    conditions: tuple[Condition, ...]
    """Those of ``VIEW_COPIES`` are for sets with images."""


def prepare(data: MultiView, protocol: Protocol, seed: int, device: torch.device | str = "cpu") -> Prepared:
    """Split, scale and damage.

    Args:
        data: the set.
        protocol: how.
        seed: of the split and the damage.
        device: where the tensors go.
    """
    train, test = protocol.split(data.labels, seed)
    scales = {name: protocol.fit(view[train]) for name, view in data.views.items()}

    def scaled(views: Mapping[str, Array]) -> dict[str, Array]:
        return {name: scales[name](view) for name, view in views.items()}

    def tensors(views: Mapping[str, Array]) -> dict[str, Tensor]:
        return {name: torch.from_numpy(view.astype(np.float32)).to(device) for name, view in views.items()}

    clean = scaled({name: view[test] for name, view in data.views.items()})
    tests = []
    for condition in protocol.conditions:
        if condition in FEATURES:
            damaged, chosen = features.corrupt(list(clean.values()), condition, seed)
            views = dict(zip(clean, damaged, strict=True))
        elif data.images is None:
            continue
        else:
            chosen = view_copies.choose_views(len(clean), test, seed)
            copies = view_copies.corrupt(data.images[test], test, chosen, condition.kind, condition.level, seed)
            looks = zip(data.looks.items(), copies, strict=True)
            views = scaled({name: look(copy) for (name, look), copy in looks})
        tests.append(Damaged(condition, tensors(views), torch.from_numpy(chosen).to(device)))
    seen = tensors(scaled({name: view[train] for name, view in data.views.items()}))
    labels = (torch.from_numpy(data.labels[ids]).to(device) for ids in (train, test))
    return Prepared(seen, next(labels), tests, next(labels), data.num_classes)


def split_60_40(labels: NDArray[np.int64], seed: int) -> tuple[Ids, Ids]:
    """scikit-learn's split at random, with the classes' shares kept.

    There is no validation set, since nothing is selected: a fixed number of epochs, and no choice among methods.
    """
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=seed)
    return train, test


def split_80_20(labels: NDArray[np.int64], seed: int) -> tuple[Ids, Ids]:
    """Every fifth sample of each class, in an order at random, is a test sample."""
    rng = np.random.default_rng([seed, zlib.crc32(b"split")])
    test = np.zeros(len(labels), dtype=np.bool_)
    order = np.concatenate([rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)])
    test[order[(np.arange(len(order)) + rng.integers(5)) % 5 == 0]] = True
    return np.flatnonzero(~test), np.flatnonzero(test)


def fit_centre(view: Array) -> Scale:
    """Centres each feature and divides a view by one number, so that a pixel that is always black stays harmless."""
    mean, scale = view.mean(0), float(view.std(0).mean())
    return lambda x: (x - mean) / scale


def fit_each_feature(view: Array) -> Scale:
    """Scales each feature to mean 0 and deviation 1, and cuts off at 50."""
    mean, deviation = view.mean(0), view.std(0)
    deviation = np.where(deviation < 1e-8, 1.0, deviation)
    return lambda x: np.clip((x - mean) / deviation, -50, 50)


DIGITS = Protocol(split_60_40, fit_centre, VIEW_COPIES)
ROBUSTNESS = Protocol(split_80_20, fit_each_feature, (*FEATURES, *(each for each in VIEW_COPIES if each != CLEAN)))
