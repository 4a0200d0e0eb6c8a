"""Small heads on features that frozen encoders have made: what they are built from, and how their inputs are scaled."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..data.feature_scale import FURTHEST, feature_scale
from .learners import Answer, Head, Learner, classifier
from .methods import Objective, Parts

ANNEALED_BY = 10
"""So many times as long as the late parts of a loss take to come in is a training: 500 epochs with 50 of them in the
code of TMC and of RCML."""


def feature_heads(
    widths: Mapping[str, int],
    num_classes: int,
    num_samples: int,
    hidden: int,
    seed: int,
    steps: int,
    dropout: float = 0.0,
    objective: Objective = Objective(),  # noqa: B008 - frozen
    joint_width: int = 0,
) -> Parts:
    """Parts for methods whose inputs are features, with one hidden layer a modality.

    Args:
        widths: of the features, by modality.
        num_classes: K.
        num_samples: N, of the whole training set.
        hidden: width of the hidden layer; 0 for none.
        seed: of what methods draw in training.
        steps: of the whole training, in batches.
        dropout: on the hidden layer.
        objective: what of Eq. 18 is chosen.
        joint_width: see ``Parts``.
    """

    def encoder(name: str) -> Any:
        layers = [nn.Linear(widths[name], hidden), nn.ReLU(), *([nn.Dropout(dropout)] if dropout else [])]
        network: Any = nn.Sequential(*layers) if hidden else nn.Identity()
        network.width = hidden or widths[name]
        return network

    def classify(width: int) -> nn.Module:
        return classifier(width, num_classes, hidden=0, dropout=0.0)

    def heads() -> dict[str, Head]:
        encoders = {name: encoder(name) for name in widths}
        return {name: Head(network, classify(network.width), widths[name]) for name, network in encoders.items()}

    return Parts(
        *(tuple(widths), num_classes, num_samples, encoder, classify, heads, objective),
        annealing_steps=max(1, steps // ANNEALED_BY),
        joint_width=joint_width,
        seed=seed,
    )


class Scaled(Learner):
    """A method on features, each scaled to mean 0 and deviation 1 over the training data, and cut off at 50.

    Mean and deviation are buffers: a checkpoint brings them with the weights.

    Args:
        method: what is trained on the scaled features.
        widths: of the features, by modality.
    """

    def __init__(self, method: Learner, widths: Mapping[str, int]) -> None:
        super().__init__()
        self.method, self.encoders, self.names = method, method.encoders, tuple(widths)
        for name, width in widths.items():
            self.register_buffer(f"{name}_mean", torch.zeros(width))
            self.register_buffer(f"{name}_deviation", torch.ones(width))

    def fit(self, rows: Mapping[str, Tensor]) -> None:
        """Take means and deviations from training rows ``[N, width]``, by modality."""
        for name in self.names:
            for buffer, found in zip(self._scale(name), feature_scale(rows[name].double().numpy()), strict=True):
                buffer.copy_(torch.from_numpy(found))

    def forward(self, inputs: Mapping[str, Tensor]) -> Answer:
        return self.method({name: self._scaled(name, inputs[name]) for name in self.names})

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        return self.method.loss(answer, target, index)

    def unimodal_losses(self, answer: Answer, target: Tensor) -> Tensor:
        return self.method.unimodal_losses(answer, target)

    def _scale(self, name: str) -> tuple[Tensor, Tensor]:
        return self.get_buffer(f"{name}_mean"), self.get_buffer(f"{name}_deviation")

    def _scaled(self, name: str, rows: Tensor) -> Tensor:
        mean, deviation = self._scale(name)
        return ((rows - mean) / deviation).clamp(-FURTHEST, FURTHEST)
