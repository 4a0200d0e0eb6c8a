"""Other ways to fuse, each from its paper, on logits ``[V, B, K]``: what the robustness bench compares with."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def dempster(evidence: Tensor) -> tuple[Tensor, Tensor]:
    """TMC's fusion by Dempster's rule (Han et al., *Trusted Multi-View Classification*, ICLR 2021).

    Args:
        evidence: ``[V, B, K]``, not negative.

    Returns:
        Fused evidence ``[B, K]``, and each view's belief mass ``1 - u``, ``[V, B]``.

    Example:
        >>> fused, _ = dempster(torch.tensor([[[9.0, 0.0]], [[0.0, 1.0]]]))
        >>> fused.argmax(-1)
        tensor([0])
    """
    k = evidence.shape[-1]
    strength = evidence.sum(-1, keepdim=True) + k
    beliefs, vacuities = evidence / strength, k / strength
    b, u = beliefs[0], vacuities[0]
    for next_b, next_u in zip(beliefs[1:], vacuities[1:], strict=True):
        # 1 - C, the mass without conflict, as a sum of what is kept: C itself may be 1 to rounding.
        kept = b * next_b + b * next_u + u * next_b
        total = (kept.sum(-1, keepdim=True) + u * next_u).clamp_min(1e-12)
        b, u = kept / total, (u * next_u / total).clamp_min(1e-12)
    return b * k / u, 1 - vacuities.squeeze(-1)


def average_belief(evidence: Tensor) -> tuple[Tensor, Tensor]:
    """RCML's fusion (Xu et al., *Reliable Conflictive Multi-View Learning*, AAAI 2024): evidence averaged in turn.

    As published, view by view, so that the last one counts half.

    Args:
        evidence: ``[V, B, K]``, not negative.

    Returns:
        Fused evidence ``[B, K]``, and each view's ``1 - u``, ``[V, B]``.
    """
    fused = evidence[0]
    for e in evidence[1:]:
        fused = (fused + e) / 2
    return fused, 1 - evidence.shape[-1] / (evidence.sum(-1) + evidence.shape[-1])


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


def tmc_loss(logits: Tensor, target: Tensor, annealing: float) -> Tensor:
    """The evidential loss of the fused evidence and of every view's, summed."""
    evidence = F.softplus(logits)
    views = evidential_loss(evidence, target, annealing).sum()
    return views + evidential_loss(dempster(evidence)[0], target, annealing)


def rcml_loss(logits: Tensor, target: Tensor, annealing: float, gamma: float = 1.0) -> Tensor:
    """The mean evidential loss of the fused evidence and of every view's, plus ``gamma`` times the conflict."""
    evidence = F.softplus(logits)
    views = evidential_loss(evidence, target, annealing).sum()
    fused = evidential_loss(average_belief(evidence)[0], target, annealing)
    return (views + fused) / (len(logits) + 1) + gamma * conflict(evidence)


def collaborative_belief(logits: Tensor, confidence: Tensor) -> tuple[Tensor, Tensor]:
    """PDF's fusion (Cao et al., *Predictive Dynamic Fusion*, ICML 2024): predicted confidence, own and the others'.

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


def fuse_known(logits: Tensor, corrupted: Tensor) -> Tensor:
    """The oracle: the mean of the probabilities of the views that are not corrupted, ``[B, K]``."""
    clean = ~corrupted
    clean = clean | ~clean.any(0)
    return (logits.softmax(-1) * clean.unsqueeze(-1)).sum(0) / clean.sum(0).unsqueeze(-1)


def best_view(scores: Sequence[float]) -> int:
    """The index of the highest score, the first of equals."""
    return max(range(len(scores)), key=lambda i: scores[i])
