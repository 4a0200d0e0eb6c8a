"""Theorem 1's bound on data, for weights that do not sum to one.

The proof (appendix A.1) is Jensen's inequality: the cross-entropy is convex in the logits, so that

    ``loss(sum_m w_m x_m) <= sum_m w_m loss(x_m)``    for weights that are not negative and sum to one.

Fused probabilities have it too, as ``-log`` is convex. Weights that sum to less are completed by logits of 0, which
vote for no class and whose loss is ``log K``:

    ``loss(sum_m w_m x_m) <= sum_m w_m loss(x_m) + (1 - sum_m w_m) log K``

Where some sample's sum is more, all weights are divided by one number c, the largest sum of any sample in either rule:
that bounds the loss of ``f / c``, less sharp than f and of the same decisions. Which rule's bound is lower does not
depend on c, which only divides their difference, ``sum_m E[(w_m - static_m) (loss_m - log K)]``. The mean over data
splits, for each modality, into ``E(w) E(loss) + Cov(w, loss)``, Term-L and Term-Cov. For negative weights there is no
bound.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .calibration import CleanData
from .correlation import Correlation, co_moments


@dataclass(frozen=True)
class Bound:
    """A limit of the fused loss by Jensen's inequality (Theorem 1) on the data given."""

    term_l: float
    term_cov: float
    missing: float
    """``(1 - sum_m w_m) log K``: what the weights lack to a sum of one votes for no class."""
    total: float
    loss: float
    """What it bounds: the mean loss of the fused logits, divided by ``FusionReport.scale``."""


class Bounds(NamedTuple):
    """Of the dynamic and the static rule; None where weights are negative, or no average of logits."""

    scale: float = 1.0  # c
    negative: float = 0.0  # the share of rows in which some weight is
    dynamic: Bound | None = None
    static: Bound | None = None

    @property
    def lower(self) -> str | None:
        """The rule of the lower bound; the dynamic one if they are equal."""
        if self.dynamic is None or self.static is None:
            return None
        return "static" if self.dynamic.total > self.static.total else "dynamic"


class Terms(NamedTuple):
    """Each modality's part of a rule's bound, ``[M]``; NaN where it never counts."""

    term_l: Tensor
    term_cov: Tensor


def split_into_terms(weights: Tensor, data: CleanData, scale: float) -> Terms:
    """``E(w) E(loss)`` and ``Cov(w, loss)`` over all rows of ``[M, N, *]`` weights, divided by ``scale``."""
    counted = data.counted.cpu().flatten(1)
    w, loss = (x.cpu().double().flatten(1) for x in (weights / scale, data.losses))
    found = Correlation.of(co_moments(w, loss, counted))
    # Of all rows: those without the modality have a weight of 0.
    share = found.samples / counted.any(0).sum()
    share = torch.where(share > 0, share, torch.nan)
    return Terms(share * found.mean_weight * found.mean_loss, share * found.covariance)


def bound_both(weights: Tensor, static: Tensor, data: CleanData, fused: Tensor, fused_static: Tensor) -> Bounds:
    """The bounds for weights ``[M, N, *]`` and fused logits ``[N, *, K]`` of the dynamic and the static rule."""
    # On the CPU, as not every device has float64.
    weights, static, fused, fused_static = (x.cpu().double() for x in (weights, static, fused, fused_static))
    some, target = data.counted.any(0).cpu(), data.target.cpu()
    negative = float((weights < 0).any(0)[some].double().mean())
    scale = max(float(weights.sum(0).amax()), float(static.sum(0).amax()))
    scale = scale if scale > 1 + 1e-6 else 1.0
    if negative:
        return Bounds(scale, negative)

    def bound(weights: Tensor, logits: Tensor) -> Bound:
        term_l, term_cov = (float(x.nansum()) for x in split_into_terms(weights, data, scale))
        lacking = max(0.0, 1 - float(weights.sum(0)[some].mean()) / scale)
        missing = lacking * math.log(logits.shape[-1])
        loss = F.cross_entropy(logits[some] / scale, target[some])
        return Bound(term_l, term_cov, missing, term_l + term_cov + missing, float(loss))

    return Bounds(scale, negative, bound(weights, fused), bound(static, fused_static))
