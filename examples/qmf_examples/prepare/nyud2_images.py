"""NYU Depth V2's labelled frames as numbered images, the form in which they are most often passed on.

``--images`` holds 0.jpg, 1.jpg, ... and ``--depths`` 0.png, 1.png, ..., in the release's order; depth in 8 bits, 255
being 10 m, inpainted. ``--meta`` holds the release's lists as text, each with a heading in its first line:
``sceneTypes.csv``, whose further lines are the frames', and ``train_indexes.csv`` and ``val_indexes.csv``, which count
frames from 1.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.decoding import read_values
from ..data.faults import DataError
from .coarse_depth import smooth_steps
from .frames import Frame
from .nyud2 import encode, plan

STEP = 10 / 255
"""Metres that one grey value stands for."""
_SUFFIXES = (".png", ".jpg", ".jpeg")


def plan_images(images: Path, depths: Path, meta: Path) -> list[Frame]:
    """Every frame of the lists' split, with its class.

    Raises:
        DataError: a folder or a list that is missing or cannot be read; frames that are missing or too many; a list
            that names a frame which is not there.
    """
    scenes = _lines(meta / "sceneTypes.csv")
    splits = {split: _numbers(meta / f"{name}_indexes.csv") for split, name in (("train", "train"), ("test", "val"))}
    files = _numbered("--images", images, len(scenes)), _numbered("--depths", depths, len(scenes))
    frames = plan(scenes, splits, f"--meta: {meta}")
    return [replace(frame, source=", ".join(found[int(frame.source) - 1] for found in files)) for frame in frames]


def _lines(file: Path) -> list[str]:
    """What stands under the heading."""
    try:
        lines = file.read_text(encoding="utf-8-sig").rstrip().splitlines()[1:]
    except FileNotFoundError as error:
        raise DataError(f"--meta: no file {file}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"--meta: {file} cannot be read ({getattr(error, 'strerror', None) or error})") from error
    if not lines:
        raise DataError(f"--meta: {file} has nothing under its heading")
    return lines


def _numbers(file: Path) -> list[int]:
    numbers = []
    for line, text in enumerate(_lines(file), start=2):
        try:
            numbers.append(int(text))
        except ValueError as error:
            raise DataError(f"--meta: {file}, line {line}: must be a frame's number, got {text!r:.40}") from error
    return numbers


def _numbered(option: str, folder: Path, count: int) -> dict[int, str]:
    """The names of the images 0 to ``count - 1``; files whose names are no numbers, such as previews, do not count."""
    found: dict[int, str] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise DataError(f"{option}: {folder} cannot be read as a folder ({error.strerror or error})") from error
    for path in paths:
        if path.suffix.lower() in _SUFFIXES and path.stem.isascii() and path.stem.isdigit():
            number = int(path.stem)
            if number in found:
                raise DataError(f"{option}: {folder} has two images {number}, {found[number]} and {path.name}")
            found[number] = path.name
    missing = [number for number in range(count) if number not in found]
    if missing:
        raise DataError(
            f"{option}: {folder} lacks {len(missing):,} of the {count:,} images that --meta lists, image {missing[0]} "
            f"for one; they must be numbered from 0 to {count - 1}"
        )
    if len(found) > count:
        raise DataError(f"{option}: {folder} has an image {max(found)}, and --meta lists images 0 to {count - 1}")
    return found


def images_converter(
    images: Path, depths: Path, depth: str, crop: bool
) -> "partial[tuple[NDArray[np.uint8], NDArray[np.uint8]]]":
    """The ``Converter`` of the numbered frames; ``depth`` is "hha" or "grey"."""
    return partial(convert_images, images, depths, depth, crop)


def convert_images(
    images: Path, depths: Path, depth: str, crop: bool, names: str
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The RGB and the depth image of the two files ``names``, uint8 ``[H, W, 3]`` each.

    Raises:
        DataError: one cannot be read, or they do not fit.
    """
    image_name, depth_name = names.split(", ")
    rgb, values = read_values(images / image_name), read_values(depths / depth_name)
    if values.mode != "L":
        raise DataError(f"{depth_name} must be grey in 8 bits (mode L), got mode {values.mode}")
    metres = np.asarray(values) * STEP
    try:
        # Grey goes out as it came in; normals of a surface in steps would be those of the steps.
        shown = smooth_steps(metres, STEP) if depth == "hha" else metres
        return encode(np.asarray(rgb.convert("RGB")), shown, None, depth, crop)
    except ValueError as error:
        raise DataError(f"cannot be used ({error})") from error
