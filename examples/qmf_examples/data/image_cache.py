"""Decoded and resized images, kept in one file that is mapped into memory: the first epoch decodes them for all others.

What is kept is what decoding and resizing give, bit for bit; crops, flips, damage and normalisation happen after it, so
that batches are the same with the cache and without. A file's name is a digest of all that its images come from: the
data folder, each image file's name, size and time of change, how it is resized, and the versions of the libraries that
do it. Whatever of these changes, another file is made. It is written beside its place and renamed into it, so that it
is there whole or not at all, by one process, while others that want the same wait for it.
"""

import hashlib
import json
import mmap
import os
import shutil
import struct
import time
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import PIL
import PIL.features
import torch
import torchvision
from PIL import Image
from torch import Tensor

from ..files import held, write_atomically
from .faults import DataError, file_inside
from .pixels import to_pixels
from .progress import progress_bar

LARGEST = 32 * 2**30
"""Bytes that a cache folder may hold: FOOD101 whole takes 22 GB."""
AT_ONCE = 256
"""Images that are decoded before the next are begun: what is held in memory."""
SUFFIX = ".images"
_MAGIC = b"qmf images 1\n"
_END = struct.Struct("<QI")
"""Where the index begins, and the checksum of all before this."""
ABANDONED = 3600.0
"""Seconds for which nothing was written to an unfinished file of a killed process, before it is deleted."""
_verified: set[tuple[str, int, int]] = set()

Size = tuple[int, int]
Decode = Callable[[str], tuple[Size, Sequence[Image.Image]]]
"""Of a file's name, its width and height and the one or more RGB images made of it; raises ``DataError``."""


