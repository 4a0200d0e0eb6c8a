"""What stands for the weighted sum of Eq. 11 where probabilities are added up, or modalities may be broken.

Every rule is a function of the modalities' ``log p = log_softmax(x)``, and its slope ``df[k] / dlog p[m, k]``, up to
what a softmax forgets, is the modality's *vote* ``v[m, k]``, from 0 to 1:

=============  ========================================================  ==========================  ==================
combine        f                                                         v                           w
=============  ========================================================  ==========================  ==================
probabilities  log(sum_m s p), the shares s being w over their sum       s p / sum_m s p             Eq. 9
mixture        log_softmax(sum_m log(1 + r / rho)), with r = K p         r / (r + rho)               <softmax(f), v>
product        log_softmax(sum_m log(max(r, 1e-12)) / (1 + rho))         1 / (1 + rho), or 0         1 / (1 + rho)
=============  ========================================================  ==========================  ==================

The odds rho are one number for all, or ``1 / static - 1`` where a modality has a static weight. A row counts only if
all of it is finite. Where no modality counts, f is 0. Shape contract: M modalities in one tensor, ``[M, *, K]``.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

NAMES = ("probabilities", "mixture", "product")
LEAST_SHARE = 1e-12  # of weights, so that shares are equal where all are 0
LEAST_RATIO = 1e-12
LEAST_ODDS = 1e-6


class Combined(NamedTuple):
    """The fused row, and what its slopes are made of."""

    logits: Tensor  # [*, K]
    votes: Tensor  # [M, *, K]; 0 where a modality does not count
    weights: Tensor  # [M, *, 1]
    probs: Tensor | None  # [*, K], softmax(f), where f was normalised by it


class Pull(NamedTuple):
    """Gradients of the modalities' log-probabilities, and of the weights; None where there are no such."""

    log_probs: Tensor  # [M, *, K]
    weights: Tensor | None  # [M, *, 1]


def combine(
    name: str, log_probs: Tensor, weights: Tensor, counted: Tensor | None, odds: float, static: Tensor | None
) -> Combined:
    """``weights`` ``[M, *, 1]``, clamped, are Eq. 9's; ``static`` is ``[M]``, NaN where a modality has none."""
    if name == "probabilities":
        share = _log_shares(weights, counted)
        terms = share + log_probs
        fused = torch.logsumexp(terms, 0)
        votes = torch.exp(terms - fused.masked_fill(fused == -torch.inf, 0))
        out = Combined(fused, votes, weights, None)
    else:
        terms, rho = log_probs + math.log(log_probs.shape[-1]), _odds(odds, static, log_probs)
        if name == "mixture":
            ratio = terms.exp()
            votes, terms = ratio / (ratio + rho), torch.log1p(ratio / rho)
        else:
            least = math.log(LEAST_RATIO)
            votes, terms = (terms >= least).to(terms.dtype) / (1 + rho), terms.clamp_min(least) / (1 + rho)
        if counted is not None:
            votes, terms = torch.where(counted, votes, 0), torch.where(counted, terms, 0)
        fused = torch.log_softmax(terms.sum(0), -1)
        probs = fused.exp()
        alone = torch.zeros_like(weights) + 1 / (1 + rho)
        weights = alone
        if name == "mixture" and len(votes) > 1:
            weights = (votes * probs).sum(-1, keepdim=True)
            if counted is not None:
                # Of a modality alone it is the same, but for roundings that the ranking would put in an order.
                weights = torch.where(counted.sum(0) > 1, weights, alone)
        if static is not None:
            fixed = _column(static, weights)
            weights = torch.where(torch.isnan(fixed), weights, fixed)
        weights = weights if counted is None else torch.where(counted, weights, 0)
        out = Combined(fused, votes, weights, probs)
    return out if counted is None else out._replace(logits=torch.where(counted.any(0), out.logits, 0))


def pull(
    name: str,
    grad_fused: Tensor,
    grad_weights: Tensor | None,
    combined: Combined,
    counted: Tensor | None,
    static: Tensor | None,
) -> Pull:
    """``grad_weights`` ``[M, *, 1]`` is what goes to the weights that a mixture makes itself."""
    votes, probs = combined.votes, combined.probs
    if probs is None:
        log_probs = votes * grad_fused
        # With sum_m v = 1, the shares' gradients add up to that of the whole row.
        sums, share = log_probs.sum(-1, keepdim=True), _log_shares(combined.weights, counted).exp()
        free = combined.weights > LEAST_SHARE
        grad = torch.where(free, (sums - share * sums.sum(0)) / torch.where(free, combined.weights, 1), 0)
        return Pull(log_probs, grad)
    grad_fused = grad_fused - probs * grad_fused.sum(-1, keepdim=True)
    if name == "product" or grad_weights is None:
        return Pull(votes * grad_fused, None)
    if static is not None:
        grad_weights = torch.where(torch.isnan(_column(static, grad_weights)), grad_weights, 0)
    # w = <softmax(f), v>, whose slope in f is softmax(f) (v - w), and dv/dlog p = v (1 - v).
    mean = (votes * probs).sum(-1, keepdim=True)
    grad_fused = grad_fused + probs * (grad_weights * (votes - mean)).sum(0)
    return Pull(votes * (grad_fused + grad_weights * probs * (1 - votes)), None)


def _odds(odds: float, static: Tensor | None, like: Tensor) -> Tensor | float:
    """rho: a number, or ``[M, 1, ...]`` where some modality may have a static weight."""
    if static is None:
        return odds
    fixed = _column(static, like)
    return torch.where(torch.isnan(fixed), odds, 1 / fixed.clamp(LEAST_ODDS, 1) - 1).clamp_min(LEAST_ODDS)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """``[M]`` shaped to multiply ``like``, ``[M, ...]``."""
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def _log_shares(weights: Tensor, counted: Tensor | None) -> Tensor:
    share = weights.clamp_min(LEAST_SHARE).log()
    if counted is None:
        return share - torch.logsumexp(share, 0)
    share = share.masked_fill(~counted, -torch.inf)
    whole = torch.logsumexp(share, 0)
    return share - torch.where(torch.isfinite(whole), whole, 0)
