"""Calibrating to Theorem 2 on held-out data: Eq. 5 by Lemma 1, Eq. 6 by a test with a way out.

Theorem 2: dynamic fusion generalizes at least as well as static fusion, in the sense of Theorem 1's bound, if each
modality's weight has the mean of its static weight, ``E(w_m) = w_static_m`` (Eq. 5), and does not correlate positively
with that modality's loss, ``r(w_m, loss_m) <= 0`` (Eq. 6). Lemma 1: Eq. 9 can always meet Eq. 5, by its ``beta``.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from . import composed, functional
from .checks import Logits, check_logits, check_present, check_target
from .precision import KeepsPrecision

if TYPE_CHECKING:
    from .fusion import QualityAwareFusion

FITTABLE = ("alpha", "temperature")
_STATE = ("static", "held", "scale", "shift", "temper")


class Calibration(KeepsPrecision):
    """What ``calibrate`` found, ``[M]`` each; None, and absent from ``state_dict``, before.

    ``static``: the weights of Eq. 5's right-hand side. ``held``: the same where Eq. 6 fails, NaN elsewhere. ``scale``
    and ``shift``: what alpha is multiplied by and beta is raised by. ``temper``: what the temperature is multiplied by.
    """

    static: Tensor | None
    held: Tensor | None
    scale: Tensor
    shift: Tensor
    temper: Tensor
    _anchor: Tensor

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        for name in _STATE:
            self.register_buffer(name, None)
        # Knows the module's device while there is nothing else.
        self.register_buffer("_anchor", torch.empty(0), persistent=False)

    def set(self, **values: Tensor) -> None:
        for name in _STATE:
            setattr(self, name, values[name].detach().clone())

    def clear(self) -> None:
        for name in _STATE:
            setattr(self, name, None)

    def alpha(self, given: Tensor) -> Tensor:
        if self.held is None:
            return given
        return torch.where(torch.isnan(self.held), given * self.scale.to(given.dtype), 0)

    def beta(self, given: Tensor) -> Tensor:
        if self.held is None:
            return given
        free = torch.isnan(self.held)
        return torch.where(free, given + self.shift.to(given.dtype), self.held.to(given.dtype))

    def temperature(self, given: Tensor) -> Tensor:
        return given if self.held is None else given * self.temper.to(given.dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        given = state_dict.get(prefix + "static")
        if given is not None and self.static is None:
            self.set(**{name: torch.empty_like(given, device=self._anchor.device) for name in _STATE})
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return "none" if self.static is None else f"static={[round(v, 4) for v in self.static.tolist()]}"


@torch.no_grad()
def calibrate(
    fusion: QualityAwareFusion,
    logits: Logits,
    target: Tensor,
    static_weights: Tensor | None,
    present: Tensor | None,
    fit: Sequence[str],
    confidence: float,
    ignore_index: int,
) -> None:
    """See ``QualityAwareFusion.calibrate``."""
    if isinstance(fit, str) or not set(fit) <= set(FITTABLE):
        raise ValueError(f"fit must hold some of {list(FITTABLE)}, got {fit!r}")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    mixture = fusion.mixture
    if mixture is not None and static_weights is not None:
        raise ValueError("static_weights must be None for robust(): its weights are probabilities, not coefficients")
    if fit and (mixture is not None or ("temperature" in fit and fusion.combine != "logits")):
        raise ValueError(f"fit must be empty for this rule, which has no such constants, got {list(fit)}")
    rows, target, counted = counted_rows(fusion, logits, target, present, ignore_index)
    if not bool(counted.any(1).all()):
        missing = [name for name, some in zip(fusion.names, counted.any(1).tolist(), strict=True) if not some]
        raise ValueError(f"logits must hold every modality at least once, got none that counts of {missing}")
    losses = sample_losses(rows, target)

    before = [(part, dict(part._buffers)) for part in _fitted_parts(fusion)]
    fusion.calibration.clear()
    try:
        _calibrate(fusion, rows, target, counted, static_weights, fit, losses, confidence)
    except BaseException:
        for part, buffers in before:
            part._buffers.update(buffers)
        fusion._find_unit_temperature()
        raise


def _fitted_parts(fusion: QualityAwareFusion) -> list[nn.Module]:
    return [fusion.calibration] if fusion.mixture is None else [fusion.calibration, fusion.mixture.fitted]


def _calibrate(
    fusion: QualityAwareFusion,
    rows: list[Tensor],
    target: Tensor,
    counted: Tensor,
    static_weights: Tensor | None,
    fit: Sequence[str],
    losses: Tensor,
    confidence: float,
) -> None:
    mixture = fusion.mixture
    if mixture is not None:
        mixture.fitted.fit(
            rearrange(torch.stack(rows), "m ... k -> m (...) k"),
            rearrange(target, "... -> (...)"),
            rearrange(counted, "m ... -> m (...)"),
        )
        ones = torch.ones(len(rows), dtype=torch.float64, device=target.device)
        found = {"scale": ones, "shift": 0 * ones, "temper": ones}
        static = ones  # until it is measured
    else:
        found, static = _meet_means(fusion, rows, target, counted, static_weights, fit)
    held = torch.full_like(static, torch.nan)
    while True:
        fusion.calibration.set(static=static, held=held, **found)
        weights = layer_weights(fusion, rows, counted)
        free = torch.isnan(held)
        if mixture is not None:
            # To hold one moves the posteriors of the others: their means and their correlations are new.
            static = torch.where(free, _means(weights, counted), held)
        wrong = positive_correlation(weights, losses, counted, confidence) & free
        if not bool(wrong.any()):
            break
        if fusion.normalize:
            wrong = free  # one share cannot stand still while the others move
        held = torch.where(wrong, static, held)
    fusion.calibration.set(static=static, held=held, **found)
    _warn_of(~torch.isnan(held), fusion, confidence)


def _warn_of(wrong: Tensor, fusion: QualityAwareFusion, confidence: float) -> None:
    if bool(wrong.any()):
        names = [name for name, bad in zip(fusion.names, wrong.tolist(), strict=True) if bad]
        warnings.warn(
            f"the weights of {names} correlate positively with their loss (Eq. 6 fails at confidence {confidence}): "
            "held at their static weights",
            UserWarning,
            stacklevel=6,
        )


def counted_rows(
    fusion: QualityAwareFusion, logits: Logits, target: Tensor, present: Tensor | None, ignore_index: int
) -> tuple[list[Tensor], Tensor, Tensor]:
    """Checked float64 rows, M of ``[*, K]`` with zeros where they do not count; targets ``[*]``; counted ``[M, *]``."""
    rows, there = check_logits(logits, fusion.names, fusion.class_dim)
    shape, device = (len(rows), *rows[0].shape[:-1]), rows[0].device
    if len(shape) < 2:
        raise ValueError(f"logits must be [N, *, K], got {tuple(rows[0].shape)}")
    target = check_target(target, shape[1:], device)
    mask = check_present(present, there, shape, device)
    wide = torch.float32 if device.type == "mps" else torch.float64
    x, counted = composed.stack_rows(fusion.prepare([row.detach().to(wide) for row in rows]), mask)
    valid = target != ignore_index
    outside = valid & ((target < 0) | (target >= x.shape[-1]))
    if bool(outside.any()):
        raise IndexError(f"target must hold classes 0 to {x.shape[-1] - 1} (or ignore_index={ignore_index})")
    return list(x), torch.where(valid, target, 0), counted & valid


def sample_losses(rows: Sequence[Tensor], target: Tensor) -> Tensor:
    """Each row's unimodal cross-entropy, ``[M, *]``."""
    return torch.stack([-torch.log_softmax(x, -1).gather(-1, target.unsqueeze(-1)).squeeze(-1) for x in rows])


