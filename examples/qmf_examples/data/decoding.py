"""Image files to pixels: which files are read, and what a decoded image is.

Everything that looks at a data set's images reads them here, so that training, features and ``inspect`` see the same.
A decoded image is RGB in 8 bits and upright:

- grey and palettes become RGB, CMYK is converted without a colour profile;
- of values of 16 bits the upper 8 are kept;
- what is transparent shows white;
- the orientation that EXIF states is applied;
- of an animation it is the first frame.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from .faults import DataError

MAX_PIXELS = 64_000_000
"""Images of more pixels are refused before they are decoded, and those of which resizing would make more: 192 MB as
RGB."""
FORMATS = ("PNG", "JPEG", "GIF", "BMP", "WEBP")
_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What makes an image of EXIF's orientation upright; from 5 on, width and height change places."""


def read_image(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The decoded image: mode RGB, upright.

    Raises:
        DataError: it cannot be read, is truncated, is none of ``FORMATS``, or has more than ``max_pixels`` pixels.
    """
    with _image_errors(path), path.open("rb") as file:
        image = _opened(file, path.name, max_pixels)
        image.load()
        turn = _UPRIGHT.get(_orientation(image))
        rgb = _to_rgb(image)
        return rgb if turn is None else rgb.transpose(turn)


def read_values(path: Path, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """The file's own values, in its own mode and orientation: for depth maps, whose 16 bits are measurements.

    Raises:
        DataError: see ``read_image``.
    """
    with _image_errors(path), path.open("rb") as file:
        image = _opened(file, path.name, max_pixels)
        image.load()
    return image


def check_image(path: Path, max_pixels: int = MAX_PIXELS) -> tuple[int, int]:
    """Width and height of what ``read_image`` gives, after reading all of the file, a JPEG's at an eighth of its size,
    which takes a fraction of the time.

    Raises:
        DataError: see ``read_image``.
    """
    with _image_errors(path), path.open("rb") as file:
        image = _opened(file, path.name, max_pixels)
        width, height = image.size
        image.draft("RGB", (max(1, width // 8), max(1, height // 8)))
        image.load()
        return (height, width) if _orientation(image) >= 5 else (width, height)


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


def _opened(file: BinaryIO, name: str, max_pixels: int) -> Image.Image:
    if not file.read(1):
        raise DataError(f"an empty file: {name}")
    file.seek(0)
    image = Image.open(file, formats=FORMATS)
    # A bound of the reader's own: Pillow's warns first and refuses at twice as many.
    if image.size[0] * image.size[1] > max_pixels:
        raise DataError(f"refused: {name} has {image.size[0]} x {image.size[1]} pixels, more than {max_pixels:,}")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF's, 1 to 8, of an image that is loaded: a PNG may state it behind its pixels."""
    try:
        stated = image.getexif().get(_ORIENTATION)
    except Exception:  # damaged EXIF makes Pillow raise nearly anything, and the pixels are whole
        return 1
    return stated if isinstance(stated, int) and stated in _UPRIGHT else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I"):
        # The upper byte, as Pillow's decoder keeps it of colours in 16 bits; its own conversion would cut off at 255.
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        # What lies under transparent pixels is not meant to be seen, and often is noise or black.
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image if image.mode == "RGB" else image.convert("RGB")


@contextlib.contextmanager
def _image_errors(path: Path) -> Iterator[None]:
    """Every way in which reading an image fails, as a ``DataError`` in one line."""
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
