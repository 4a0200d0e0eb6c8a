"""NYUD2 and SUN RGB-D: how pairs of images become tensors and batches."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..data.catalogue import DATA_SETS
from ..data.class_checks import check_every_class
from ..data.paired_images import PairedImages, class_folders
from ..data.pixels import Normal, stack, to_pixels
from ..data.stratified_split import stratified_split
from ..errors import CommandError
from .image_preparation import as_tested, resize, transform_of
from .settings import Settings
from .training_data import TrainingData, fingerprint, image_cache

NAMES = ("rgb", "depth")


def load_training(settings: Settings, say: Callable[[str], object] = lambda _: None) -> TrainingData:
    """Read, check and split the data.

    With ``selection="held-out"``, a part of the training split is kept from training, class by class; with ``"test"``
    the epoch is chosen on the test split, as the released scripts do.

    Raises:
        DataError: data that cannot be used.
        CommandError: so few samples of every class that none is held out.
    """
    root = Path(settings.data_root)
    images = load_images(settings, say=say)
    check_every_class(images.classes, images.labels, root / "train")
    if settings.selection == "test":
        test = load_test(settings, say=say)
        train: Dataset[Any] = images
        select: Dataset[Any] = test
        rows = fingerprint(images.classes, _rows(images), _rows(test))
    else:
        rest, held = hold_out(settings, images.labels)
        same = copy.copy(images)
        same.transform, same.finish = as_tested(settings), _finish(settings)
        same.kept = same.keep(image_cache(settings, say), [images.names[index] for index in held])
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


def load_images(settings: Settings, check: bool = True, say: Callable[[str], object] = lambda _: None) -> PairedImages:
    """The whole training split, with random crops and flips, the same for both images of a pair."""
    augment = v2.Compose([v2.RandomCrop(settings.image_size), v2.RandomHorizontalFlip()])
    return _load(settings, "train", resize(transform_of(settings)), _finish(settings, augment), check, say)


def load_test(
    settings: Settings, numbering: None = None, check: bool = True, say: Callable[[str], object] = lambda _: None
) -> PairedImages:
    """The test split; its ``corrupt`` would act after resizing and before normalising, as in the released code."""
    return load_as_tested(settings, "test", check, say)


def load_as_tested(
    settings: Settings, split: str, check: bool = True, say: Callable[[str], object] = lambda _: None
) -> PairedImages:
    """A split without crops and flips."""
    return _load(settings, split, as_tested(settings), _finish(settings), check, say)


def _load(
    settings: Settings, split: str, transform: Any, finish: Any, check: bool, say: Callable[[str], object]
) -> PairedImages:
    return PairedImages(
        DATA_SETS[settings.data_set],
        Path(settings.data_root),
        split,
        transform=transform,
        finish=finish,
        cache=image_cache(settings, say),
        shrink=settings.transform == "released",
        resized=settings.load_size,
        skip_bad=settings.skip_bad,
        check=check,
    )


def _finish(settings: Settings, augment: Any = None) -> Any:
    made = transform_of(settings)
    return partial(_to_normal, augment=augment, mean=made.mean, std=made.std)


def _to_normal(rgb: Any, depth: Any, augment: Any, mean: Sequence[float], std: Sequence[float]) -> tuple[Normal, ...]:
    both = torch.stack((to_pixels(rgb), to_pixels(depth)))
    return tuple(Normal(pixels, mean, std) for pixels in (both if augment is None else augment(both)))


def collate(samples: list[Any]) -> dict[str, Any]:
    """A batch: ``inputs`` by modality, ``label`` and ``index`` ``[B]``."""
    return {
        "inputs": {name: stack([sample[name] for sample in samples]) for name in NAMES},
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
