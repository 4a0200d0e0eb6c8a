"""Image encoders: torchvision's ResNets without their classifier, and where their weights come from."""

from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock

from ..errors import CommandError

BACKBONES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "tiny")


class ImageEncoder(nn.Module):
    """A ResNet up to its last feature map, pooled to a column of ``regions``.

    Args:
        backbone: one of ``BACKBONES``.
        weights: ``"imagenet"``, ``"none"`` or a file with a state dictionary.
        regions: how many regions, stacked from top to bottom, as in the released code.

    Shapes: images ``[B, 3, H, W]`` to features ``[B, regions * C]``.

    Raises:
        CommandError: an unknown backbone, or weights that cannot be had.

    Example:
        >>> ImageEncoder("tiny", "none", regions=3)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 96])
    """

    def __init__(self, backbone: str, weights: str, regions: int = 1) -> None:
        super().__init__()
        self.trunk = build_backbone(backbone, weights)
        self.pool = nn.AdaptiveAvgPool2d((regions, 1))
        self.region_width = stage_width(self.trunk.layer4)
        self.width = regions * self.region_width

    def look(self, images: Tensor) -> Tensor:
        """``[B, regions, C]``: one vector per region."""
        trunk = self.trunk
        x = trunk.maxpool(trunk.relu(trunk.bn1(trunk.conv1(images))))
        x = trunk.layer4(trunk.layer3(trunk.layer2(trunk.layer1(x))))
        return self.pool(x).flatten(2).transpose(1, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images).flatten(1)


class TinyResNet(nn.Module):
    """A ResNet of four blocks and 40 thousand parameters, for tests and ``--quick``."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 32)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        inputs = (widths[0], *widths)
        for n, width in enumerate(widths, start=1):
            stride = 1 if n == 1 else 2
            shortcut = nn.Sequential(nn.Conv2d(inputs[n - 1], width, 1, stride, bias=False), nn.BatchNorm2d(width))
            self.add_module(f"layer{n}", nn.Sequential(BasicBlock(inputs[n - 1], width, stride, shortcut)))


def build_backbone(name: str, weights: str) -> Any:
    """The network with its weights; ``conv1`` to ``layer4`` are used, the classifier is taken off.

    Raises:
        CommandError: see ``ImageEncoder``.
    """
    if name not in BACKBONES:
        raise CommandError(f"backbone must be one of {', '.join(BACKBONES)}, got {name!r}")
    if name == "tiny":
        if weights == "imagenet":
            raise CommandError("the tiny backbone has no ImageNet weights: give --weights none, or a file")
        network: Any = TinyResNet()
    else:
        network = getattr(torchvision.models, name)(weights=None)
        network.fc = nn.Identity()
    if weights == "imagenet":
        _load(network, _download(name), f"ImageNet weights of {name}")
    elif weights != "none":
        _load(network, _read(Path(weights), name), weights)
    return network


def stage_width(stage: nn.Sequential) -> int:
    """Channels that a ResNet's stage returns."""
    last: Any = stage[-1]
    norm = getattr(last, "bn3", None) or last.bn2
    return int(norm.num_features)


def _download(name: str) -> dict[str, Tensor]:
    chosen = torchvision.models.get_model_weights(name)["IMAGENET1K_V1"]
    try:
        return dict(chosen.get_state_dict(progress=False, check_hash=True))
    except (URLError, OSError, RuntimeError) as error:
        raise CommandError(
            f"the ImageNet weights of {name} cannot be downloaded ({error}): go online, or download "
            f"{chosen.url} elsewhere and give the file with --weights FILE (--weights none trains from scratch)"
        ) from error


def _read(path: Path, name: str) -> dict[str, Tensor]:
    if not path.is_file():
        raise CommandError(
            f"no file {path}: --weights must be imagenet (downloaded when online), a file with the weights of {name}, "
            "or none"
        )
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever a damaged file makes the readers raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path}: not a file of weights alone ({reason})") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    # Places365's checkpoints, which the released code also tried, were saved from several GPUs.
    return {key.removeprefix("module."): value for key, value in state.items()}


def _load(network: nn.Module, state: dict[str, Tensor], source: str) -> None:
    state = {key: value for key, value in state.items() if not key.startswith("fc.")}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        few = " ".join(str(error).split())[:200]
        raise CommandError(f"{source}: the weights are of another network ({few} ...)") from error
