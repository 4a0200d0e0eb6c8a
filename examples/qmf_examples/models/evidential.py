"""Evidence instead of probabilities: TMC's and RCML's fusion of it, and the loss that both train with.

Han et al., *Trusted Multi-View Classification* (ICLR 2021 and TPAMI 2022); Xu et al., *Reliable Conflictive Multi-View
Learning* (AAAI 2024).
"""

from collections.abc import Mapping
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .learners import Answer, Head, Learner, encoders_of, give

ANNEALED_BY = 0.1
"""The share of the training after which the loss is whole: 50 of 500 epochs in TMC's and RCML's code."""


def evidence(logits: Tensor) -> Tensor:
    """``softplus``: evidence ``[*, K]`` that is never negative; the Dirichlet's parameters are evidence + 1."""
    return F.softplus(logits)


def opinion(given: Tensor) -> tuple[Tensor, Tensor]:
    """Beliefs ``[*, K]`` and uncertainty ``[*]`` that evidence ``[*, K]`` stands for; they add up to 1 (Eq. 3).

    Example:
        >>> import torch
        >>> opinion(torch.tensor([2.0, 0.0]))
        (tensor([0.5000, 0.0000]), tensor(0.5000))
    """
    num = given.shape[-1]
    strength = given.sum(-1) + num
    return given / strength.unsqueeze(-1), num / strength


def combine(first: Tensor, second: Tensor) -> Tensor:
    """Evidence ``[*, K]`` of two sources as one's, by Dempster's rule (definition 4 of the ICLR paper).

    It commutes; no evidence at all changes nothing; the uncertainty is at most the smaller of the two.

    With ``b = e / S`` and ``u = K / S``, the combined evidence ``K * b / u`` is ``e1 * e2 / K + e1 + e2``: the conflict
    cancels, and nothing is divided by what may vanish.

    Example:
        >>> import torch
        >>> combine(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 1.0]))
        tensor([10.,  1.])
    """
    return first * second / first.shape[-1] + (first + second)


def average_in_turn(views: Tensor) -> Tensor:
    """RCML's fusion of evidence ``[V, *, K]``: averaged in turn, as published, so that the last view counts half."""
    return reduce(lambda first, second: (first + second) / 2, views)


def conflict(evidence: Tensor) -> Tensor:
    """RCML's degree of conflict, the mean over samples and the sum over pairs of views; a scalar, 0 for one view."""
    num, _, k = evidence.shape
    strength = evidence.sum(-1, keepdim=True) + k
    projected, sure = (evidence + 1) / strength, 1 - (k / strength).squeeze(-1)
    apart = (projected.unsqueeze(0) - projected.unsqueeze(1)).abs().sum(-1) / 2
    return (apart * sure.unsqueeze(0) * sure.unsqueeze(1)).sum((0, 1)).mean() / max(num - 1, 1)


def evidential_loss(evidence: Tensor, target: Tensor, annealing: float) -> Tensor:
    """The Dirichlet's expected cross-entropy plus ``annealing`` times the divergence of misleading evidence.

    Source: Sensoy et al., *Evidential Deep Learning*, NeurIPS 2018, with the digamma loss, as TMC and RCML use it.

    Args:
        evidence: ``[..., B, K]``, not negative.
        target: int ``[B]``.
        annealing: from 0 to 1.

    Returns:
        ``[...]``, means over the batch.
    """
    k = evidence.shape[-1]
    alpha = evidence + 1
    label = F.one_hot(target, k).to(alpha.dtype)
    expected = (label * (torch.digamma(alpha.sum(-1, keepdim=True)) - torch.digamma(alpha))).sum(-1)
    other = label + (1 - label) * alpha
    total = other.sum(-1, keepdim=True)
    divergence = torch.lgamma(total.squeeze(-1)) - torch.lgamma(torch.tensor(float(k))) - torch.lgamma(other).sum(-1)
    divergence = divergence + ((other - 1) * (torch.digamma(other) - torch.digamma(total))).sum(-1)
    return (expected + annealing * divergence).mean(-1)


class Trusted(Learner):
    """TMC: each modality's evidence, combined by Dempster's rule; with ``pseudo``, ETMC's joint view as one more.

    Scores, fused and unimodal, are the logarithm of evidence + 1: their softmax is the Dirichlet's mean. A view's
    weight is 1 - u, its belief mass: what the QMF paper's Table 3 and Figure 3 correlate with the loss as "evidence".

    Args:
        heads: by modality.
        pseudo: from all features, side by side, to logits of the pseudo-view.
    """

    def __init__(self, heads: Mapping[str, Head], pseudo: nn.Module | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(encoders_of(heads))
        self.classifiers = nn.ModuleDict({name: head.classifier for name, head in heads.items()})
        self.pseudo = pseudo
        self.encoders = encoders_of(heads)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = {name: give(encoder, inputs[name]) for name, encoder in self.encoders.items()}
        logits = [self.classifiers[name](x) for name, x in features.items()]
        if self.pseudo is not None:
            logits.append(self.pseudo(torch.cat(list(features.values()), 1)))
        views = evidence(torch.stack(logits).float())
        scores = torch.log1p(self.fuse(list(views)))
        return Answer(scores, tuple(torch.log1p(views)), 1 - opinion(views.detach())[1])

    def fuse(self, views: list[Tensor]) -> Tensor:
        """Evidence ``[B, K]`` of all views as one's."""
        return reduce(combine, views)

    def loss(self, answer: Answer, target: Tensor, index: Tensor, annealing: float) -> Tensor:
        return evidential_losses(answer, target, annealing).sum()


class Reliable(Trusted):
    """RCML: evidence averaged in turn; the loss counts views that contradict each other besides."""

    def fuse(self, views: list[Tensor]) -> Tensor:
        return average_in_turn(torch.stack(views))

    def loss(self, answer: Answer, target: Tensor, index: Tensor, annealing: float) -> Tensor:
        views = torch.expm1(torch.stack(answer.unimodal_logits))
        return evidential_losses(answer, target, annealing).mean() + conflict(views)


def evidential_losses(answer: Answer, target: Tensor, annealing: float) -> Tensor:
    """The evidential loss of the fused evidence and of each view's, ``[1 + V]``."""
    views = torch.expm1(torch.stack([answer.scores, *answer.unimodal_logits]))
    return evidential_loss(views, target, annealing)
