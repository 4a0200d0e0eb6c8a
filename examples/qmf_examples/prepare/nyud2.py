"""NYU Depth V2's labelled HDF5 file to the trainers' layout.

``nyu_depth_v2_labeled.mat`` (Silberman, Hoiem, Kohli and Fergus, ECCV 2012) is a MATLAB 7.3 file, thus HDF5 with every
array's dimensions reversed: ``images [N, 3, W, H]``, ``depths`` and ``rawDepths [N, W, H]`` in metres, ``sceneTypes``
``[1, N]`` of references to strings. ``splits.mat`` holds 1-based ``trainNdxs`` and ``testNdxs`` (795 and 654).
"""

from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.catalogue import NYUD2_COMMON
from ..data.faults import DataError
from .frames import Frame
from .hha import grey, hha
from .matlab_files import read_mat

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


def plan_nyud2(mat: Path, splits: Path) -> list[Frame]:
    """Every image of the split, with its class.

    Raises:
        DataError: a file that is missing or cannot be read, or that lacks a variable; an index that is not in the file.
    """
    file = open_hdf5(mat)
    count = _dataset(file, mat, "images").shape[0]
    scenes = read_scenes(file, mat)
    if len(scenes) != count:
        raise DataError(f"--mat: {mat} holds {count} images and {len(scenes)} scenes")
    frames = []
    for split, numbers in read_splits(splits).items():
        for number in numbers:
            if not 1 <= number <= count:
                raise DataError(f"--splits: {splits} names image {number}, and {mat} holds 1 to {count}")
            frames.append(Frame(str(number), f"{split}/{scene_class(scenes[number - 1])}/{number:04d}.png"))
    return frames


@cache
def open_hdf5(mat: Path) -> Any:
    """The file, opened once per process.

    Raises:
        DataError: it is not there, or no HDF5 file.
    """
    import h5py

    try:
        return h5py.File(mat, "r")
    except FileNotFoundError as error:
        raise DataError(f"--mat: no file {mat}") from error
    except OSError as error:
        reason = " ".join(str(error).split())  # HDF5's has several lines
        raise DataError(f"--mat: {mat} cannot be read as HDF5, a MATLAB 7.3 file ({reason})") from error


def _dataset(file: Any, mat: Path, name: str) -> Any:
    if name not in file:
        raise DataError(f"--mat: {mat} has no {name!r}; it must be nyu_depth_v2_labeled.mat")
    return file[name]


def read_scenes(file: Any, mat: Path) -> list[str]:
    """Each image's scene: ``sceneTypes``, or else ``scenes``, which number the places too."""
    name = "sceneTypes" if "sceneTypes" in file else "scenes"
    try:
        references = np.asarray(_dataset(file, mat, name)).ravel()
        return ["".join(map(chr, np.asarray(file[reference]).ravel().tolist())) for reference in references]
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise DataError(f"--mat: {name} of {mat} cannot be read as strings ({error})") from error


def read_splits(splits: Path) -> dict[str, list[int]]:
    """The 1-based numbers of the training and of the test images.

    Raises:
        DataError: it cannot be read, lacks one of them, or both name an image.
    """
    content = read_mat(splits, ("trainNdxs", "testNdxs"), "--splits")
    try:
        found = {
            split: [_whole(number) for number in np.asarray(content[name]).ravel()]
            for split, name in (("train", "trainNdxs"), ("test", "testNdxs"))
        }
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"--splits: {splits} must hold numbers ({error})") from error
    both = set(found["train"]) & set(found["test"])
    if both:
        raise DataError(f"--splits: {splits} has {len(both)} images in both splits, image {min(both)} for one")
    return found


def _whole(number: Any) -> int:
    if isinstance(number, complex) or int(number) != number:
        raise ValueError(f"{number} is not whole")
    return int(number)


def nyud2_converter(mat: Path, depth: str, crop: bool) -> "partial[tuple[NDArray[np.uint8], NDArray[np.uint8]]]":
    """The ``Converter`` of images of ``mat``; ``depth`` is "hha" or "grey"."""
    return partial(convert_image, mat, depth, crop)


def convert_image(mat: Path, depth: str, crop: bool, number: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The RGB and the depth image of the 1-based ``number``, uint8 ``[H, W, 3]`` each.

    Raises:
        DataError: it cannot be read, or its parts do not fit.
    """
    file, i = open_hdf5(mat), int(number) - 1
    rows, columns = CROP if crop else (slice(None), slice(None))
    try:
        rgb = np.asarray(_dataset(file, mat, "images")[i]).transpose(2, 1, 0)[rows, columns]
        metres = np.asarray(_dataset(file, mat, "depths")[i], dtype=np.float64).T[rows, columns]
        raw = np.asarray(file["rawDepths"][i]).T[rows, columns] if "rawDepths" in file else metres
        if rgb.dtype != np.uint8 or metres.shape != rgb.shape[:2] or 0 in rgb.shape:
            raise DataError(f"image is {rgb.dtype} {rgb.shape} and depth {metres.shape}, height by width")
        if depth == "grey":
            return np.ascontiguousarray(rgb), grey(metres)
        camera = CAMERA.copy()
        camera[:2, 2] -= (columns.start or 0, rows.start or 0)
        return np.ascontiguousarray(rgb), hha(metres, camera, missing=~(raw > 0))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"cannot be used ({error})") from error
