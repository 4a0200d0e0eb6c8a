"""The classes that a data folder shows, against those that the data set has."""

from collections.abc import Sequence
from pathlib import Path

from .catalogue import DataSet
from .faults import DataError


def check_class_count(known: DataSet, classes: Sequence[str], num_classes: int | None, where: Path) -> None:
    """Raise ``DataError`` where ``classes`` are not as many as the data set has."""
    expected = len(known.classes) if num_classes is None else num_classes
    if expected and len(classes) != expected:
        few = ", ".join(classes[:8]) + (", ..." if len(classes) > 8 else "")
        raise DataError(f"{where}: {known.title} has {expected} classes, found {len(classes)}: {few or 'none'}")


def check_every_class(classes: Sequence[str], labels: Sequence[int], where: Path) -> None:
    """Raise ``DataError`` where a class has no label: nothing could be learned of it."""
    there = set(labels)
    empty = [name for label, name in enumerate(classes) if label not in there]
    if empty:
        few = ", ".join(empty[:8]) + (", ..." if len(empty) > 8 else "")
        raise DataError(f"{where}: {len(empty)} of {len(classes)} classes without a usable sample: {few}")
