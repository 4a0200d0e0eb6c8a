"""Multi-view feature sets: what one is, and reading them from MATLAB files."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CommandError

Array = NDArray[np.float64]

LABELS = ("y", "Y", "gt")
MAX_VALUES = 500_000_000
"""Of a view: 4 GB in double precision."""
LARGEST = np.finfo(np.float32).max
"""The networks compute in single precision, in which what is larger is infinite."""


class MultiView(NamedTuple):
    """N samples seen in V ways."""

    name: str
    views: dict[str, Array]
    """``[N, D]`` each."""
    labels: NDArray[np.int64]
    """``[N]``, from 0 up without gaps."""
    images: Array | None = None
    """``[N, 8, 8]`` where the views are computed from images, which can be damaged themselves."""
    looks: Mapping[str, Callable[[Array], Array]] = MappingProxyType({})
    """From images to each view, where there are images."""

    @property
    def num_classes(self) -> int:
        return int(self.labels.max()) + 1


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
    two_parts = "x1_train" in content and "gt_train" in content
    views, labels = _parts(path, content) if two_parts else _cells(path, content)
    classes, numbers = np.unique(labels, return_inverse=True)
    if len(classes) < 2:
        raise CommandError(f"{path}: there must be two classes at least, got {len(classes)}")
    named = {str(number): view for number, view in enumerate(views)}
    return MultiView(path.stem, named, numbers.ravel().astype(np.int64))


def _cells(path: Path, content: dict[str, Any]) -> tuple[list[Array], Array]:
    label = next((name for name in LABELS if name in content), None)
    if "X" not in content or label is None:
        found = sorted(name for name in content if not name.startswith("__"))
        raise CommandError(f"{path} must hold X and one of {', '.join(LABELS)} (or x1_train, ...), got {found}")
    labels = _labels(path, label, content[label])
    cells = content["X"]
    if not isinstance(cells, np.ndarray) or cells.dtype.kind != "O":
        raise CommandError(f"{path}: X must be a cell of views, got {_kind(cells)}")
    views = [_view(path, f"view {i}", cell) for i, cell in enumerate(cells.ravel())]
    for i, view in enumerate(views):
        if len(labels) not in view.shape:
            raise CommandError(f"{path}: view {i} must have {len(labels)} rows or columns, got {view.shape}")
    if not views:
        raise CommandError(f"{path}: X must be a cell of views, got an empty one")
    return [view if view.shape[0] == len(labels) else view.T for view in views], labels


def _parts(path: Path, content: dict[str, Any]) -> tuple[list[Array], Array]:
    names = [f"x{i}" for i in range(1, len(content)) if f"x{i}_train" in content]
    missing = [key for key in (*(f"{name}_test" for name in names), "gt_test") if key not in content]
    if missing:
        raise CommandError(f"{path}: there must be {', '.join(missing)} beside x1_train and gt_train")
    labels = {part: _labels(path, f"gt_{part}", content[f"gt_{part}"]) for part in ("train", "test")}
    views = []
    for name in names:
        parts = {part: _view(path, f"{name}_{part}", content[f"{name}_{part}"]) for part in labels}
        for part, view in parts.items():
            wanted = (len(labels[part]), parts["train"].shape[1])
            if view.shape != wanted:
                raise CommandError(f"{path}: {name}_{part} must have {wanted} rows and columns, got {view.shape}")
        views.append(np.concatenate(list(parts.values())))
    return views, np.concatenate(list(labels.values()))


def _view(path: Path, name: str, values: Any) -> Array:
    """``[N, D]``, whatever of real numbers it was stored as."""
    if getattr(values, "dtype", np.dtype(object)).kind not in "biuf" or len(values.shape) != 2 or 0 in values.shape:
        raise CommandError(f"{path}: {name} must be a matrix of real numbers, got {_kind(values)}")
    if math.prod(values.shape) > MAX_VALUES:
        # A sparse matrix of a few bytes can be one of terabytes.
        raise CommandError(f"{path}: {name} must have at most {MAX_VALUES:,} values, got {_kind(values)}")
    view = np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
    if not (np.abs(view) <= LARGEST).all():
        raise CommandError(f"{path}: {name} must be finite, in single precision too")
    return view


def _labels(path: Path, name: str, values: Any) -> Array:
    """``[N]``; of a matrix, it would not be known which of its numbers are a sample's."""
    values = values.toarray() if hasattr(values, "toarray") else values
    numbers = getattr(values, "dtype", np.dtype(object)).kind in "biuf"
    if not numbers or not values.size or values.size != max(values.shape, default=1):
        raise CommandError(f"{path}: {name} must be whole numbers, one a sample, got {_kind(values)}")
    labels = values.ravel()
    strangers = labels[~(np.isfinite(labels) & (np.floor(labels) == labels))]
    if len(strangers):
        raise CommandError(
            f"{path}: {name} must be whole numbers, got {strangers[0]} and {len(strangers) - 1} more that are none"
        )
    return labels


def _kind(values: Any) -> str:
    return f"{getattr(values, 'dtype', type(values).__name__)} {getattr(values, 'shape', '')}".strip()
