"""Lemma 1: Eq. 9 can always meet Eq. 5, a given mean weight, by its ``beta``; and constants fitted by likelihood."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qmf_kernels import clamp_weights
from qmf_kernels.eager.fusion import per_modality

from .calibration import CleanData


class Clamp(NamedTuple):
    """What happens to ``alpha * u + beta`` before it is a weight."""

    nonnegative: bool
    normalize: bool

    def weights(self, raw: Tensor, shift: Tensor, counted: Tensor) -> Tensor:
        """``[M, *]`` from the same, with ``shift`` ``[M]`` added to beta."""
        return clamp_weights(raw + per_modality(shift, raw), counted, self.nonnegative, self.normalize)

    def static(self, static: Tensor, counted: Tensor) -> Tensor:
        """``[M, *]`` of the static rule with weights ``[M]``: themselves, or their shares of what is there."""
        there = counted.to(static.dtype)
        return clamp_weights(there * per_modality(static, there), counted, True, self.normalize)


def find_shift(raw: Tensor, data: CleanData, static: Tensor, clamp: Clamp, level: float) -> Tensor:
    """What to add to beta, ``[M]``, for the mean weights of the static rule with weights ``static`` ``[M]``.

    The weights are ``raw`` ``[M, *]`` without. Shares leave the sum of weights open: it is ``level`` on average, where
    such shares can be met.
    """
    if clamp.normalize:
        return _shift_shares(raw, data, static, clamp, level)
    high = static - data.mean(raw)
    if not clamp.nonnegative:
        return high
    # Clamped weights' mean rises with the shift, from 0 on, and is at least the unclamped one: bisect.
    spread = torch.where(data.counted, raw, 0).flatten(1).abs().amax(1) + static.abs() + 1
    low = torch.minimum(high, -spread)
    for _ in range(200):
        middle = (low + high) / 2
        over = data.mean(clamp.weights(raw, middle, data.counted)) > static
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def _shift_shares(raw: Tensor, data: CleanData, static: Tensor, clamp: Clamp, level: float) -> Tensor:
    """Of normalised weights, whose means depend on every modality's shift: by damped iteration.

    From shifts at the level asked for, and where shares jump too much there, from larger ones, which even them out.
    """
    size = float(torch.where(data.counted, raw, 0).abs().amax()) or 1.0
    level = level if level > 0 else size
    wanted, error = data.mean(clamp.static(static, data.counted)), math.inf
    for start in (level, 4 * level, 16 * level, size, 4 * size, 16 * size):
        shift, step, error = static * start - data.mean(raw), start, math.inf
        for _ in range(2000):
            gap = wanted - data.mean(clamp.weights(raw, shift, data.counted))
            new = float(gap.abs().max())
            if new < 1e-9:
                return shift
            step = step / 2 if new > error else step
            if step < 1e-6 * start:
                break
            shift, error = shift + step * gap, new
    raise ValueError(f"static_weights must be reachable with normalize=True: {static.tolist()} is off by {error:.1e}")


def keep_nonnegative(slope: Tensor, data: CleanData, static: Tensor) -> Tensor:
    """What to multiply ``alpha * u`` ``[M, *]`` by, ``[M]``, so that no weight is negative at a mean of ``static``.

    Lemma 1 leaves alpha free: less of it keeps Eq. 5, the order of the weights and so Eq. 6. A thousandth of the static
    weight stays, for the roundings of float32.
    """
    below = per_modality(data.mean(slope), slope) - slope
    deepest = torch.where(data.counted, below, 0).flatten(1).amax(1)
    return torch.where(deepest > 0, 0.999 * static / deepest, 1).clamp_max(1)


def fit_scale(
    slope: Tensor, data: CleanData, static: Tensor, clamp: Clamp, level: float, fuse: Callable[[Tensor], Tensor]
) -> float:
    """The factor of every alpha that makes the fused logits likeliest under Eq. 5.

    ``slope`` is ``alpha * u`` ``[M, *]``; ``fuse`` makes fused logits ``[*, K]`` of weights ``[M, *]``.
    """
    some = data.counted.any(0)

    def loss(log_scale: float) -> float:
        raw = slope * math.exp(log_scale)
        if not clamp.nonnegative and not clamp.normalize:
            raw = raw * per_modality(keep_nonnegative(raw, data, static), raw)
        weights = clamp.weights(raw, find_shift(raw, data, static, clamp, level), data.counted)
        return float(F.cross_entropy(fuse(weights)[some], data.target[some]))

    return math.exp(_golden(loss, math.log(1e-3), math.log(1e2)))


def fit_temperatures(data: CleanData) -> Tensor:
    """Each modality's, by likelihood, from 0.01 to 100: ``[M]`` (Guo et al., ICML 2017)."""

    def best(x: Tensor, target: Tensor) -> float:
        def loss(log_temperature: float) -> float:
            return float(F.cross_entropy(x / math.exp(log_temperature), target))

        return math.exp(_golden(loss, math.log(0.01), math.log(100)))

    return data.losses.new_tensor([best(x[c], data.target[c]) for x, c in zip(data.rows, data.counted, strict=True)])


def _golden(f: Callable[[float], float], low: float, high: float) -> float:
    """The minimum of a function of one dip, by golden section."""
    ratio = (math.sqrt(5) - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = f(left), f(right)
    for _ in range(60):
        if at_left <= at_right:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = f(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = f(right)
    return (low + high) / 2
