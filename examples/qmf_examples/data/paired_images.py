"""NYUD2 and SUN RGB-D: PNGs of an RGB and a depth half, in ``{train,test}/<class>/``, as a torch data set."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict

from PIL import Image
from torch.utils.data import Dataset

from .catalogue import UNFINISHED_FILE, DataSet, how_to_obtain
from .class_checks import check_class_count
from .decoding import read_image, shorter_side_to, too_large_resized
from .faults import DataError, Fault, file_inside
from .image_checks import check_images

Pair = tuple[Any, Any]

SHRINK_ABOVE = 224
LOAD_SIZE = 256
"""Halves wider than 224 pixels become 256 x 256 (bicubic), as in the released code."""


class PairedSample(TypedDict):
    """One sample: PIL images until a transform makes tensors of them, the class, and the index in the data set."""

    rgb: Any
    depth: Any
    label: int
    index: int


class PairedImages(Dataset[PairedSample]):
    """One split of an RGB-D data set.

    The classes are the training split's folders in alphabetical order, whichever split is read. Every image is read
    once before the first sample is given out.

    Args:
        known: ``DATA_SETS["nyud2"]`` or ``["sunrgbd"]``.
        root: the folder that holds ``train`` and ``test``.
        split: which of them.
        transform: called with both images at once, as torchvision's v2 transforms are, so that crops and flips agree.
        corrupt: called after it with ``(image, index, modality)`` on each image of the pair.
        finish: called last, with both images.
        shrink: whether halves wider than 224 pixels become 256 x 256, as in the released code.
        resized: pixels to each side that ``transform`` makes of an image (its shorter side's, where nothing is
            shrunk); what this takes too many pixels for is bad.
        skip_bad: leave out what cannot be used, and keep it in ``faults``, rather than raise.
        num_classes: how many there must be; the data set's own number where None, any where 0.
        check: read every image now; without it a bad one raises when its turn comes.
        done: called after each image read, to show progress.

    Attributes:
        classes: names, in the order of the labels.
        labels: one per sample.
        faults: what was left out.
        sizes: of each image, where checked: ``(width, height)``.

    Raises:
        DataError: no data there, the wrong number of classes, a class the training split does not have, an image that
            is missing, truncated, too large or outside of the folder (named, a few; counted, all).
    """

    def __init__(
        self,
        known: DataSet,
        root: Path,
        split: str = "train",
        *,
        transform: Callable[[Any, Any], Pair] | None = None,
        corrupt: Callable[[Image.Image, int, str], Image.Image] | None = None,
        finish: Callable[[Any, Any], Pair] | None = None,
        shrink: bool = True,
        resized: int = LOAD_SIZE,
        skip_bad: bool = False,
        num_classes: int | None = None,
        check: bool = True,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        self.root, self.split = Path(root), split
        self.transform, self.corrupt, self.finish = transform, corrupt, finish
        self.shrink, self.resized = shrink, max(resized, LOAD_SIZE)
        self.classes = class_folders(known, self.root, num_classes)
        self.faults: list[Fault] = []
        self.sizes: list[tuple[int, int]] = []
        rows = self._find(known)
        if check:
            results = check_images(self.root, [name for name, _ in rows], self._refuse, done)
            self.faults += [Fault(name, r) for (name, _), r in zip(rows, results, strict=True) if isinstance(r, str)]
            self.sizes = [result for result in results if not isinstance(result, str)]
            rows = [row for row, result in zip(rows, results, strict=True) if not isinstance(result, str)]
        if self.faults and not (skip_bad and rows):
            raise DataError.of_faults(self.root / split, len(rows) + len(self.faults), self.faults)
        if not rows:
            raise DataError(f"{self.root / split}: no usable image. {how_to_obtain(known)}")
        self.names = [name for name, _ in rows]
        self.labels = [label for _, label in rows]

    def _find(self, known: DataSet) -> list[tuple[str, int]]:
        folder = self.root / self.split
        if not folder.is_dir():
            raise DataError(f"no folder {folder}. {how_to_obtain(known)}")
        rows = []
        for of_class in sorted(path for path in folder.iterdir() if path.is_dir()):
            if of_class.name not in self.classes:
                reason = f"unknown class {of_class.name!r}, which the training split does not have"
                self.faults.append(Fault(f"{self.split}/{of_class.name}", reason))
                continue
            label = self.classes.index(of_class.name)
            names = sorted(path.name for path in of_class.iterdir() if path.suffix.lower() == ".png")
            rows += [(f"{self.split}/{of_class.name}/{name}", label) for name in names]
        return rows

    def _refuse(self, size: tuple[int, int]) -> str | None:
        half = (size[0] // 2, size[1])
        made = (self.resized, self.resized) if self.shrink else shorter_side_to(self.resized, half)
        return _cuts_in_two(size) or too_large_resized(half, made)

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> PairedSample:
        """The sample; its index is counted from 0, over what was not left out.

        Raises:
            IndexError: there are not so many.
            DataError: the image can no longer be read.
        """
        index = range(len(self.names))[index]
        name = self.names[index]
        try:
            image = read_image(file_inside(self.root, name))
            reason = self._refuse(image.size)
            if reason:
                raise DataError(reason)
            rgb, depth = split_pair(image, self.shrink)
        except DataError as error:
            raise DataError(f"{self.root / name}: {error}") from error
        images: Pair = (rgb, depth)
        if self.transform is not None:
            images = self.transform(*images)
        if self.corrupt is not None:
            images = (self.corrupt(images[0], index, "rgb"), self.corrupt(images[1], index, "depth"))
        if self.finish is not None:
            images = self.finish(*images)
        return PairedSample(rgb=images[0], depth=images[1], label=self.labels[index], index=index)


def class_folders(known: DataSet, root: Path, num_classes: int | None = None) -> list[str]:
    """The training split's class folders, in alphabetical order.

    Raises:
        DataError: there is no training split, not the data set's number of classes, or a part of what is prepared.
    """
    train = root / "train"
    if not train.is_dir():
        raise DataError(f"no folder {train}. {how_to_obtain(known)}")
    if (root / UNFINISHED_FILE).exists():
        raise DataError(f"{root}: prepare has not finished there; run the same command again to go on")
    classes = sorted(path.name for path in train.iterdir() if path.is_dir())
    check_class_count(known, classes, num_classes, train)
    return classes


def split_pair(image: Image.Image, shrink: bool = True) -> tuple[Image.Image, Image.Image]:
    """The left half and the right half, shrunk as the released code does or left as they are.

    Raises:
        DataError: an odd width.

    Example:
        >>> [half.size for half in split_pair(Image.new("RGB", (1122, 427)))]
        [(256, 256), (256, 256)]
    """
    reason = _cuts_in_two(image.size)
    if reason:
        raise DataError(reason)
    half = image.size[0] // 2
    halves = [image.crop((left, 0, left + half, image.size[1])) for left in (0, half)]
    if shrink and half > SHRINK_ABOVE and halves[0].size != (LOAD_SIZE, LOAD_SIZE):
        halves = [side.resize((LOAD_SIZE, LOAD_SIZE), Image.Resampling.BICUBIC) for side in halves]
    return halves[0], halves[1]


def _cuts_in_two(size: tuple[int, int]) -> str | None:
    return f"cannot be cut into two halves: it is {size[0]} pixels wide" if size[0] % 2 else None
