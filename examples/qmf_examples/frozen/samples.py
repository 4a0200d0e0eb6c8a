"""The samples that frozen encoders look at: one split, damaged or augmented, and what tells it from another."""

import copy
import hashlib
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torchvision.transforms import v2

from ..corruption.every_row import Damage
from ..data.catalogue import DATA_SETS
from ..data.faults import file_inside
from ..errors import CommandError
from ..models.text_encoders import Numbering
from ..training import paired_batches, text_batches
from ..training.image_preparation import as_tested, resize, transform_of
from ..training.settings import Settings

GREY = "a grey image"
"""In the place of a file's digest, where a row has no image."""
_digests: dict[tuple[str, int, int], str] = {}
"""By path, size and time of the last change: of files that this process has read already."""


def open_split(settings: Settings, split: str, numbering: Numbering | None, check: bool) -> Any:
    """The split's samples, without augmentation.

    Args:
        settings: of the run; which method is not looked at.
        split: "train", "test", or of texts "dev".
        numbering: of texts.
        check: whether to read every image now; without it a bad one raises when its turn comes.

    Raises:
        DataError: data that cannot be used.
        CommandError: a split that the data set does not have.
    """
    known = DATA_SETS[settings.data_set]
    if split not in known.splits:
        raise CommandError(f"split must be one of {', '.join(known.splits)}, got {split!r}")
    if known.paired:
        if split == "test":
            return paired_batches.load_test(settings, check=check)
        pairs = paired_batches.load_images(settings, check)
        pairs.transform = as_tested(settings)
        return pairs
    assert numbering is not None
    texts = text_batches.load_texts(replace(settings, method="late"), split, numbering, check)
    # Tokenizers are not for several threads at once, which the images are read by.
    texts.text_transform = None
    return texts


def damaged(samples: Any, settings: Settings, damage: Damage) -> Any:
    """The same samples under a damage.

    Raises:
        CommandError: see ``corruptions_of``.
    """
    made = copy.copy(samples)
    made.corrupt, on_texts = corruptions_of(settings, damage)
    if not DATA_SETS[settings.data_set].paired:
        made.corrupt_text = on_texts
    return made


def corruptions_of(settings: Settings, damage: Damage) -> tuple[Any, Any]:
    """Of images and of texts; None where the damage leaves them as they are.

    Raises:
        CommandError: a level that the damage does not have.
    """
    try:
        return damage.corruptions(settings.data_set, DATA_SETS[settings.data_set].paired)
    except ValueError as error:
        raise CommandError(f"{damage.name}: {error}") from error


def augmented(samples: Any, settings: Settings, number: int) -> Any:
    """The same samples, their images cut out and flipped at random; the same cut and flip for both images of a pair."""
    made = copy.copy(samples)
    made.transform = resize(transform_of(settings))
    made.corrupt = _CropAndFlip(settings.image_size, settings.seed, number)
    return made


@dataclass(frozen=True)
class _CropAndFlip:
    """Draws that depend on the seed, the copy and the row alone, whichever process or thread makes them."""

    size: int
    seed: int
    number: int

    def __call__(self, image: Image.Image, index: int, modality: str) -> Image.Image:
        rng = np.random.default_rng([self.seed, self.number, index])
        left, top = (int(rng.integers(max(0, side - self.size) + 1)) for side in image.size)
        made = image.crop((left, top, left + self.size, top + self.size))
        return v2.functional.horizontal_flip(made) if rng.random() < 0.5 else made


def digest_of_images(samples: Any) -> str:
    """Of what the files hold, row by row: the time of a change says nothing about a copy, and a copy is the same data.

    Raises:
        DataError: a file that is not there.
        CommandError: one that cannot be read.
    """
    names = samples.names if hasattr(samples, "names") else [row.img for row in samples.rows]
    digest = hashlib.blake2b()
    for name in names:
        digest.update(GREY.encode() if name is None else _of_file(file_inside(samples.root, name)).encode())
        digest.update(b"\n")
    return digest.hexdigest()


def _of_file(path: Path) -> str:
    try:
        found = os.stat(path)
        key = (str(path), found.st_size, found.st_mtime_ns)
        if key not in _digests:
            _digests[key] = hashlib.blake2b(path.read_bytes()).hexdigest()
        return _digests[key]
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror or error}") from error
