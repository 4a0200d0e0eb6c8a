"""Multi-view feature sets: what one is, and reading them from MATLAB files."""

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CommandError

Array = NDArray[np.float64]

LABELS = ("y", "Y", "gt")


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
    named = {str(number): view for number, view in enumerate(views)}
    return MultiView(path.stem, named, numbers.ravel().astype(np.int64))


def _dense(values: Any) -> Array:
    return np.asarray(values.toarray() if hasattr(values, "toarray") else values, dtype=np.float64)
