"""Image encoders: any model of timm without its classifier, and where their weights come from."""

from pathlib import Path
from typing import Any

import timm
import torch
from timm.models.resnet import BasicBlock, ResNet
from torch import Tensor, nn

from ..errors import CommandError
from .hub import quieten_hub
from .image_transforms import PUBLISHED, encoder_config


class ImageEncoder(nn.Module):
    """A model of timm up to its features, or up to its last feature map, pooled to a column of ``regions``.

    Args:
        name: a model of timm, with or without the tag of its weights, or ``"tiny"``, a ResNet for tests.
        weights: ``"imagenet"`` for those that timm publishes with the model, ``"none"``, or a file with a state
            dictionary under timm's names (a ResNet's are torchvision's).
        regions: how many regions, stacked from top to bottom, as in the released code. With 1, the features are what
            the model itself hands to its classifier.

    Shapes: images ``[B, 3, H, W]`` to features ``[B, regions * C]``.

    Raises:
        CommandError: an unknown model, weights that cannot be had, or regions of a model that has no feature map.

    Example:
        >>> ImageEncoder("tiny", "none", regions=3)(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 96])
    """

    def __init__(self, name: str, weights: str, regions: int = 1) -> None:
        super().__init__()
        self.name, self.regions = name, regions
        self.trunk = build_trunk(name, weights)
        self.pool = nn.AdaptiveAvgPool2d((regions, 1))
        # Some models have layers between their feature map and what the classifier sees.
        whole = regions == 1 and not isinstance(self.trunk, TinyResNet)
        self.region_width = int(self.trunk.head_hidden_size if whole else self.trunk.num_features)
        self.width = regions * self.region_width
        if regions > 1 and not isinstance(self.trunk, ResNet | TinyResNet):
            self._try_map()

    def look(self, images: Tensor) -> Tensor:
        """``[B, regions, C]``: one vector per region."""
        try:
            if self.regions == 1:
                return self.trunk(images)[:, None]
            return self.pool(self._map(images)).flatten(2).transpose(1, 2)
        except AssertionError as error:  # what models that take one size of image alone make of another
            reason = " ".join(str(error).split())
            raise CommandError(
                f"--image-encoder {self.name}: does not take images of {images.shape[2]} x {images.shape[3]} pixels "
                f"({reason})"
            ) from error

    def forward(self, images: Tensor) -> Tensor:
        return self.look(images).flatten(1)

    def _map(self, images: Tensor) -> Tensor:
        found = self.trunk.forward_features(images)
        return found.permute(0, 3, 1, 2) if getattr(self.trunk, "output_fmt", "NCHW") == "NHWC" else found

    def _try_map(self) -> None:
        """Whether the features have a place in the image, tried on a grey one before any data is read."""
        side = encoder_config(self.name)["input_size"][-1]
        training = self.trunk.training
        with torch.no_grad():
            found = self.trunk.eval().forward_features(torch.zeros(1, 3, side, side))
        self.trunk.train(training)
        if not isinstance(found, Tensor) or found.dim() != 4:
            kind = f"features of shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
            raise CommandError(
                f"--image-encoder {self.name}: --regions {self.regions} needs a convolutional model, whose "
                f"last features are a map, got {kind}; give --regions 1"
            )


class TinyResNet(nn.Module):
    """A ResNet of four blocks and 40 thousand parameters, for tests and ``--quick``; its parts are named as timm's."""

    def __init__(self, widths: tuple[int, ...] = (8, 16, 32, 32)) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, widths[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.act1 = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(2)
        self.num_features = widths[-1]
        inputs = (widths[0], *widths)
        for n, width in enumerate(widths, start=1):
            stride = 1 if n == 1 else 2
            shortcut = nn.Sequential(nn.Conv2d(inputs[n - 1], width, 1, stride, bias=False), nn.BatchNorm2d(width))
            self.add_module(f"layer{n}", nn.Sequential(BasicBlock(inputs[n - 1], width, stride, shortcut)))

    def forward_features(self, images: Tensor) -> Tensor:
        x = self.maxpool(self.act1(self.bn1(self.conv1(images))))
        for n in (1, 2, 3, 4):
            x = self.get_submodule(f"layer{n}")(x)
        return x

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_features(images).flatten(2).mean(2)


def build_trunk(name: str, weights: str) -> Any:
    """The network with its weights, without its classifier.

    Raises:
        CommandError: see ``ImageEncoder``.
    """
    if name == "tiny":
        if weights == "imagenet":
            raise CommandError("the tiny image encoder has no ImageNet weights: give --weights none, or a file")
        network: Any = TinyResNet()
        classifiers: tuple[str, ...] = ("fc",)
    else:
        config = encoder_config(name)
        network = _download(name, config) if weights == "imagenet" else _create(name)
        given = config.get("classifier") or "fc"
        classifiers = (given,) if isinstance(given, str) else tuple(given)
    if weights not in ("imagenet", "none"):
        _load(network, _read(Path(weights), name), weights, classifiers)
    return network


def stage_width(stage: nn.Sequential) -> int:
    """Channels that a ResNet's stage returns."""
    last: Any = stage[-1]
    norm = getattr(last, "bn3", None) or last.bn2
    return int(norm.num_features)


def _create(name: str, **options: Any) -> Any:
    try:
        return timm.create_model(name, num_classes=0, **options)
    except TypeError as error:  # a model without a classifier to leave out
        raise CommandError(f"--image-encoder {name}: cannot be built without its classifier ({error})") from error


def _download(name: str, config: dict[str, Any]) -> Any:
    quieten_hub()
    tagged = PUBLISHED.get(name, name)
    try:
        return _create(tagged, pretrained=True)
    except Exception as error:  # of the hub, of the network, of a file that was cut off
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        hub = config.get("hf_hub_id")
        elsewhere = f"download https://huggingface.co/{hub} elsewhere and " if hub else ""
        raise CommandError(
            f"the ImageNet weights of {name} cannot be had ({reason}): go online, so that timm downloads them, or "
            f"{elsewhere}give the file with --weights FILE (--weights none trains from scratch)"
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


def _load(network: nn.Module, state: dict[str, Tensor], source: str, classifiers: tuple[str, ...]) -> None:
    left_out = tuple(f"{classifier}." for classifier in classifiers)
    state = {key: value for key, value in state.items() if not key.startswith(left_out)}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        few = " ".join(str(error).split())[:200]
        raise CommandError(f"{source}: the weights are of another network ({few} ...)") from error
