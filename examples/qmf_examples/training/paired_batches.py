"""NYUD2 and SUN RGB-D: how pairs of images become tensors and batches."""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..data.catalogue import DATA_SETS
from ..data.class_checks import check_every_class
from ..data.paired_images import PairedImages, class_folders
from ..data.stratified_split import stratified_split
from ..errors import CommandError
from .image_preparation import as_tested, resize, to_tensors, transform_of
from .settings import Settings
from .training_data import TrainingData, fingerprint

NAMES = ("rgb", "depth")


def load_training(settings: Settings) -> TrainingData:
    """Read, check and split the data.

    With ``selection="held-out"``, a part of the training split is kept from training, class by class; with ``"test"``
    the epoch is chosen on the test split, as the released scripts do.

    Raises:
        DataError: data that cannot be used.
        CommandError: so few samples of every class that none is held out.
    """
    known, root = DATA_SETS[settings.data_set], Path(settings.data_root)
    images = load_images(settings)
    check_every_class(images.classes, images.labels, root / "train")
    if settings.selection == "test":
        test = PairedImages(known, root, "test", transform=as_tested(settings), **_common(settings))
        train: Dataset[Any] = images
        select: Dataset[Any] = test
        rows = fingerprint(images.classes, _rows(images), _rows(test))
    else:
        same = copy.copy(images)
        same.transform = as_tested(settings)
        rest, held = hold_out(settings, images.labels)
        train, select = torch.utils.data.Subset(images, rest), torch.utils.data.Subset(same, held)
        rows = fingerprint(images.classes, _rows(images), rest, held)
    return TrainingData(train, select, tuple(images.classes), len(images), len(images.faults), rows)


def hold_out(settings: Settings, labels: Sequence[int]) -> tuple[list[int], list[int]]:
    """Which samples are trained on, and which are kept from it to choose the epoch by.

    Raises:
        CommandError: so few of every class that none is kept, or none left.
    """
    rest, held = stratified_split(labels, (1 - settings.validation, settings.validation), seed=0)
    if not held or not rest:
        raise CommandError(
            f"--validation {settings.validation}: must hold out at least one sample of a class and leave one, got "
            f"{len(held)} of {len(labels)}"
        )
    return rest, held


def _rows(images: PairedImages) -> list[tuple[str, int]]:
    return list(zip(images.names, images.labels, strict=True))


def load_classes(settings: Settings) -> list[str]:
    """The names of the classes, in the order of their numbers."""
    return class_folders(DATA_SETS[settings.data_set], Path(settings.data_root))


def load_images(settings: Settings, check: bool = True) -> PairedImages:
    """The whole training split, with random crops and flips, the same for both images of a pair."""
    return PairedImages(
        DATA_SETS[settings.data_set],
        Path(settings.data_root),
        "train",
        transform=v2.Compose(
            [
                resize(transform_of(settings)),
                v2.RandomCrop(settings.image_size),
                v2.RandomHorizontalFlip(),
            ]
        ),
        check=check,
        **_common(settings),
    )


def load_test(settings: Settings, numbering: None = None, check: bool = True) -> PairedImages:
    """The test split; its ``corrupt`` would act after resizing and before normalising, as in the released code."""
    return PairedImages(
        DATA_SETS[settings.data_set],
        Path(settings.data_root),
        "test",
        transform=as_tested(settings),
        check=check,
        **_common(settings),
    )


def _common(settings: Settings) -> dict[str, Any]:
    return {
        "finish": v2.Compose(to_tensors(transform_of(settings))),
        "shrink": settings.transform == "released",
        "resized": settings.load_size,
        "skip_bad": settings.skip_bad,
    }


def collate(samples: list[Any]) -> dict[str, Any]:
    """A batch: ``inputs`` by modality, ``label`` and ``index`` ``[B]``."""
    return {
        "inputs": {name: torch.stack([sample[name] for sample in samples]) for name in NAMES},
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
