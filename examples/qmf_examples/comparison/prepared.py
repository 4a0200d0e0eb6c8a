"""A seed's data: a set split, scaled by what its training part shows, and its test part under every condition."""

import zlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..corruption import features, view_copies
from ..corruption.conditions import CLEAN, CONFLICT, FEATURES, UNSEEN, VIEW_COPIES, Condition
from ..data.feature_files import FeatureFile
from ..data.feature_scale import FURTHEST, feature_scale
from ..data.multiview import Array, MultiView
from ..errors import CommandError

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
    copies: tuple[dict[str, Tensor], ...] = ()
    """Augmented copies of ``train``, of which each epoch takes one of each sample, or the sample itself."""

    def draw_copies(self, seed: int, epoch: int) -> Tensor:
        """Which copy of each training sample an epoch takes, int ``[N]``; 0 is ``train``'s."""
        if not self.copies:
            return torch.zeros(len(self.train_labels), dtype=torch.int64)
        # Of seed and epoch alone, so that a resumed run and each of several processes draw the same.
        draw = np.random.default_rng([seed, epoch, zlib.crc32(b"copies")])
        return torch.from_numpy(draw.integers(len(self.copies) + 1, size=len(self.train_labels)))

    def batch(self, index: Tensor, which: Tensor) -> dict[str, Tensor]:
        """The views of these training samples ``[B]``, the same copy ``[B]`` in all views of a sample."""
        if not self.copies:
            return {name: view[index] for name, view in self.train.items()}
        rows = torch.arange(len(index), device=index.device)
        return {
            name: torch.stack([copy[name][index] for copy in (self.train, *self.copies)])[which, rows]
            for name in self.train
        }


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

    clean = scaled({name: view[test] for name, view in data.views.items()})
    tests = []
    for condition in protocol.conditions:
        if condition in (*FEATURES, *UNSEEN):
            damaged, chosen = features.corrupt(list(clean.values()), condition, seed)
            views = dict(zip(clean, damaged, strict=True))
        elif data.images is None:
            continue
        else:
            chosen = view_copies.choose_views(len(clean), test, seed)
            copies = view_copies.corrupt(data.images[test], test, chosen, condition.kind, condition.level, seed)
            looks = zip(data.looks.items(), copies, strict=True)
            views = scaled({name: look(copy) for (name, look), copy in looks})
        tests.append(Damaged(condition, _tensors(views, device), torch.from_numpy(chosen).to(device)))
    seen = _tensors(scaled({name: view[train] for name, view in data.views.items()}), device)
    labels = (torch.from_numpy(data.labels[ids]).to(device) for ids in (train, test))
    return Prepared(seen, next(labels), tests, next(labels), data.num_classes)


def prepare_file(data: FeatureFile, seed: int, device: torch.device | str = "cpu") -> Prepared:
    """Scale by the clean training rows, and choose the half of each test sample's modalities to damage.

    Args:
        data: the set, with its own split.
        seed: of that choice.
        device: where the tensors go.
    """
    scales = {name: fit_each_feature(copies["clean"].astype(np.float64)) for name, copies in data.train.items()}

    def scaled(name: str, rows: NDArray[Any]) -> Array:
        return scales[name](rows.astype(np.float64))

    clean = [scaled(name, damages["clean"]) for name, damages in data.test.items()]
    tests = []
    for condition in (CLEAN, *(Condition(damage) for damage in data.damages), CONFLICT):
        if condition in (CLEAN, CONFLICT):
            views, chosen = features.corrupt(clean, condition, seed)
        else:
            damaged = [
                scaled(name, damages[condition.kind]) if condition.kind in damages else None
                for name, damages in data.test.items()
            ]
            views, chosen = features.replace(clean, damaged, condition, seed)
        shown = _tensors(dict(zip(data.test, views, strict=True)), device)
        tests.append(Damaged(condition, shown, torch.from_numpy(chosen).to(device)))
    copies = [
        _tensors({name: scaled(name, made.get(copy, made["clean"])) for name, made in data.train.items()}, device)
        for copy in ("clean", *data.copies)
    ]
    train, test = (torch.from_numpy(labels).to(device) for labels in (data.train_labels, data.test_labels))
    return Prepared(copies[0], train, tests, test, len(data.classes), tuple(copies[1:]))


def _tensors(views: Mapping[str, Array], device: torch.device | str) -> dict[str, Tensor]:
    return {name: torch.from_numpy(view.astype(np.float32)).to(device) for name, view in views.items()}


def split_60_40(labels: NDArray[np.int64], seed: int) -> tuple[Ids, Ids]:
    """scikit-learn's split at random, with the classes' shares kept.

    There is no validation set, since nothing is selected: a fixed number of epochs, and no choice among methods.
    """
    from sklearn.model_selection import train_test_split

    train, test = train_test_split(np.arange(len(labels)), test_size=0.4, stratify=labels, random_state=seed)
    return train, test


def split_80_20(labels: NDArray[np.int64], seed: int) -> tuple[Ids, Ids]:
    """Every fifth sample of each class, in an order at random, is a test sample.

    Raises:
        CommandError: so few that there might be none.
    """
    if len(labels) < 5:
        raise CommandError(f"a set must have 5 samples at least, got {len(labels)}: every fifth is a test sample")
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
    mean, deviation = feature_scale(view)
    return lambda x: np.clip((x - mean) / deviation, -FURTHEST, FURTHEST)


DIGITS = Protocol(split_60_40, fit_centre, VIEW_COPIES)
ROBUSTNESS = Protocol(split_80_20, fit_each_feature, (*FEATURES, *UNSEEN, *VIEW_COPIES[1:]))
