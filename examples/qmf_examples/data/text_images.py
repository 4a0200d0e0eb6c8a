"""FOOD101 and MVSA: JSON lines of id, label, text and img, as a torch data set."""

import codecs
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NotRequired, TypedDict

from PIL import Image
from torch.utils.data import Dataset

from .catalogue import DataSet, how_to_obtain
from .class_checks import check_class_count
from .decoding import read_image, shorter_side_to, too_large_resized
from .faults import DataError, Fault, file_inside
from .image_checks import check_images

_SURROGATE = re.compile("[\ud800-\udfff]")


class TextImageSample(TypedDict):
    """One sample: the text and the image (not of a text-only reader), or what the transforms made of them."""

    text: Any
    image: NotRequired[Any]
    label: int
    index: int


@dataclass(frozen=True)
class Row:
    """One line of a JSON-lines file, its fields checked, ``line`` counted from 1."""

    line: int
    id: str
    label: str
    text: str
    img: str | None


class TextImages(Dataset[TextImageSample]):
    """One split of a text-image data set.

    Labels are numbered in the alphabetical order of the training split's, whichever split is read. A row whose ``img``
    is null has a grey image of 256 x 256 pixels, as in the released code.

    Args:
        known: ``DATA_SETS["food101"]`` or ``["mvsa"]``.
        root: the folder that holds the .jsonl files.
        split: the name of one, without ``.jsonl``.
        images: whether to read images; the methods of text alone need none.
        transform: of the image.
        text_transform: of the text; a tokenizer, say.
        corrupt: called with ``(image, index, "image")`` after ``transform``.
        corrupt_text: called with ``(text, index)`` before ``text_transform``, and before the image is read.
        finish: of the image, after ``corrupt``.
        resized: pixels that ``transform`` makes of an image's shorter side; what this takes too many pixels for is bad.
        skip_bad: leave out what cannot be used, and keep it in ``faults``, rather than raise.
        num_classes: how many there must be; the data set's own number where None, any where 0.
        check: read every image now; without it a bad one raises when its turn comes.
        done: called after each image read, to show progress.

    Attributes:
        classes: names, in the order of the labels.
        labels: one per sample.
        rows: the rows in use.
        faults: what was left out.
        sizes: of each image, where checked: ``(width, height)``.

    Raises:
        DataError: no such file, the wrong number of classes, and, each with its file and line, a line that does not
            parse, a field that is missing or no text, a label the training split does not have, an image that is
            missing, truncated, too large or outside of the folder (named, a few; counted, all).
    """

    def __init__(
        self,
        known: DataSet,
        root: Path,
        split: str = "train",
        *,
        images: bool = True,
        transform: Callable[[Image.Image], Any] | None = None,
        text_transform: Callable[[str], Any] | None = None,
        corrupt: Callable[[Image.Image, int, str], Image.Image] | None = None,
        corrupt_text: Callable[[str, int], str] | None = None,
        finish: Callable[[Any], Any] | None = None,
        resized: int = 256,
        skip_bad: bool = False,
        num_classes: int | None = None,
        check: bool = True,
        done: Callable[[], object] = lambda: None,
    ) -> None:
        self.root, self.split, self.images = Path(root), split, images
        self.transform, self.text_transform, self.finish = transform, text_transform, finish
        self.corrupt, self.corrupt_text, self.resized = corrupt, corrupt_text, resized
        file = self.root / f"{split}.jsonl"
        rows, self.faults = read_rows(known, file)
        train = rows if split == "train" else read_rows(known, self.root / "train.jsonl")[0]
        self.classes = sorted({row.label for row in train})
        check_class_count(known, self.classes, num_classes, self.root / "train.jsonl")
        self.sizes: list[tuple[int, int]] = []
        rows = self._usable(rows, file.name, images and check, done)
        if self.faults and not (skip_bad and rows):
            raise DataError.of_faults(file, len(rows) + len(self.faults), self.faults)
        if not rows:
            raise DataError(f"{file}: no usable row. {how_to_obtain(known)}")
        self.rows = rows
        number = {label: i for i, label in enumerate(self.classes)}
        self.labels = [number[row.label] for row in rows]

    def _usable(self, rows: Sequence[Row], file: str, check: bool, done: Callable[[], object]) -> list[Row]:
        named = [row for row in rows if row.label in self.classes]
        for row in rows:
            if row.label not in self.classes:
                reason = f"unknown label {row.label!r}, which the training split does not have"
                self.faults.append(Fault(file, reason, row.line))
        with_image = [row for row in named if row.img is not None]
        bad: set[int] = set()
        if check:
            results = check_images(self.root, [row.img or "" for row in with_image], self._refuse, done)
            for row, result in zip(with_image, results, strict=True):
                if isinstance(result, str):
                    self.faults.append(Fault(file, result, row.line))
                    bad.add(row.line)
                else:
                    self.sizes.append(result)
        self.faults.sort(key=lambda fault: fault.line or 0)
        return [row for row in named if row.line not in bad]

    def _refuse(self, size: tuple[int, int]) -> str | None:
        return too_large_resized(size, shorter_side_to(self.resized, size))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TextImageSample:
        """The sample; its index is counted from 0, over what was not left out.

        Raises:
            IndexError: there are not so many.
            DataError: the image can no longer be read.
        """
        index = range(len(self.rows))[index]
        row = self.rows[index]
        text: Any = row.text if self.corrupt_text is None else self.corrupt_text(row.text, index)
        if self.text_transform is not None:
            text = self.text_transform(text)
        sample = TextImageSample(text=text, label=self.labels[index], index=index)
        if self.images:
            sample["image"] = self._image(row, index)
        return sample

    def _image(self, row: Row, index: int) -> Any:
        if row.img is None:
            image = Image.new("RGB", (256, 256), (128, 128, 128))
        else:
            try:
                image = read_image(file_inside(self.root, row.img))
                reason = self._refuse(image.size)
                if reason:
                    raise DataError(reason)
            except DataError as error:
                raise DataError(f"{self.root / self.split}.jsonl, line {row.line}: {error}") from error
        made: Any = image if self.transform is None else self.transform(image)
        if self.corrupt is not None:
            made = self.corrupt(made, index, "image")
        return made if self.finish is None else self.finish(made)


