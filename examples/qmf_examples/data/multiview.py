"""Multi-view feature sets from MATLAB files and the digits, split and corrupted one sample at a time."""

import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..corruption import view_copies as corruptions
from ..errors import CommandError
from . import digits as digits_data

Array = NDArray[np.float64]

LABELS = ("y", "Y", "gt")
CONDITIONS = ("clean", "noise 1", "noise 2", "noise 5", "noise 10", "blank", "conflict")
"""What half of each sample's views suffers, in standard deviations of the scaled features where there is a number."""


class MultiView(NamedTuple):
    """N samples seen in V ways."""

    name: str
    views: list[Array]
    """``[N, D]`` each."""
    labels: NDArray[np.int64]
    """``[N]``, from 0 up without gaps."""
    images: Array | None = None
    """``[N, 8, 8]`` where the views are computed from images, which can be damaged themselves."""


class Condition(NamedTuple):
    """The test set under one condition."""

    name: str
    views: list[Array]
    corrupted: NDArray[np.bool_]
    """``[V, N]``."""


class Prepared(NamedTuple):
    """A set's split for one seed, scaled by its training part."""

    train: list[Array]
    train_labels: NDArray[np.int64]
    conditions: list[Condition]
    test_labels: NDArray[np.int64]


def load_mat(path: Path) -> MultiView:
    """Read a ``.mat`` file: ``X``, a cell of N x D or D x N views, with ``y``, ``Y`` or ``gt``; or ``x1_train``,
    ``x1_test``, ... with ``gt_train`` and ``gt_test``, whose two parts are put together.

    Raises:
        CommandError: a file that cannot be read, or that holds something else; the message says what.
    """
    from scipy.io import loadmat

    try:
        content: dict[str, Any] = loadmat(str(path))
    except Exception as error:  # whatever a file of another kind, or version 7.3, makes scipy raise
        raise CommandError(f"cannot read {path}: {error}") from error
    if "x1_train" in content and "gt_train" in content:
        parts = [f"x{i}" for i in range(1, len(content)) if f"x{i}_train" in content]
        views = [np.concatenate([_dense(content[f"{x}_{part}"]) for part in ("train", "test")]) for x in parts]
        labels = np.concatenate([content[f"gt_{part}"].ravel() for part in ("train", "test")])
    else:
        label = next((name for name in LABELS if name in content), None)
        if "X" not in content or label is None:
            found = sorted(name for name in content if not name.startswith("__"))
            raise CommandError(f"{path} must hold X and one of {', '.join(LABELS)} (or x1_train, ...), got {found}")
        labels = content[label].ravel()
        cells = content["X"]
        if cells.dtype != object:
            raise CommandError(f"{path}: X must be a cell of views, got an array {cells.shape} of {cells.dtype}")
        views = []
        for i, cell in enumerate(cells.ravel()):
            view = _dense(cell)
            if view.ndim != 2 or len(labels) not in view.shape:
                raise CommandError(f"{path}: view {i} must have {len(labels)} rows or columns, got {view.shape}")
            views.append(view if view.shape[0] == len(labels) else view.T)
    if any(not np.isfinite(view).all() for view in views):
        raise CommandError(f"{path}: the views must be finite")
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise CommandError(f"{path}: there must be two classes at least, got {len(classes)}")
    return MultiView(path.stem, views, numbers.ravel().astype(np.int64))


def _dense(values: Any) -> Array:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)


def load_digits() -> MultiView:
    """scikit-learn's 1,797 digits in the four views of the digits job."""
    from sklearn.datasets import load_digits as load

    data = load()
    images = data.images / 16.0
    views = [look(images) for look in digits_data.VIEWS.values()]
    return MultiView("digits", views, data.target.astype(np.int64), images)


def prepare(data: MultiView, seed: int, images: bool = False) -> Prepared:
    """Split 80 : 20 within each class, scale to the training part's mean 0 and deviation 1, and corrupt the test part.

    Args:
        data: the set.
        seed: of the split and the damage.
        images: damage copies of the images and look at those, one for each view; in place of the features.
    """
    rng = np.random.default_rng([seed, zlib.crc32(b"split")])
    test = np.zeros(len(data.labels), dtype=np.bool_)
    order = np.concatenate([rng.permutation(np.flatnonzero(data.labels == c)) for c in np.unique(data.labels)])
    test[order[(np.arange(len(order)) + rng.integers(5)) % 5 == 0]] = True
    means = [view[~test].mean(0) for view in data.views]
    deviations = [np.where((s := view[~test].std(0)) < 1e-8, 1.0, s) for view in data.views]

    def scaled(views: Sequence[Array]) -> list[Array]:
        return [np.clip((x - m) / s, -50, 50) for x, m, s in zip(views, means, deviations, strict=True)]

    train, clean = scaled([view[~test] for view in data.views]), scaled([view[test] for view in data.views])
    if images:
        conditions = [_image_condition(data, test, name, level, seed, scaled) for name, level in image_conditions()]
    else:
        conditions = [corrupt(clean, name, seed) for name in CONDITIONS]
    return Prepared(train, data.labels[~test], conditions, data.labels[test])


def image_conditions() -> list[tuple[str, float]]:
    """``("clean", 0)`` and every image corruption at each level."""
    return [("clean", 0.0), *((kind, level) for kind, c in corruptions.CORRUPTIONS.items() for level in c.levels)]


def corrupt(views: Sequence[Array], condition: str, seed: int) -> Condition:
    """Corrupt half of each sample's views (of an odd number, the smaller half; at least one), ``[N, D]`` each.

    Noise is Gaussian, a blank is the mean of the training data, and a conflict is another sample's view, drawn for each
    view on its own.

    Raises:
        ValueError: an unknown condition.

    Example:
        >>> corrupt([np.ones((4, 2)), np.ones((4, 3))], "blank", seed=0).corrupted.sum(0)
        array([1, 1, 1, 1])
    """
    if condition not in CONDITIONS:
        raise ValueError(f"condition must be one of {list(CONDITIONS)}, got {condition!r}")
    num, size = len(views), len(views[0])
    if condition == "clean":
        return Condition(condition, list(views), np.zeros((num, size), dtype=np.bool_))
    rng = np.random.default_rng([seed, zlib.crc32(condition.encode())])
    chosen = rng.random((num, size)).argsort(0) < max(num // 2, 1)
    out = []
    for view, hit in zip(views, chosen, strict=True):
        if condition == "blank":
            damaged = np.zeros_like(view)
        elif condition == "conflict":
            damaged = view[rng.permutation(size)]
        else:
            damaged = view + float(condition.split()[1]) * rng.standard_normal(view.shape)
        out.append(np.where(hit[:, None], damaged, view))
    return Condition(condition, out, chosen)


def _image_condition(
    data: MultiView, test: NDArray[np.bool_], name: str, level: float, seed: int, scaled: Any
) -> Condition:
    assert data.images is not None
    ids = np.flatnonzero(test).astype(np.int64)
    looks = list(digits_data.VIEWS.values())
    chosen = corruptions.choose_views(len(looks), ids, seed)
    if name == "clean":
        views = [look(data.images[test]) for look in looks]
        return Condition("clean", scaled(views), np.zeros_like(chosen))
    copies = corruptions.corrupt(data.images[test], ids, chosen, name, level, seed)
    views = [look(copy) for look, copy in zip(looks, copies, strict=True)]
    return Condition(f"{name} {level:g}", scaled(views), chosen)
