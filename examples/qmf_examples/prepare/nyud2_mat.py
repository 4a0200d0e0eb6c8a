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

from ..data.faults import DataError
from .frames import Frame
from .matlab_files import read_mat
from .nyud2 import encode, plan


def plan_mat(mat: Path, splits: Path) -> list[Frame]:
    """Every image of the split, with its class.

    Raises:
        DataError: a file that is missing or cannot be read, or that lacks a variable; an index that is not in the file.
    """
    file = open_hdf5(mat)
    count = _dataset(file, mat, "images").shape[0]
    scenes = read_scenes(file, mat)
    if len(scenes) != count:
        raise DataError(f"--mat: {mat} holds {count} images and {len(scenes)} scenes")
    return plan(scenes, read_splits(splits), f"--splits: {splits}")


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
        DataError: it cannot be read, or lacks one of them.
    """
    content = read_mat(splits, ("trainNdxs", "testNdxs"), "--splits")
    try:
        return {
            split: [_whole(number) for number in np.asarray(content[name]).ravel()]
            for split, name in (("train", "trainNdxs"), ("test", "testNdxs"))
        }
    except (TypeError, ValueError, OverflowError) as error:
        raise DataError(f"--splits: {splits} must hold numbers ({error})") from error


def _whole(number: Any) -> int:
    if isinstance(number, complex) or int(number) != number:
        raise ValueError(f"{number} is not whole")
    return int(number)


def mat_converter(mat: Path, depth: str, crop: bool) -> "partial[tuple[NDArray[np.uint8], NDArray[np.uint8]]]":
    """The ``Converter`` of images of ``mat``; ``depth`` is "hha" or "grey"."""
    return partial(convert_image, mat, depth, crop)


def convert_image(mat: Path, depth: str, crop: bool, number: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """The RGB and the depth image of the 1-based ``number``, uint8 ``[H, W, 3]`` each.

    Raises:
        DataError: it cannot be read, or its parts do not fit.
    """
    file, i = open_hdf5(mat), int(number) - 1
    try:
        rgb = np.asarray(_dataset(file, mat, "images")[i]).transpose(2, 1, 0)
        metres = np.asarray(_dataset(file, mat, "depths")[i], dtype=np.float64).T
        missing = ~(np.asarray(file["rawDepths"][i]).T > 0) if "rawDepths" in file else None
        return encode(rgb, metres, missing, depth, crop)
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise DataError(f"cannot be used ({error})") from error
