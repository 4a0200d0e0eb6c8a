"""What a data folder holds, before any training: rows, classes, faults, image sizes, text lengths."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from .catalogue import DataSet
from .faults import DataError, Fault
from .paired_images import PairedImages
from .text_images import TextImages

Range = tuple[float, float, float]
"""The smallest, the median and the largest."""


@dataclass
class SplitReport:
    """One split: usable rows per class, what is wrong with the others, and ranges over the usable ones."""

    split: str
    classes: dict[str, int] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    widths: Range | None = None
    heights: Range | None = None
    words: Range | None = None
    characters: Range | None = None
    repeated_ids: list[str] = field(default_factory=list)
    """Of texts; no fault, as nothing is looked up by them."""

    @property
    def usable(self) -> int:
        return sum(self.classes.values())


@dataclass
class Report:
    """All splits, and what keeps training from running even if every fault were skipped."""

    splits: list[SplitReport]
    problems: list[str]

    @property
    def faults(self) -> int:
        return sum(len(split.faults) for split in self.splits)

    def can_train(self, skip_bad: bool) -> bool:
        """Whether training could run, with ``--skip-bad`` or without."""
        return not self.problems and (skip_bad or not self.faults)


def inspect_data(
    known: DataSet, root: Path, *, images: bool = True, done: Callable[[], object] = lambda: None
) -> Report:
    """Read every split that training needs, every image included.

    Args:
        known: which data set.
        root: its folder.
        images: whether to look at the images of a text-image set; a pair set has nothing else.
        done: called after each image.
    """
    report = Report([], [])
    for split in known.splits:
        try:
            report.splits.append(_inspect_split(known, root, split, images, done))
        except DataError as error:
            if error.faults:
                report.splits.append(SplitReport(split, faults=list(error.faults)))
                report.problems.append(f"{split}: no usable row")
            else:
                report.problems.append(str(error))
                if not root.is_dir():
                    break
    for checked in report.splits:
        if checked.split == "train" and checked.classes:
            _check_classes(known, checked, report.problems)
    return report


def _check_classes(known: DataSet, train: SplitReport, problems: list[str]) -> None:
    if len(train.classes) != len(known.classes):
        problems.append(f"train: {known.title} has {len(known.classes)} classes, found {len(train.classes)}")
    empty = [name for name, count in train.classes.items() if not count]
    if empty:
        few = ", ".join(empty[:8]) + (", ..." if len(empty) > 8 else "")
        problems.append(f"train: {len(empty)} classes without a usable row: {few}")


def _inspect_split(known: DataSet, root: Path, split: str, images: bool, done: Callable[[], object]) -> SplitReport:
    data: PairedImages | TextImages
    if known.paired:
        data = PairedImages(known, root, split, skip_bad=True, num_classes=0, done=done)
    else:
        data = TextImages(known, root, split, images=images, skip_bad=True, num_classes=0, done=done)
    counts = Counter(data.labels)
    report = SplitReport(split, {name: counts[i] for i, name in enumerate(data.classes)}, data.faults)
    report.widths = _range([width for width, _ in data.sizes])
    report.heights = _range([height for _, height in data.sizes])
    if isinstance(data, TextImages):
        report.repeated_ids = [name for name, count in Counter(row.id for row in data.rows).items() if count > 1]
        report.words = _range([len(row.text.split()) for row in data.rows])
        report.characters = _range([len(row.text) for row in data.rows])
    return report


def _range(values: Sequence[int]) -> Range | None:
    return (min(values), median(values), max(values)) if values else None
