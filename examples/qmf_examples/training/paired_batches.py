"""NYUD2 and SUN RGB-D: how images become tensors, and which networks each method is made of."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from torchvision.transforms import v2

from ..data.catalogue import DATA_SETS
from ..data.paired_images import PairedImages, check_every_class
from ..data.stratified_split import stratified_split
from ..errors import CommandError
from ..models.image_encoders import ImageEncoder
from ..models.learners import (
    Head,
    Joint,
    LateFusion,
    Learner,
    MMTMFusion,
    QualityAware,
    RankedAverage,
    Trusted,
    classifier,
    make_fusion,
    objective_options,
)
from .settings import Settings

NAMES = ("rgb", "depth")
ALIGNMENT = 1.0
"""What the cosine distance of the two features counts in the alignment baseline."""


def build_learner(settings: Settings, num_classes: int, num_samples: int, pretrained: bool = True) -> Learner:
    """The method's networks, with pretrained weights where they matter.

    Args:
        settings: of the run.
        num_classes: K.
        num_samples: N, of the whole training split: indices run over it.
        pretrained: False where a checkpoint will replace the weights.
    """
    method = settings.method
    weights = settings.weights if pretrained else "none"

    def encoder() -> ImageEncoder:
        return ImageEncoder(settings.backbone, weights, settings.regions)

    def head(width: int) -> torch.nn.Module:
        return classifier(width, num_classes, settings.hidden, settings.dropout)

    if method in NAMES:
        alone = encoder()
        return Joint({method: alone}, head(alone.width))
    rgb, depth = encoder(), encoder()
    if method in ("concat", "align"):
        return Joint({"rgb": rgb, "depth": depth}, head(2 * rgb.width), ALIGNMENT if method == "align" else 0.0)
    if method == "mmtm":
        return MMTMFusion(rgb, depth, NAMES, [head(rgb.width), head(depth.width)])
    heads = {"rgb": Head(rgb, head(rgb.width)), "depth": Head(depth, head(depth.width))}
    if method == "late":
        return LateFusion(heads)
    if method in ("tmc", "etmc"):
        return Trusted(heads, head(2 * rgb.width) if method == "etmc" else None)
    fusion = make_fusion(method, NAMES, num_classes, settings.detach_weights)
    objective = objective_options(method, settings.ranking_weight, settings.form, settings.pairs)
    fused = RankedAverage if method == "ranking-only" else QualityAware
    return fused(heads, num_samples, objective, fusion)


@dataclass(frozen=True)
class RGBDData:
    """The training and the selection samples, as tensors, and what the model must know of them."""

    train: Dataset[Any]
    select: Dataset[Any]
    num_classes: int
    num_samples: int
    classes: tuple[str, ...]
    faults: int


def load_training(settings: Settings) -> RGBDData:
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
    as_tested = v2.Resize((settings.image_size, settings.image_size))
    if settings.selection == "test":
        select: Dataset[Any] = PairedImages(
            known, root, "test", transform=as_tested, finish=_to_tensors(settings), skip_bad=settings.skip_bad
        )
        train: Dataset[Any] = images
    else:
        same = copy.copy(images)
        same.transform = as_tested
        rest, held = stratified_split(images.labels, (1 - settings.validation, settings.validation), seed=0)
        if not held or not rest:
            raise CommandError(
                f"--validation {settings.validation}: must hold out at least one sample of a class and leave one, got "
                f"{len(held)} of {len(images)}"
            )
        train, select = torch.utils.data.Subset(images, rest), torch.utils.data.Subset(same, held)
    return RGBDData(train, select, len(images.classes), len(images), tuple(images.classes), len(images.faults))


def load_images(settings: Settings) -> PairedImages:
    """The whole training split, with random crops and flips, the same for both images of a pair."""
    return PairedImages(
        DATA_SETS[settings.data_set],
        Path(settings.data_root),
        "train",
        transform=v2.Compose(
            [
                v2.Resize((settings.load_size, settings.load_size)),
                v2.RandomCrop(settings.image_size),
                v2.RandomHorizontalFlip(),
            ]
        ),
        finish=_to_tensors(settings),
        skip_bad=settings.skip_bad,
    )


def load_test(settings: Settings, corrupt: Any = None) -> PairedImages:
    """The test split; ``corrupt`` acts after resizing and before normalising, as in the released code."""
    return PairedImages(
        DATA_SETS[settings.data_set],
        Path(settings.data_root),
        "test",
        transform=v2.Resize((settings.image_size, settings.image_size)),
        corrupt=corrupt,
        finish=_to_tensors(settings),
        skip_bad=settings.skip_bad,
    )


def _to_tensors(settings: Settings) -> v2.Compose:
    known = DATA_SETS[settings.data_set]
    return v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(known.mean, known.std)])


def collate(samples: list[Any]) -> dict[str, Any]:
    """A batch: ``inputs`` by modality, ``label`` and ``index`` ``[B]``."""
    return {
        "inputs": {name: torch.stack([sample[name] for sample in samples]) for name in NAMES},
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
