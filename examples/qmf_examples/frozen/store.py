"""Features on disk: a folder for each thing that they depend on, in it a file for every so many rows."""

import hashlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..files import write_atomically

ROWS = 128
"""Of a file: what a killed command computes again, at most."""
DIGEST = hashlib.blake2b().digest_size


class Store:
    """The features of one modality of one split, ``[rows, width]`` for each copy.

    A file holds the digest of its numbers, then the numbers: one that was cut off or has changed since counts as not
    there.

    Args:
        folder: of this store alone; its name is a digest of what the features depend on.
        rows: how many samples there are.
        width: features of a sample.
    """

    def __init__(self, folder: Path, rows: int, width: int) -> None:
        self.folder, self.rows, self.width = folder, rows, width

    @property
    def parts(self) -> range:
        return range(-(-self.rows // ROWS))

    def rows_of(self, part: int) -> range:
        return range(part * ROWS, min(self.rows, (part + 1) * ROWS))

    def read(self, copy: str, part: int) -> Tensor | None:
        """``[rows of the part, width]``; None where they are not there."""
        try:
            content = self._file(copy, part).read_bytes()
        except FileNotFoundError:
            return None
        digest, numbers = content[:DIGEST], content[DIGEST:]
        shape = (len(self.rows_of(part)), self.width)
        if len(numbers) != 4 * shape[0] * shape[1] or digest != hashlib.blake2b(numbers).digest():
            return None
        return torch.from_numpy(np.frombuffer(numbers, "<f4").reshape(shape).astype(np.float32))

    def write(self, copy: str, part: int, features: Tensor) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        numbers = features.numpy().astype("<f4").tobytes()
        content = hashlib.blake2b(numbers).digest() + numbers
        write_atomically(self._file(copy, part), lambda file: file.write(content))

    def _file(self, copy: str, part: int) -> Path:
        return self.folder / f"{copy}-{part:06d}.features"