def positive_correlation(weights: Tensor, losses: Tensor, counted: Tensor, confidence: float) -> Tensor:
    """``[M]`` bool: Pearson's r is above 0, one-sided, by Fisher's z (never with fewer than 4 samples)."""
    least = NormalDist().inv_cdf(confidence)
    wrong = []
    for w, v, c in zip(weights, losses, counted, strict=True):
        r = pearson(w[c], v[c])
        n = int(c.sum())
        wrong.append(n > 3 and r > 0 and math.atanh(min(r, 1 - 1e-15)) * math.sqrt(n - 3) > least)
    return torch.tensor(wrong, device=weights.device)


def pearson(x: Tensor, y: Tensor) -> float:
    """The correlation of ``[n]`` and ``[n]``; 0 where either is constant (to rounding)."""
    if len(x) < 2:
        return 0.0
    x, y = x.detach().double(), y.detach().double()
    dx, dy = x - x.mean(), y - y.mean()
    if dx.abs().max() <= 1e-12 * x.abs().max() or dy.abs().max() <= 1e-12 * y.abs().max():
        return 0.0
    return float((dx * dy).sum() / (dx.norm() * dy.norm()))


def layer_weights(fusion: QualityAwareFusion, rows: list[Tensor], counted: Tensor) -> Tensor:
    """The layer's weights, prepared rows in, ``[M, *]``."""
    if fusion.mixture is not None:
        return composed.fuse(fusion.mixture, fusion.calibration.held, rows, counted)[1]
    options = fusion.weight_options(rows, counted)._replace(normalize_logits=None)
    return functional.fuse_with(rows, counted, options)[1]


def _means(values: Tensor, counted: Tensor) -> Tensor:
    dims = tuple(range(1, values.dim()))
    return torch.where(counted, values, 0).sum(dims) / counted.sum(dims)


