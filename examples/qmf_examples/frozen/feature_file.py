"""The features of a data set as one ``.npz`` file, which ``bench-robustness`` and ``report`` read."""

import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..corruption.every_row import Damage
from ..data.catalogue import DATA_SETS
from ..errors import CommandError
from ..files import write_atomically
from ..training.settings import Settings
from .encode import Say, encode_split
from .encoders import load_encoders
from .samples import corruptions_of, open_split

Arrays = Iterator[tuple[str, NDArray[Any]]]


def write_feature_file(
    settings: Settings,
    damages: Sequence[Damage],
    copies: int,
    path: Path,
    cache: Path,
    say: Say = lambda line: None,
    device: str = "cpu",
) -> None:
    """Compute the features of the training and the test split into ``path``, by way of ``cache``.

    The keys are ``classes``, ``train_y``, ``test_y``, ``train_<modality>_clean``, ``train_<modality>_copy1`` and so on,
    ``test_<modality>_clean`` and ``test_<modality>_<damage>``. A modality has no key of a copy or a damage that leaves
    it as it is. No more than one damage's features are in memory at a time, and the same data give the same bytes.

    Args:
        settings: of the data and the encoders.
        damages: of the test split.
        copies: how many augmented copies of the training split, beside the clean one.
        path: of the file.
        cache: see ``encode_split``.
        say: told of progress.
        device: where the encoders run.

    Raises:
        CommandError: a damage of texts where there are none; see ``encode_split``.
        DataError: data that cannot be used.
    """
    for damage in damages:
        if not any(_touched(settings, damage).values()):
            raise CommandError(f"--damage {damage.name}: {settings.data_set} has no texts, which it damages")
    # Everything is in the cache before the file is begun, of which a kill would leave a part.
    for _ in _arrays(settings, damages, copies, cache, say, device):
        pass
    write_atomically(path, lambda file: _write(file, _arrays(settings, damages, copies, cache, say, device)))


def _arrays(settings: Settings, damages: Sequence[Damage], copies: int, cache: Path, say: Say, device: str) -> Arrays:
    encoders = load_encoders(settings)
    numbering = encoders["text"].numbering if "text" in encoders else None
    for split in ("train", "test"):
        samples = open_split(settings, split, numbering, check=settings.skip_bad)
        if split == "train":
            yield "classes", np.array(samples.classes)
        yield f"{split}_y", np.array(samples.labels, dtype=np.int64)
        augmented = copies if split == "train" else 0
        found = encode_split(settings, split, cache, None, 1 + augmented, say, device)
        for name, features in found.items():
            # A text is the same in every copy.
            for copy in range(1 + (augmented if name != "text" else 0)):
                yield f"{split}_{name}_{f'copy{copy}' if copy else 'clean'}", features[copy].numpy()
    for damage in damages:
        found = encode_split(settings, "test", cache, damage, 1, say, device)
        for name, touched in _touched(settings, damage).items():
            if touched:
                yield f"test_{name}_{damage.name}", found[name][0].numpy()


def _touched(settings: Settings, damage: Damage) -> dict[str, bool]:
    """Whether a damage changes each modality."""
    image, text = corruptions_of(settings, damage)
    modalities = DATA_SETS[settings.data_set].modalities
    return {name: (text if name == "text" else image) is not None for name in modalities}


def _write(file: Any, arrays: Arrays) -> None:
    """As ``np.savez``, which wants all arrays at once and stamps them with the time."""
    with zipfile.ZipFile(file, "w") as archive:
        for key, array in arrays:
            with archive.open(zipfile.ZipInfo(f"{key}.npy"), "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
