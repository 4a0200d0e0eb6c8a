"""Predictive dynamic fusion (Cao et al., ICML 2024): weights from a predicted probability of the true class."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .learners import Answer, Head, Learner, encoders_of, give


def collaborative_belief(logits: Tensor, confidence: Tensor, calibrated: bool = True) -> Tensor:
    """PDF's weights: predicted confidence, own and the others'.

    Mono-confidence plus holo-confidence (the others' share of the log-confidences), lowered where the softmax of a view
    is flatter than the others' on average (relative calibration; the paper has two views, where the average is the
    other), then a softmax over views.

    Args:
        logits: ``[V, B, K]``.
        confidence: ``[V, B]`` in (0, 1), the predicted probability of the true class.
        calibrated: whether there is relative calibration: at test time alone, as in the released code.

    Returns:
        Weights ``[V, B]``.
    """
    num = len(logits)
    log = confidence.clamp(1e-6, 1 - 1e-6).log()
    belief = confidence + (log.sum(0) - log) / log.sum(0)
    if calibrated and num > 1:
        certainty = (logits.softmax(-1) - 1 / logits.shape[-1]).abs().mean(-1)
        others = (certainty.sum(0) - certainty) / (num - 1)
        belief = belief * (certainty / others.clamp_min(1e-12)).clamp_max(1)
    return belief.softmax(0)


class PredictiveFusion(Learner):
    """PDF: logits weighted by collaborative belief, with networks that learn to predict each head's confidence.

    As in the released code, a confidence comes from three linear layers with a sigmoid at the end and nothing between,
    on features that it does not train; weights are not trained through; the loss is the cross-entropy of the fused
    logits and each head's own, and the confidences' distance (L1) to the probabilities of the true class.
    """

    def __init__(self, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.encoders = encoders_of(heads)
        self.parts = nn.ModuleDict(self.encoders)
        self.classifiers = nn.ModuleList(head.classifier for head in heads.values())
        widths: list[Any] = [encoder.width for encoder in self.encoders.values()]
        self.confidence = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 2 * width), nn.Linear(2 * width, width), nn.Linear(width, 1), nn.Sigmoid())
            for width in widths
        )

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = tuple(give(encoder, inputs[name]) for name, encoder in self.encoders.items())
        logits = tuple(head(x).float() for head, x in zip(self.classifiers, features, strict=True))
        stacked, confidence = torch.stack(logits), self.confidences(features).detach()
        weights = collaborative_belief(stacked.detach(), confidence, calibrated=not self.training)
        return Answer((weights.unsqueeze(-1) * stacked).sum(0), logits, weights, features)

    def confidences(self, features: tuple[Tensor, ...]) -> Tensor:
        """The predicted probabilities of the true class, ``[V, B]``."""
        pairs = zip(self.confidence, features, strict=True)
        return torch.stack([network(x.detach()).float().squeeze(-1) for network, x in pairs])

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        own = torch.stack([F.cross_entropy(x, target, reduction="none") for x in answer.unimodal_logits])
        assert answer.features
        missed = (self.confidences(answer.features) - own.detach().neg().exp()).abs()
        return super().loss(answer, target, index) + missed.mean(1).sum()