def _meet_means(
    fusion: QualityAwareFusion,
    rows: list[Tensor],
    target: Tensor,
    counted: Tensor,
    static: Tensor | None,
    fit: Sequence[str],
) -> tuple[dict[str, Tensor], Tensor]:
    """Scale, shift and temper, and the static weights, of a rule with Eq. 9's constants."""
    if static is None:
        weights = layer_weights(fusion, rows, counted)
        # Shares of rows without some modality have no mean of 1 / M, but one over all that are there.
        mean = weights[counted].mean() if fusion.normalize else _means(weights, counted).mean()
        static = mean.expand(len(rows))
        if not bool((static > 0).all()):
            raise ValueError(f"static_weights must be given where the mean weight is not positive: {float(static[0])}")
    static = static.to(rows[0])
    if fusion.normalize:
        # Each row's shares sum to 1, so the static weights do too where every modality is in every row.
        often = counted.flatten(1).sum(1).to(static) / counted.any(0).sum()
        total = float((often * static).sum())
        if abs(total - 1) > 1e-6:
            each = "" if bool((often == 1).all()) else f", each times the {often.tolist()} of rows that have it"
            raise ValueError(f"static_weights{each} must sum to 1 with normalize=True, got {static.tolist()}")
        static = static / total
    ones = torch.ones_like(static)
    temper = ones
    if "temperature" in fit:
        at = fusion.temperature.to(static)
        temper = torch.stack([_best_temperature(x[c], target[c]) for x, c in zip(rows, counted, strict=True)]) / at
    found = {"scale": ones, "shift": 0 * ones, "temper": temper}
    fusion.calibration.set(static=static, held=torch.full_like(static, torch.nan), **found)
    fusion._find_unit_temperature()
    options = fusion.weight_options(rows, counted)._replace(
        normalize=False, nonnegative=False, combine="logits", normalize_logits=None
    )
    base = options.weights
    if base is None:
        base = functional.fuse_with(rows, counted, options)[1]
    beta = fusion.beta.to(static).view(-1, *(1,) * (base.dim() - 1))
    slope = base - beta  # alpha * u

    def shift_of(scale: float) -> Tensor:
        return _shift(slope * scale + beta, counted, static, fusion)

    scale = 1.0
    if "alpha" in fit:

        def fused_loss(log_scale: float) -> float:
            factor = math.exp(log_scale)
            w = _shape_weights(slope * factor + beta, shift_of(factor), counted, fusion)
            some = counted.any(0)
            fused = (w.unsqueeze(-1) * torch.stack(rows)).sum(0)[some]
            return float(torch.nn.functional.cross_entropy(fused, target[some]))

        scale = math.exp(_golden(fused_loss, math.log(1e-3), math.log(1e2)))
    return {**found, "scale": scale * ones, "shift": shift_of(scale)}, static


def _shape_weights(base: Tensor, shift: Tensor, counted: Tensor, fusion: QualityAwareFusion) -> Tensor:
    w = base + shift.view(-1, *(1,) * (base.dim() - 1))
    if fusion.nonnegative or fusion.normalize or fusion.combine == "probabilities":
        w = w.clamp_min(0)
    w = torch.where(counted, w, 0)
    if fusion.normalize:
        total = w.sum(0)
        equal = counted / counted.sum(0).clamp_min(1)
        w = torch.where(total > 0, w / torch.where(total > 0, total, 1), equal)
    return w


def _shift(base: Tensor, counted: Tensor, static: Tensor, fusion: QualityAwareFusion) -> Tensor:
    """What to add to beta so that the mean weight is ``static``, ``[M]`` (Lemma 1)."""
    shift = static - _means(base, counted)
    if fusion.normalize:
        return _shift_shares(base, counted, static, fusion)
    if not (fusion.nonnegative or fusion.combine == "probabilities"):
        return shift
    # The mean of clamped weights rises with the shift, from 0 on, and is at least the unclamped one: bisect.
    high, low = shift.clone(), shift.clone()
    spread = torch.where(counted, base, 0).flatten(1).abs().amax(1) + static.abs() + 1
    low = torch.minimum(low, -spread)
    for _ in range(200):
        middle = (low + high) / 2
        over = _means(_shape_weights(base, middle, counted, fusion), counted) > static
        low, high = torch.where(over, low, middle), torch.where(over, middle, high)
    return (low + high) / 2


def _shift_shares(base: Tensor, counted: Tensor, static: Tensor, fusion: QualityAwareFusion) -> Tensor:
    """The same for normalised weights, whose means depend on every modality's shift: by damped iteration."""
    level = torch.where(counted, base, 0).flatten(1).abs().amax()
    level = torch.where(level > 0, level, 1)
    shift = static * level - _means(base, counted)
    step = level
    error = torch.inf
    for _ in range(2000):
        gap = static - _means(_shape_weights(base, shift, counted, fusion), counted)
        new = float(gap.abs().max())
        if new < 1e-9:
            return shift
        step = step / 2 if new > error else step
        shift, error = shift + step * gap, new
    raise ValueError(f"static_weights must be reachable with normalize=True: {static.tolist()} is off by {error:.1e}")


def _best_temperature(logits: Tensor, target: Tensor) -> Tensor:
    """By likelihood, from 0.01 to 100."""

    def loss(log_temperature: float) -> float:
        return float(torch.nn.functional.cross_entropy(logits / math.exp(log_temperature), target))

    return logits.new_tensor(math.exp(_golden(loss, math.log(0.01), math.log(100))))


def _golden(f: Any, low: float, high: float) -> float:
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
