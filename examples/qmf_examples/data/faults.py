"""What is wrong with a data set, told with the file and the line; and opening what others wrote without trusting it."""

import contextlib
import os
import re
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import TYPE_CHECKING, BinaryIO

from ..errors import CommandError

if TYPE_CHECKING:
    from PIL.Image import Image

MAX_PIXELS = 64_000_000
"""Images of more pixels are refused before they are decoded, and those of which resizing would make more: 192 MB as
RGB."""
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
NAMED = 5
"""How many faults a message names; all are counted."""
_PLAIN_NAME = re.compile(r"[^\0/\\:][^\0\\:]*")


class DataError(CommandError):
    """Ends a command with its message: what is wrong with the data, or with where it was looked for.

    ``faults`` are those that the message sums up.
    """

    faults: Sequence["Fault"] = ()

    @classmethod
    def of_faults(cls, where: Path, rows: int, faults: Sequence["Fault"]) -> "DataError":
        """Of ``rows`` rows or files, these cannot be used."""
        error = cls(f"{where}: {len(faults)} of {rows} cannot be used\n{summary(faults)}")
        error.faults = faults
        return error


@dataclass(frozen=True)
class Fault:
    """One row or file that cannot be used.

    Example:
        >>> str(Fault("train.jsonl", "no such file: images/7.jpg", line=3))
        'train.jsonl, line 3: no such file: images/7.jpg'
    """

    file: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


def summary(faults: Sequence[Fault]) -> str:
    """The first few faults by name, a line each, and how many more there are."""
    more = [f"... and {len(faults) - NAMED} more"] if len(faults) > NAMED else []
    return "\n".join([str(fault) for fault in faults[:NAMED]] + more)


def file_inside(root: Path, name: str) -> Path:
    """The file ``name``, relative to ``root``, that lies in ``root`` whatever links lead to it.

    Raises:
        DataError: an absolute path, one that climbs out of the folder by ``..`` or by a link, or no file.
    """
    found = _plain_file(root, name)
    if found is not None:
        return found
    if not name or "\0" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise DataError(f"the path must be relative to the data folder, got {name!r}")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise DataError(f"the path leads out of the data folder: {name!r}")
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"the path leads out of the data folder by a link: {name!r}")
        if not path.exists():
            raise DataError(f"no such file: {name}")
        if not path.is_file():
            raise DataError(f"not a file: {name}")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise DataError(f"cannot look up {name!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _plain_file(root: Path, name: str) -> Path | None:
    """The file, where no question arises: no link below ``root``, no odd name. None leaves it to a closer look, which
    would take several times as long at every image of a training.
    """
    if os.name == "nt" or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        return None
    step = str(root)
    mode = 0
    try:
        for part in name.split("/"):
            step = f"{step}/{part}"
            mode = os.lstat(step).st_mode
            if stat.S_ISLNK(mode):
                return None
    except OSError:
        return None
    return Path(step) if stat.S_ISREG(mode) else None


def open_image(path: Path, max_pixels: int = MAX_PIXELS, deep: bool = False) -> "Image":
    """The image, decoded whole.

    Args:
        path: of the file.
        max_pixels: how many it may have.
        deep: whether grey values of 16 or more bits will do, which as RGB would be cut off at 255.

    Raises:
        DataError: it cannot be read, is truncated, is none of ``FORMATS``, has more than ``max_pixels`` pixels, or
            deeper ones than wanted.
    """
    with _image_errors(path), path.open("rb") as file:
        image = _decoder(file, path.name, max_pixels, deep)
        image.load()
    return image


def check_image(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Its width and height, after reading all of it, for a JPEG at an eighth of its size, which takes a fraction.

    Raises:
        DataError: see ``open_image``.
    """
    with _image_errors(path), path.open("rb") as file:
        image = _decoder(file, path.name, max_pixels)
        size = image.size
        image.draft("RGB", (max(1, size[0] // 8), max(1, size[1] // 8)))
        image.load()
    return size


def shorter_side_to(side: int, size: tuple[int, int]) -> tuple[int, int]:
    """What a ``size`` becomes where its shorter side is resized to ``side`` pixels and its shape kept.

    Example:
        >>> shorter_side_to(256, (1, 60_000))
        (256, 15360000)
    """
    width, height = size
    return (side, side * height // width) if width <= height else (side * width // height, side)


def too_large_resized(size: tuple[int, int], made: tuple[int, int], max_pixels: int = MAX_PIXELS) -> str | None:
    """Why an image of ``size`` is not resized to ``made``, each width and height; None where nothing is against it.

    Pillow resizes the rows first, so that on its way it holds an image of the new width and the old height.

    Example:
        >>> too_large_resized((1, 60_000), (256, 15_360_000))
        'refused: 1 x 60000 pixels would be resized by way of 256 x 15360000, more than 64,000,000'
        >>> too_large_resized((1, 60_000), (256, 256))
    """
    width, height = made[0], max(size[1], made[1])
    if width * height <= max_pixels:
        return None
    way = f"{width} x {height}, more than {max_pixels:,}"
    return f"refused: {size[0]} x {size[1]} pixels would be resized by way of {way}"


def _decoder(file: BinaryIO, name: str, max_pixels: int, deep: bool = False) -> "Image":
    from PIL import Image

    if not file.read(1):
        raise DataError(f"an empty file: {name}")
    file.seek(0)
    image = Image.open(file, formats=FORMATS)
    # A bound of the reader's own: Pillow's warns first and refuses at twice as many.
    if image.size[0] * image.size[1] > max_pixels:
        raise DataError(f"refused: {name} has {image.size[0]} x {image.size[1]} pixels, more than {max_pixels:,}")
    if image.mode.startswith(("I", "F")) and not deep:
        raise DataError(f"refused: {name} has grey values of more than 8 bits (mode {image.mode})")
    return image


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    """Every way in which reading an image fails, as a ``DataError`` in one line."""
    from PIL import Image, UnidentifiedImageError

    try:
        yield
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise DataError(f"not an image of {', '.join(FORMATS)}: {path.name}") from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DataError(f"refused, too many pixels: {path.name}") from error
    except Exception as error:  # damaged files make Pillow's decoders raise nearly anything
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot be read: {path.name} ({reason})") from error
