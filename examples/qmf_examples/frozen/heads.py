"""Training heads on what frozen encoders see: features computed once, beside the runs, for all methods and seeds."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..data.catalogue import DATA_SETS
from ..data.class_checks import check_every_class
from ..data.paired_images import PairedImages
from ..data.text_images import TextImages
from ..errors import CommandError
from ..training.checkpoints import BEST, read_checkpoint
from ..training.feature_rows import FeatureRows
from ..training.paired_batches import hold_out
from ..training.run import Finished, train_run
from ..training.settings import Settings
from ..training.training_data import TrainingData, fingerprint
from .encode import encode_split
from .encoders import load_encoders

Say = Callable[[str], object]


def features_folder(run: Path) -> Path:
    """Where the features of a run lie: beside those of its data set, which all methods and seeds share."""
    return run.parent.parent / "features"


class Split(NamedTuple):
    """One split, encoded."""

    rows: dict[str, Tensor]
    """By modality, ``[copies, N, width]``."""
    labels: Tensor
    classes: tuple[str, ...]
    faults: int
    samples: tuple[Any, ...]
    """What each sample is, in plain values."""
    digest: str
    """Of the features."""
    encoders: str
    """A digest of their weights."""


_splits: dict[tuple[Any, ...], Split] = {}
MOST_SPLITS = 3
"""So many of the last splits stay in memory: a command trains many runs on the same ones."""


def load_split(settings: Settings, split: str, cache: Path, copies: int = 1, say: Say = print) -> Split:
    """The features and labels of a split, computed where neither memory nor the cache has them.

    Raises:
        DataError: data that cannot be used.
        CommandError: an encoder that cannot be had.
    """
    key = repr(replace(settings, method="", seed=0)), split, str(cache.absolute()), copies
    if key not in _splits:
        samples = read_samples(settings, split)
        found = encode_split(replace(settings, seed=0), split, cache, copies=copies, say=say)
        rows = {name: found[name] for name in DATA_SETS[settings.data_set].modalities}
        digest = hashlib.sha256()
        for name, x in rows.items():
            digest.update(f"{name} {list(x.shape)}".encode())
            digest.update(x.numpy().tobytes())
        encoders = fingerprint([name, encoder.digest] for name, encoder in load_encoders(settings).items())
        while len(_splits) >= MOST_SPLITS:
            del _splits[next(iter(_splits))]
        labels, classes, faults = torch.tensor(samples.labels), tuple(samples.classes), len(samples.faults)
        _splits[key] = Split(rows, labels, classes, faults, tuple(_plain(samples)), digest.hexdigest(), encoders)
    return _splits[key]


def read_samples(settings: Settings, split: str) -> Any:
    """The reader of a split, for its labels: images are looked at only where bad ones are to be left out, as whoever
    encodes them looks at each.
    """
    known = DATA_SETS[settings.data_set]
    options: dict[str, Any] = {"skip_bad": settings.skip_bad, "check": settings.skip_bad}
    made = PairedImages if known.paired else TextImages
    samples = made(known, Path(settings.data_root), split, resized=settings.load_size, **options)
    if split == "train":
        check_every_class(samples.classes, samples.labels, Path(settings.data_root) / "train")
        if isinstance(samples, PairedImages) and settings.selection != "test":
            hold_out(settings, samples.labels)  # before anything is encoded for nothing
    return samples


def _plain(samples: Any) -> list[tuple[Any, ...]]:
    if isinstance(samples, PairedImages):
        return list(zip(samples.names, samples.labels, strict=True))
    return [(row.id, row.label, row.text, row.img) for row in samples.rows]


def load_training(settings: Settings, cache: Path, say: Say = print) -> TrainingData:
    """Encode, or find, what to train on and what to choose the epoch by: held-out samples, dev or, with ``selection``,
    test.

    Raises:
        DataError: data that cannot be used.
        CommandError: an encoder that cannot be had; so few samples of every class that none is held out.
    """
    train = load_split(settings, "train", cache, 1 + settings.copies, say)
    everything, faults = range(len(train.labels)), train.faults
    if settings.selection == "test" or not DATA_SETS[settings.data_set].paired:
        other = load_split(settings, "test" if settings.selection == "test" else "dev", cache, say=say)
        places: Sequence[int] = everything
        select = FeatureRows(other.rows, other.labels, range(len(other.labels)), augmented=False)
        rows = fingerprint(train.classes, train.samples, other.samples, [train.digest, other.digest])
        faults += other.faults
    else:
        places, held = hold_out(settings, train.labels.tolist())
        select = FeatureRows(train.rows, train.labels, held, augmented=False)
        rows = fingerprint(train.classes, train.samples, places, held, [train.digest])
    seen = {name: x[0][torch.tensor(places)] for name, x in train.rows.items()}
    own = FeatureRows(train.rows, train.labels, places, augmented=True)
    return TrainingData(
        own, select, train.classes, len(everything), faults, rows, features=seen, encoders=train.encoders
    )


def check_encoders(folder: Path, settings: Settings, split: Split) -> None:
    """Whether a trained run's features were made by the encoders that made these.

    Raises:
        CommandError: they were not.
    """
    if read_checkpoint(folder / BEST).get("encoders") != split.encoders:
        raise CommandError(
            f"{folder} was trained on what other encoders see: {settings.image_encoder}, --weights {settings.weights} "
            "or the text encoder are no longer what they were"
        )


def train_frozen(settings: Settings, folder: Path, resume: bool = False, say: Say = lambda _: None) -> Finished:
    """As ``train_run``, heads on frozen encoders.

    Args:
        settings: of the run, with ``frozen``.
        folder: of the run: ``METHOD/seedN`` in the folder of all runs that share features.
        resume: see ``train_run``.
        say: told of progress.
    """
    return train_run(settings, folder, resume, say, partial(load_training, cache=features_folder(folder), say=say))
