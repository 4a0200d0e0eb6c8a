"""How images are made ready for an encoder: as in the released code, or as its own configuration says."""

import difflib
import math
from dataclasses import dataclass
from typing import Any

from ..errors import CommandError

PUBLISHED = {name: f"{name}.tv_in1k" for name in ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")}
"""The ResNets of the paper, and timm's name of the weights it used, torchvision's first."""
RELEASED = (*PUBLISHED, "tiny")
"""Encoders whose images are made ready as in the released code, unless told otherwise."""


@dataclass(frozen=True)
class ImageTransform:
    """What is done to an image: resized, cut to a square, scaled to [0, 1] and normalised."""

    load_size: int
    """Pixels that it is resized to."""
    image_size: int
    """Pixels that are cut out of it."""
    squash: bool
    """Whether both sides become ``load_size``, or the shorter one."""
    interpolation: str
    mean: tuple[float, ...]
    std: tuple[float, ...]


def encoder_config(name: str) -> dict[str, Any]:
    """What timm says of a model's pretrained weights: ``input_size``, ``crop_pct``, ``classifier`` and more.

    Raises:
        CommandError: no such model, or weights of a tag that it does not have.
    """
    import timm
    from timm.models import get_pretrained_cfg

    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), 3)
        near = f" (is it {' or '.join(close)}?)" if close else ""
        raise CommandError(f"--image-encoder must be a model of timm, or tiny, got {name!r}{near}")
    try:
        config = get_pretrained_cfg(PUBLISHED.get(name, name), allow_unregistered=False)
    except RuntimeError as error:
        raise CommandError(f"--image-encoder {name}: {error}") from error
    return config.to_dict() if config is not None else {"input_size": (3, 224, 224)}


def encoder_transform(name: str) -> ImageTransform:
    """The transform of a model of timm, for evaluation.

    Raises:
        CommandError: there is none: no such model, or images that are no squares of three colours.

    Example:
        >>> made = encoder_transform("tf_efficientnet_lite0")
        >>> made.load_size, made.image_size, made.interpolation, made.mean
        (256, 224, 'bicubic', (0.5, 0.5, 0.5))
    """
    if name == "tiny":
        raise CommandError("--transform encoder: the tiny image encoder has no transform of its own")
    from timm.data.config import resolve_data_config

    config = resolve_data_config(pretrained_cfg=encoder_config(name))
    channels, height, width = config["input_size"]
    if channels != 3 or height != width or config["crop_mode"] not in ("center", "squash"):
        raise CommandError(
            f"--transform encoder: {name} takes {channels} x {height} x {width} values and the crop "
            f"{config['crop_mode']!r}; give --transform released"
        )
    return ImageTransform(
        math.floor(height / config["crop_pct"]),
        height,
        config["crop_mode"] == "squash",
        config["interpolation"],
        tuple(config["mean"]),
        tuple(config["std"]),
    )