def read_rows(known: DataSet, file: Path) -> tuple[list[Row], list[Fault]]:
    """Every line of a JSON-lines file, as a row or as a fault; empty lines are neither.

    Raises:
        DataError: there is no such file, or it cannot be read.
    """
    rows, faults = [], []
    try:
        with file.open("rb") as lines:
            for number, line in enumerate(lines, start=1):
                if number == 1:
                    line = line.removeprefix(codecs.BOM_UTF8)
                if line.strip():
                    row = _parse(line, number)
                    if isinstance(row, str):
                        faults.append(Fault(file.name, row, number))
                    else:
                        rows.append(row)
    except FileNotFoundError as error:
        raise DataError(f"no file {file}. {how_to_obtain(known)}") from error
    except OSError as error:
        raise DataError(f"{file}: {error.strerror or error}") from error
    return rows, faults


def _parse(line: bytes, number: int) -> Row | str:
    try:
        fields = json.loads(line.decode())
    except UnicodeDecodeError:
        return "not UTF-8"
    except (ValueError, RecursionError) as error:
        return f"not JSON ({error})"
    if not isinstance(fields, dict):
        return f"must be an object with id, label, text and img, got {type(fields).__name__}"
    for field in ("label", "text"):
        if not isinstance(fields.get(field), str):
            return f"{field!r} must be text, got {fields.get(field)!r:.60}"
    img = fields.get("img")
    if "img" not in fields or not (img is None or isinstance(img, str)):
        return f"'img' must be a path or null, got {img!r:.60}" if "img" in fields else "'img' is missing"
    row = Row(number, str(fields.get("id", number)), fields["label"], fields["text"], img)
    for field in ("id", "label", "text", "img"):
        half = _SURROGATE.search(getattr(row, field) or "")
        if half:
            # JSON can say it and Python can hold it, but no tokenizer, file or terminal takes it.
            return f"{field!r} has half of a pair of surrogates, \\u{ord(half[0]):x}, which is no character"
    return row
