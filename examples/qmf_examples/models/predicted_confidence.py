"""Predictive dynamic fusion (Cao et al., ICML 2024): weights from a predicted probability of the true class."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .learners import Answer, Head, Learner, encoders_of, give


def collaborative_belief(logits: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """PDF's fusion: predicted confidence, own and the others'.

    Mono-confidence plus holo-confidence (the others' share of the log-confidences), lowered where the softmax of a view
    is flatter than the others' on average (relative calibration; the paper has two views, where the average is the
    other), then a softmax over views for weights of the logits.

    Args:
        logits: ``[V, B, K]``.
        confidence: ``[V, B]`` in (0, 1), the predicted probability of the true class.

    Returns:
        Fused logits ``[B, K]`` and weights ``[V, B]``.
    """
    num = len(logits)
    log = confidence.clamp(1e-6, 1 - 1e-6).log()
    holo = (log.sum(0) - log) / log.sum(0)
    probs = logits.softmax(-1)
    certainty = (probs - 1 / logits.shape[-1]).abs().mean(-1)
    others = (certainty.sum(0) - certainty) / max(num - 1, 1)
    relative = (certainty / others.clamp_min(1e-12)).clamp_max(1) if num > 1 else torch.ones_like(certainty)
    weights = ((confidence + holo) * relative).softmax(0)
    return (weights.unsqueeze(-1) * logits).sum(0), weights


class ConfidentHeads(Learner):
    """Heads trained on each one's cross-entropy and that of their mean of probabilities, which is the answer.

    Beside them, and without touching them, a linear layer on each head's features learns to predict the probability of
    the true class: PDF's confidence.
    """

    def __init__(self, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.encoders = encoders_of(heads)
        self.parts = nn.ModuleDict(self.encoders)
        self.classifiers = nn.ModuleList(head.classifier for head in heads.values())
        widths: list[Any] = [encoder.width for encoder in self.encoders.values()]
        self.confidence = nn.ModuleList(nn.Linear(width, 1) for width in widths)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = tuple(give(encoder, inputs[name]) for name, encoder in self.encoders.items())
        logits = tuple(head(x) for head, x in zip(self.classifiers, features, strict=True))
        scores = torch.logsumexp(torch.stack(logits).log_softmax(-1), 0) - math.log(len(logits))
        return Answer(scores, logits, features=features)

    def confidences(self, features: tuple[Tensor, ...]) -> Tensor:
        """The predicted probabilities of the true class, ``[V, B]``."""
        pairs = zip(self.confidence, features, strict=True)
        return torch.stack([torch.sigmoid(layer(x)).squeeze(-1) for layer, x in pairs])

    def loss(self, answer: Answer, target: Tensor, index: Tensor, annealing: float) -> Tensor:
        own = torch.stack([F.cross_entropy(x, target, reduction="none") for x in answer.unimodal_logits])
        assert answer.features is not None
        predicted = self.confidences(tuple(x.detach() for x in answer.features))
        return F.nll_loss(answer.scores, target) + own.mean(1).sum() + F.mse_loss(predicted, own.detach().neg().exp())
