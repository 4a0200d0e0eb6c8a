"""SUN RGB-D's own release to the trainers' layout.

A frame of the release is a folder of ``image/*.jpg``, ``depth_bfx/*.png`` (16 bits, rotated right by 3 to give
millimetres), ``intrinsics.txt``, ``extrinsics/*.txt`` and ``scene.txt``. Song, Lichtenberg and Xiao, *SUN RGB-D* (CVPR
2015); the split is ``SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat``.
"""

import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..data.catalogue import SUNRGBD_SCENES
from ..data.decoding import read_values
from ..data.faults import DataError, Fault
from ..data.stratified_split import stratified_split
from .frames import Frame
from .hha import grey, hha
from .matlab_files import read_mat

SPLIT_FILE = Path("SUNRGBDtoolbox/traintestSUNRGBD/allsplit.mat")
MAX_DEPTH = 8.0
"""Metres at which the release's own toolbox cuts off."""
PUBLISHED_SHARE = (4845 / 9504, 4659 / 9504)
"""Training and test share of the 19 scenes' images in the published split."""


@dataclass(frozen=True)
class SunPlan:
    """Frames to convert, those of other scenes by scene, what cannot be placed, and where the split is from."""

    frames: list[Frame]
    other_scenes: Counter[str]
    unsplit: int
    faults: list[Fault]
    split_source: str
    published: bool


