"""NYU Depth V2's labelled frames as pairs, whatever they are read from: their classes, their split, their geometry.

The release's one HDF5 file is read by ``nyud2_mat``, the same frames as numbered images by ``nyud2_images``.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from ..data.catalogue import NYUD2_COMMON
from ..data.faults import DataError
from .frames import Frame
from .hha import grey, hha

SHAPE = (480, 640)
"""Rows and columns of every frame."""
CAMERA = np.array([[518.85790117, 0, 325.58244941], [0, 519.46961112, 253.73616633], [0, 0, 1]])
"""The colour camera's intrinsics in the release's toolbox, onto which the depth maps are projected."""
CROP = (slice(44, 471), slice(40, 601))
"""Rows and columns inside of the white border that the projection leaves: 427 x 561 of 480 x 640 pixels."""


def scene_class(scene: str) -> str:
    """One of the ten classes: the scene's type where it is among the nine common ones, else "others".

    Example:
        >>> [scene_class(name) for name in ("home_office", "study", "bedroom_0012", "living room")]
        ['home_office', 'others', 'bedroom', 'living_room']
    """
    head, _, tail = scene.strip().lower().replace(" ", "_").rpartition("_")
    kind = head if head and tail.rstrip("abcdefgh").isdigit() else f"{head}_{tail}" if head else tail
    return kind if kind in NYUD2_COMMON else "others"


def plan(scenes: Sequence[str], splits: Mapping[str, Sequence[int]], named: str) -> list[Frame]:
    """Every frame of the split, by its number in the release, which counts from 1, and with its class.

    Args:
        scenes: of all frames, in the release's order.
        splits: the numbers in each.
        named: where ``splits`` stand, for messages.

    Raises:
        DataError: a number without a frame, or one that is named twice.
    """
    seen: set[int] = set()
    for split, numbers in splits.items():
        for number in numbers:
            if not 1 <= number <= len(scenes):
                raise DataError(f"{named} names image {number} for {split}, and there are images 1 to {len(scenes)}")
            if number in seen:
                raise DataError(f"{named} names image {number} twice, at last for {split}")
            seen.add(number)
    return [
        Frame(str(number), f"{split}/{scene_class(scenes[number - 1])}/{number:04d}.png")
        for split, numbers in splits.items()
        for number in numbers
    ]


def encode(
    rgb: NDArray[np.uint8], metres: NDArray[np.float64], missing: NDArray[np.bool_] | None, depth: str, crop: bool
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """A frame's RGB and its encoded depth, uint8 ``[H, W, 3]`` each.

    Args:
        rgb: ``[480, 640, 3]``.
        metres: ``[480, 640]``.
        missing: bool ``[480, 640]``, the depths that were inpainted, where that is known; see ``hha``.
        depth: "hha" or "grey".
        crop: whether to cut off the white border.

    Raises:
        DataError: arrays that are not of this shape or type.
        ValueError: a depth that cannot be encoded; see ``hha``.
    """
    if rgb.dtype != np.uint8 or rgb.shape != (*SHAPE, 3) or metres.shape != SHAPE:
        raise DataError(
            f"image is {rgb.dtype} {rgb.shape} and depth {metres.shape}, height by width; they must be {SHAPE}"
        )
    rows, columns = CROP if crop else (slice(None), slice(None))
    rgb, metres = np.ascontiguousarray(rgb[rows, columns]), metres[rows, columns]
    if depth == "grey":
        return rgb, grey(metres)
    camera = CAMERA.copy()
    camera[:2, 2] -= (columns.start or 0, rows.start or 0)
    return rgb, hha(metres, camera, missing=None if missing is None else missing[rows, columns])
