"""The multimodal transfer module (Joze et al., CVPR 2020) between the stages of two ResNets."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from timm.models.resnet import ResNet
from torch import Tensor, nn

from ..errors import CommandError
from .image_encoders import ImageEncoder, TinyResNet, stage_width
from .learners import Answer, Learner

SQUEEZE_RATIO = 4


class MMTM(nn.Module):
    """Squeeze both feature maps into one vector, and from it excite the channels of each (Eq. 1 to 4).

    Args:
        first, second: their channels, C1 and C2.
        ratio: the joint vector has ``2 * (C1 + C2) / ratio`` entries, as published: for C1 = C2, a quarter of all
            channels' double.

    Example:
        >>> MMTM(128, 128).squeeze.out_features
        128
    """

    def __init__(self, first: int, second: int, ratio: int = SQUEEZE_RATIO) -> None:
        super().__init__()
        joint = max(1, 2 * (first + second) // ratio)
        self.squeeze = nn.Linear(first + second, joint)
        self.excite_first = nn.Linear(joint, first)
        self.excite_second = nn.Linear(joint, second)

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Maps ``[B, C1, *]`` and ``[B, C2, *]``, of whatever sizes, each with its channels scaled by 0 to 1."""
        means = [x.flatten(2).mean(2) for x in (first, second)]
        joint = torch.relu(self.squeeze(torch.cat(means, 1)))
        gates = [torch.sigmoid(excite(joint)) for excite in (self.excite_first, self.excite_second)]
        scaled = [
            x * gate.view(*gate.shape, *(1,) * (x.dim() - 2)) for x, gate in zip((first, second), gates, strict=True)
        ]
        return scaled[0], scaled[1]


class TwoStreams(nn.Module):
    """Two ResNets with an MMTM behind their second, third and fourth stage, as in the released code.

    Raises:
        CommandError: an encoder that is no ResNet.

    Shapes: two images ``[B, 3, H, W]`` to two feature vectors.
    """

    def __init__(self, first: ImageEncoder, second: ImageEncoder) -> None:
        super().__init__()
        for encoder in (first, second):
            if not isinstance(encoder.trunk, ResNet | TinyResNet):
                raise CommandError(f"mmtm needs the stages of a ResNet as its image encoder, got {encoder.name}")
        self.first, self.second = first, second
        self.transfers = nn.ModuleList(
            MMTM(
                stage_width(getattr(first.trunk, f"layer{stage}")), stage_width(getattr(second.trunk, f"layer{stage}"))
            )
            for stage in (2, 3, 4)
        )

    def forward(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        a, b = self.first.trunk, self.second.trunk
        x, y = (t.layer1(t.maxpool(t.act1(t.bn1(t.conv1(images))))) for t, images in ((a, first), (b, second)))
        for stage, transfer in zip((2, 3, 4), self.transfers, strict=True):
            x, y = transfer(getattr(a, f"layer{stage}")(x), getattr(b, f"layer{stage}")(y))
        return self.first.pool(x).flatten(1), self.second.pool(y).flatten(1)


class MMTMFusion(Learner):
    """Two ResNets that excite each other's channels, and the mean of their logits; the losses of late fusion."""

    def __init__(self, first: ImageEncoder, second: ImageEncoder, names: Sequence[str], heads: Sequence[nn.Module]):
        super().__init__()
        self.streams = TwoStreams(first, second)
        self.classifiers = nn.ModuleList(heads)
        self.names = tuple(names)
        self.encoders = dict(zip(names, (first, second), strict=True))

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = self.streams(*(inputs[name] for name in self.names))
        logits = tuple(head(x) for head, x in zip(self.classifiers, features, strict=True))
        return Answer(torch.stack(logits).mean(0), logits)