def plan_sunrgbd(raw: Path, splits: Path | None = None, seed: int = 0) -> SunPlan:
    """Find the frames of the 19 scenes under ``raw`` and their places in the published split.

    Args:
        raw: the release's folder, or one above it.
        splits: allsplit.mat; looked for in and beside ``raw`` where None. Where there is none, a stratified split of
            the published shares is drawn.
        seed: of that split.

    Raises:
        DataError: no frame there, or a split file that cannot be read or names none of the frames.
    """
    if not raw.is_dir():
        raise DataError(f"--raw: no folder {raw}")
    scenes: dict[str, str] = {}
    others: Counter[str] = Counter()
    faults: list[Fault] = []
    for folder in frame_folders(raw):
        name = folder.relative_to(raw).as_posix()
        try:
            scene = (folder / "scene.txt").read_text(encoding="utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            faults.append(Fault(name, f"scene.txt cannot be read ({error})"))
            continue
        if scene in SUNRGBD_SCENES:
            scenes[name] = scene
        else:
            others[scene[:60]] += 1
    if not scenes and not others and not faults:
        raise DataError(f"--raw: no frame under {raw}, a folder with image, depth_bfx and scene.txt")
    published = splits or next((p for p in (raw / SPLIT_FILE, raw.parent / SPLIT_FILE) if p.is_file()), None)
    if published is not None:
        split = published_split(published)
        placed = {name: split[key] for name in scenes if (key := split_key(raw / name)) in split}
        if scenes and not placed:
            raise DataError(f"{published} names none of the {len(scenes)} frames under {raw}")
        source = str(published)
    else:
        names = sorted(scenes)
        train, test = stratified_split([scenes[name] for name in names], PUBLISHED_SHARE, seed)
        placed = {names[i]: "train" for i in train} | {names[i]: "test" for i in test}
        source = f"drawn with seed {seed}: no {SPLIT_FILE} in or beside {raw}"
    frames = [Frame(name, f"{placed[name]}/{scenes[name]}/{name.replace('/', '__')}.png") for name in sorted(placed)]
    return SunPlan(frames, others, len(scenes) - len(placed), faults, source, published is not None)


def frame_folders(raw: Path) -> Iterator[Path]:
    """Every folder under ``raw`` that has a scene.txt, in order; links are not followed."""
    for folder, below, files in os.walk(raw):
        below.sort()
        if "scene.txt" in files:
            below.clear()
            yield Path(folder)


def split_key(folder: str | Path) -> str:
    """What names a frame in the split file and on disk alike: its path below the release's folder SUNRGBD.

    Example:
        >>> split_key("/n/fs/sun3d/data/SUNRGBD/kv1/NYUdata/NYU0001/")
        'kv1/NYUdata/NYU0001'
    """
    parts = Path(folder).absolute().parts if isinstance(folder, Path) else Path(folder).parts
    places = [i for i, part in enumerate(parts) if part == "SUNRGBD"]
    if places:
        return "/".join(parts[places[-1] + 1 :])
    sensors = [i for i, part in enumerate(parts) if part in ("kv1", "kv2", "realsense", "xtion")]
    return "/".join(parts[sensors[-1] :] if sensors else parts[-1:])


def published_split(file: Path) -> dict[str, str]:
    """From a frame's ``split_key`` to "train" or "test", of the release's allsplit.mat.

    Raises:
        DataError: it cannot be read, or has no ``alltrain`` and ``alltest``.
    """
    content = read_mat(file, ("alltrain", "alltest"), "--splits")
    return {
        split_key(str(folder)): part
        for part, name in (("train", "alltrain"), ("test", "alltest"))
        for folder in np.atleast_1d(content[name]).tolist()
    }


def sunrgbd_converter(raw: Path, depth: str, gravity: str) -> "partial[tuple[NDArray[np.uint8], NDArray[np.uint8]]]":
    """The ``Converter`` of frames under ``raw``: ``depth`` "hha" or "grey", ``gravity`` "estimate" or "extrinsics"."""
    return partial(convert_frame, raw, depth, gravity)


def convert_frame(raw: Path, depth: str, gravity: str, name: str) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """One frame's RGB and depth image, uint8 ``[H, W, 3]`` each.

    Raises:
        DataError: a part of it is missing, cannot be read or does not fit the others.
    """
    folder = raw / name
    rgb = np.asarray(read_values(_only_file(folder / "image")).convert("RGB"))
    metres = decode_depth(np.asarray(read_values(_only_file(folder / "depth_bfx"))))
    if metres.shape != rgb.shape[:2]:
        raise DataError(f"image is {rgb.shape[:2]} and depth_bfx {metres.shape}, height by width")
    try:
        if depth == "grey":
            return rgb, grey(metres)
        camera = read_matrix(folder / "intrinsics.txt", 3)
        down = read_matrix(_only_file(folder / "extrinsics"), 3)[1] if gravity == "extrinsics" else None
        return rgb, hha(metres, camera, gravity=down)
    except ValueError as error:
        raise DataError(str(error)) from error


def decode_depth(stored: NDArray[np.generic]) -> NDArray[np.float64]:
    """Metres, cut off at 8, from the release's 16-bit pixels: their bits rotated right by 3 are millimetres.

    Raises:
        DataError: pixels that are not one channel of 16 bits.

    Example:
        >>> decode_depth(np.array([[16000, 0, 1]], dtype=np.uint16)).tolist()  # 16000 = 2000 << 3
        [[2.0, 0.0, 8.0]]
    """
    if stored.ndim != 2 or stored.dtype not in (np.uint16, np.int32):
        raise DataError(f"depth must be one channel of 16 bits, got {stored.dtype} of the shape {stored.shape}")
    bits = stored.astype(np.uint16)
    millimetres = (bits >> np.uint16(3)) | (bits << np.uint16(13))
    return np.minimum(millimetres / 1000.0, MAX_DEPTH)


def read_matrix(file: Path, columns: int) -> NDArray[np.float64]:
    """The first ``columns`` columns of a text file's numbers, three rows.

    Raises:
        DataError: it cannot be read, or holds something else.
    """
    try:
        numbers = np.array(file.read_text(encoding="utf-8").split(), dtype=np.float64)
        matrix = numbers.reshape(3, -1)[:, :columns]
    except (OSError, ValueError) as error:
        raise DataError(f"{file.name} cannot be read ({error})") from error
    if matrix.shape != (3, columns) or not np.isfinite(matrix).all():
        raise DataError(f"{file.name} must hold 3 rows of at least {columns} numbers, got {numbers.size} numbers")
    return matrix


def _only_file(folder: Path) -> Path:
    """The one file in it; of several, the last by name, as dated calibrations are."""
    try:
        files = sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    except OSError as error:
        raise DataError(f"no folder {folder.name}") from error
    if not files:
        raise DataError(f"no file in {folder.name}")
    return files[-1]