def default_folder() -> Path:
    """Where caches lie if nothing is said: ``qmf-fusion/images`` in the user's folder for caches."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "qmf-fusion" / "images"


class KeptImages:
    """A cache file, read only.

    Attributes:
        path: of the file.
        results: of each image file, its width and height, or why it cannot be used.
    """

    def __init__(self, path: Path, index: dict[str, Any]) -> None:
        self.path, self._index = path, index
        self.results: dict[str, Size | str] = {
            name: row if isinstance(row, str) else (row[0], row[1]) for name, row in index.items()
        }
        self._pixels = _mapped(path)

    def get(self, name: str) -> list[Tensor] | None:
        """The images made of that file, uint8 ``[3, H, W]`` each, in memory that must not be written to; None where
        the file is not among those kept.
        """
        row = self._index.get(name)
        if row is None or isinstance(row, str):
            return None
        images, start = [], row[2]
        for height, width in row[3]:
            images.append(self._pixels[start : start + 3 * height * width].view(3, height, width))
            start += 3 * height * width
        return images

    def of(self, names: Sequence[str]) -> list[Size | str]:
        """``results``, in the order of ``names``."""
        return [self.results[name] for name in names]

    def __getstate__(self) -> dict[str, Any]:
        # A loader's process that is not forked maps the file anew, rather than be sent gigabytes.
        return {**self.__dict__, "_pixels": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pixels = _mapped(self.path)


def _mapped(path: Path) -> Tensor:
    with warnings.catch_warnings():
        # PyTorch warns that nothing may be written there, as is meant.
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.memmap(path, np.uint8, "r"))


@dataclass(frozen=True)
class ImageCache:
    """Where images are kept.

    Args:
        folder: for the files; it is made.
        say: told in a line what is kept where, or why nothing is.
    """

    folder: Path
    say: Callable[[str], object] = lambda _: None

    def keep(self, root: Path, names: Sequence[str], how: str, decode: Decode) -> KeptImages | None:
        """The images of ``names``, from the cache, or else decoded now, in threads.

        Args:
            root: the data folder.
            names: of files, relative to it.
            how: all that ``decode`` does, in words: another text is another cache.
            decode: makes what is kept of a file.

        Returns:
            None where they cannot be kept, which ``say`` is told: the bound, a full disk, a folder that may only be
            read. Without a cache, images are decoded whenever they are asked for.
        """
        names = list(dict.fromkeys(names))
        path = self.folder / f"{_digest(root, names, how)}{SUFFIX}"
        try:
            index = _read_index(path, self.say)
            if index is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                with held(path.with_suffix(".lock"), "another process keeps the same images", self.say):
                    index = _read_index(path, self.say)  # which another process may have made meanwhile
                    if index is None:
                        index = self._build(path, names, decode)
            return KeptImages(path, index)
        except (OSError, _TooLargeError) as error:
            reason = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) else str(error)
            self.say(f"images are decoded anew in every epoch, as they cannot be kept: {reason}")
            return None

    def _build(self, path: Path, names: Sequence[str], decode: Decode) -> dict[str, Any]:
        for part in self.folder.glob(f"*{SUFFIX}.*.part"):
            with suppress(OSError):
                if time.time() - part.stat().st_mtime > ABANDONED:
                    part.unlink()
        self.say(f"keeping {len(names):,} images, decoded and resized, in {self.folder} (--cache off keeps none)")
        room = _Room(self.folder, len(names))
        index: dict[str, Any] = {}

        def write(file: BinaryIO) -> None:
            checked = _Checked(file)
            checked.write(_MAGIC)
            with progress_bar("decoding", len(names)) as done:
                for name, result in _decoded(names, decode):
                    if isinstance(result, str):
                        index[name] = result
                    else:
                        size, images = result
                        index[name] = [*size, checked.written, [image.shape[1:] for image in images]]
                        for image in images:
                            checked.write(image.tobytes())
                    done()
                    if len(index) % AT_ONCE == 0:
                        room.check(checked.written, len(index))
            room.check(checked.written, len(names))
            start = checked.written
            checked.write(json.dumps(index).encode())
            file.write(_END.pack(start, checked.checksum))

        write_atomically(path, write)
        status = path.stat()
        _verified.add((str(path), status.st_ino, status.st_mtime_ns))
        return index


class _TooLargeError(Exception):
    """More bytes than there is room for."""


class _Room:
    """What a cache folder may yet hold."""

    def __init__(self, folder: Path, images: int) -> None:
        self.folder, self.images = folder, images
        used = sum(entry.stat().st_size for entry in os.scandir(folder) if entry.is_file())
        self.bound, self.free = LARGEST - used, shutil.disk_usage(folder).free

    def check(self, written: int, done: int) -> None:
        """Whether all images will find room, if they are as large as those done so far.

        Raises:
            _TooLargeError: they will not.
        """
        expected = written * self.images // max(done, 1)
        size = f"{expected / 1e9:.1f} GB for {self.images:,} images"
        if expected > self.bound:
            raise _TooLargeError(
                f"{size} would take {self.folder} above its bound of {LARGEST / 1e9:.1f} GB: delete what is not needed "
                "there, or give another folder with --cache DIR"
            )
        if expected > self.free:
            raise _TooLargeError(f"{size} is more than the {self.free / 1e9:.1f} GB that are free in {self.folder}")


class _Checked:
    """A file that counts and sums up what is written to it."""

    def __init__(self, file: BinaryIO) -> None:
        self.file, self.written, self.checksum = file, 0, 0

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.written += len(data)
        self.checksum = zlib.crc32(data, self.checksum)


def _decoded(names: Sequence[str], decode: Decode) -> Iterator[tuple[str, str | tuple[Size, list[np.ndarray]]]]:
    def pixels(name: str) -> str | tuple[Size, list[np.ndarray]]:
        try:
            size, images = decode(name)
        except DataError as error:
            if isinstance(error.__cause__, OSError) and error.__cause__.errno is not None:
                # What the system refuses now, a right to read or another open file, it may grant the next time, with
                # nothing of the file changed that its name in the cache tells.
                raise error.__cause__ from error
            return str(error)
        return size, [np.ascontiguousarray(to_pixels(image).numpy()) for image in images]

    # Decoding leaves Python's lock, so threads share the work over the cores.
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        for start in range(0, len(names), AT_ONCE):
            some = names[start : start + AT_ONCE]
            yield from zip(some, pool.map(pixels, some), strict=True)


def _digest(root: Path, names: Sequence[str], how: str) -> str:
    versions = [PIL.__version__, PIL.features.version("jpg"), torchvision.__version__]
    digest = hashlib.sha256(json.dumps([str(root.resolve()), how, *versions]).encode())
    for name in names:
        try:
            status = file_inside(root, name).stat()
            state: list[Any] = [name, status.st_size, status.st_mtime_ns]
        except (DataError, OSError) as error:
            state = [name, str(error)]
        digest.update(json.dumps(state).encode() + b"\n")
    return digest.hexdigest()[:32]


def _read_index(path: Path, say: Callable[[str], object]) -> dict[str, Any] | None:
    """The index of a cache file that is there and whole; None where it has to be made."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    known = (str(path), status.st_ino, status.st_mtime_ns)
    try:
        with path.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
        start, checksum = _END.unpack(content[-_END.size :])
        body = content[: -_END.size]
        if known not in _verified and (body[: len(_MAGIC)] != _MAGIC or zlib.crc32(body) != checksum):
            raise ValueError
        index: dict[str, Any] = json.loads(bytes(body[start:]))
    except (ValueError, struct.error):
        say(f"{path} is damaged, and made anew")
        return None
    _verified.add(known)
    return index
