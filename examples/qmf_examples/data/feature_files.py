"""Features that encoders have seen of a set's clean and damaged inputs: what such a set is, and its ``.npz`` file."""

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ..errors import CommandError
from .multiview import LARGEST

CLEAN = "clean"
OWN = "conflict"
"""The damage that the bench makes itself, of the clean features."""

Rows = NDArray[np.floating[Any]]


class FeatureFile(NamedTuple):
    """A split set of N training and B test samples, M modalities of which an encoder has seen several copies."""

    name: str
    classes: tuple[str, ...]
    train: dict[str, dict[str, Rows]]
    """By modality and copy, ``[N, D]``: ``"clean"``, and augmented ones of the same samples."""
    train_labels: NDArray[np.int64]
    test: dict[str, dict[str, Rows]]
    """By modality and damage, ``[B, D]``, every row of it damaged: ``"clean"``, and others."""
    test_labels: NDArray[np.int64]

    @property
    def copies(self) -> tuple[str, ...]:
        """Augmented ones that at least one modality has; where another has none, its clean rows stand."""
        return tuple(dict.fromkeys(c for copies in self.train.values() for c in copies if c != CLEAN))

    @property
    def damages(self) -> tuple[str, ...]:
        """Those that at least one modality has, in the file's order."""
        return tuple(dict.fromkeys(d for copies in self.test.values() for d in copies if d != CLEAN))


def load_npz(path: Path) -> FeatureFile:
    """Read ``classes``, ``{train,test}_y``, ``train_<modality>_<copy>`` and ``test_<modality>_<damage>``.

    A modality is what has ``train_<modality>_clean``; it must have ``test_<modality>_clean`` too. Keys that begin
    otherwise are left alone.

    Raises:
        CommandError: a file that cannot be read, or that holds something else; the message says what.
    """
    try:
        with np.load(path, allow_pickle=False) as content:
            arrays: dict[str, NDArray[Any]] = {key: content[key] for key in content}
    except Exception as error:  # whatever a file of another kind makes NumPy and zipfile raise
        raise CommandError(f"cannot read {path}: {error}") from error
    missing = [key for key in ("classes", "train_y", "test_y") if key not in arrays]
    modalities = [key[len("train_") : -len("_clean")] for key in arrays if _is_clean(key)]
    if missing or not modalities:
        missing += [] if modalities else ["train_<modality>_clean"]
        raise CommandError(f"{path}: there must be {', '.join(missing)}, got {sorted(arrays)}")
    if arrays["classes"].ndim != 1 or len(arrays["classes"]) < 2:
        raise CommandError(f"{path}: classes must be the names of two at least, got shape {arrays['classes'].shape}")
    classes = tuple(str(each) for each in arrays["classes"])
    labels = {part: _labels(path, f"{part}_y", arrays[f"{part}_y"], len(classes)) for part in ("train", "test")}
    found: dict[str, dict[str, dict[str, Rows]]] = {part: {m: {} for m in modalities} for part in labels}
    for key, rows in arrays.items():
        part = key.partition("_")[0]
        if part not in found or key == f"{part}_y":
            continue
        # The longest, so that a modality may be called as another and a damage are together.
        of = max((m for m in modalities if key.startswith(f"{part}_{m}_")), key=len, default=None)
        if of is None:
            raise CommandError(f"{path}: {key} is of no modality; those with train_<modality>_clean are {modalities}")
        _check_rows(path, key, rows, len(labels[part]), arrays[f"train_{of}_clean"].shape[-1:])
        found[part][of][key[len(f"{part}_{of}_") :]] = rows
    for of, damages in found["test"].items():
        if CLEAN not in damages:
            raise CommandError(f"{path}: there must be test_{of}_clean beside {[f'test_{of}_{d}' for d in damages]}")
        if OWN in damages:
            raise CommandError(f"{path}: test_{of}_{OWN} must have another name: the bench makes the conflicts itself")
    return FeatureFile(path.stem, classes, found["train"], labels["train"], found["test"], labels["test"])


def _is_clean(key: str) -> bool:
    return key.startswith("train_") and key.endswith("_clean") and len(key) > len("train__clean")


def _labels(path: Path, key: str, labels: NDArray[Any], num_classes: int) -> NDArray[np.int64]:
    if labels.ndim != 1 or not len(labels) or labels.dtype.kind not in "iu":
        raise CommandError(f"{path}: {key} must be integers, one a sample, got {labels.dtype} {labels.shape}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise CommandError(
            f"{path}: {key} must be from 0 to {num_classes - 1}, as there are {num_classes} classes, got "
            f"{labels.min()} to {labels.max()}"
        )
    return labels.astype(np.int64)


def _check_rows(path: Path, key: str, rows: NDArray[Any], num: int, width: tuple[int, ...]) -> None:
    if rows.dtype.kind != "f":
        raise CommandError(f"{path}: {key} must be floating point numbers, got {rows.dtype}")
    if rows.ndim != 2 or rows.shape != (num, *width) or not rows.size:
        wanted = f"{num} rows of {width[0]} features" if width else f"{num} rows of features"
        raise CommandError(f"{path}: {key} must be {wanted}, got shape {rows.shape}")
    if not (np.abs(rows) <= LARGEST).all():
        raise CommandError(f"{path}: {key} must be finite, in single precision too")
