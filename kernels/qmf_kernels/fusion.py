"""Energies, weights and fused logits (Eq. 13, 9, 11), forward and backward, in plain PyTorch.

Shape contract: ``logits`` holds M tensors ``[*, K]`` of one shape, any strides, any floating dtypes; ``alpha``,
``beta`` and ``temperature`` are ``[M]``; per-row scalars are modality-first and keep the class dimension,
``[M, *, 1]``.
Arithmetic is in float32, or in float64 if any head's logits are.

A row (one modality of one sample) counts when it is present and its log-sum-exp is finite, that is, when it holds no
NaN, no +inf and at least one value above -inf; with LogitNorm, or where no logits are fused, when all of it is finite.
A row that does not count has weight exactly 0, energy +inf and no gradient. A -inf in a row that counts rules that
class out: its fused logit is -inf, whatever the weight's sign.

A mask of rows is None where every row is known to count. That is worth a glance at the host's memory, never a wait
for a device: on one, masks are always there.
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from . import combination, uncertainty
from .combination import Combined, Pull
from .lognorm import Norms, normalize, normalize_backward
from .uncertainty import Measured

# Elements per head up to which calls cost more than copying the heads' logits into one tensor.
_STACK_BELOW = 16_384


class WeightRule(NamedTuple):
    """How weights come from uncertainties (Eq. 9): ``[M]`` each, or ``weights`` ``[M, *]`` for ``alpha * u + beta``;
    and what they weigh (Eq. 11).
    """

    weights: Tensor | None
    alpha: Tensor
    beta: Tensor
    temperature: Tensor | None  # None: 1
    static: Tensor | None = None  # of a mixture or product, see ``combination``; NaN where there is none
    nonnegative: bool = False
    normalize: bool = False
    uncertainty: str = "energy"  # or one of ``uncertainty.NAMES``
    combine: str = "logits"  # or one of ``combination.NAMES``
    normalize_logits: float | None = None  # LogitNorm's temperature
    odds: float = 1.0  # of a mixture or product

    @property
    def measured(self) -> bool:
        """Whether the weights come from an uncertainty that is no energy.

        Raises:
            ValueError: one that is not known.
        """
        if self.uncertainty != "energy" and self.uncertainty not in uncertainty.NAMES:
            names = ("energy", *uncertainty.NAMES)
            raise ValueError(f"uncertainty must be one of {names}, got {self.uncertainty!r}")
        return self.weights is None and self.uncertainty != "energy"

    @property
    def clamped(self) -> bool:
        """Whether weights below 0 become 0."""
        return self.nonnegative or self.normalize or self.combine == "probabilities"

    @property
    def combined(self) -> bool:
        """Whether what is fused are no logits.

        Raises:
            ValueError: a combination that is not known, or a mixture with weights that it does not make itself.
        """
        if self.combine == "logits":
            return False
        if self.combine not in combination.NAMES:
            raise ValueError(f"combine must be one of {('logits', *combination.NAMES)}, got {self.combine!r}")
        if self.combine != "probabilities" and not (
            self.weights is self.temperature is None
            and self.uncertainty == "energy"
            and not self.nonnegative
            and not self.normalize
        ):
            raise ValueError(f"combine={self.combine!r} makes its weights itself: others must not be given")
        return True


class Rows(NamedTuple):
    """The logits, normalised where asked, and what one pass over them leaves. Rows that do not count are zero.

    The modalities come in groups, ``[G, *, K]``: all in one where the batch is small, one each, uncopied, elsewhere.
    """

    logits: list[Tensor]  # groups of [G, *, K]; no NaN and no +inf
    probs: list[Tensor]  # groups of [G, *, K], softmax of the logits
    lse: Tensor  # [M, *, 1], log-sum-exp of the logits
    norms: list[Norms] | None  # what the logits were divided by
    counted: Tensor | None  # [M, *, 1], bool


class Fused(NamedTuple):
    """Eq. 13, 9 and 11."""

    rows: Rows
    finite: list[Tensor]  # groups of [G, *, K], the rows' logits with 0 for -inf
    tempered: list[Tensor]  # groups of [G, *, K], softmax(x / T), the slope of -E; the rows' own probs where T is 1
    energy: Tensor  # [M, *, 1]; +inf in rows that do not count
    weights: Tensor  # [M, *, 1], clamped and normalised as asked
    logits: Tensor  # [*, K]
    measured: Measured | None  # [M, *, 1] each; None where the energy is the uncertainty, or weights are given
    combined: Combined | None = None  # None where logits are weighed


class RowGrads(NamedTuple):
    """Gradients of what is one number per row, ``[M, *, 1]``."""

    weights: Tensor  # before clamping
    energy: Tensor
    softmax: Tensor  # what softmax(x / T) counts in the gradient of x, negative: through energy and uncertainty
    shape: Tensor | None  # what the uncertainty's shape counts there; None where it is the energy


class MakerGrads(NamedTuple):
    """Gradients of what makes the weights: those given, ``[M, *]``, and ``[M]`` each."""

    weights: Tensor
    alpha: Tensor
    beta: Tensor
    temperature: Tensor


def accumulate_dtype(logits: Sequence[Tensor]) -> torch.dtype:
    return torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32


def all_finite(x: Tensor) -> bool:
    """Whether every value is known to be finite; False on a device, whose answer would have to be waited for."""
    return x.is_cpu and math.isfinite(x.sum().item())


def softmax_lse(x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax ``[*, K]`` and log-sum-exp ``[*, 1]`` for one exponential."""
    top = x.amax(-1, keepdim=True)
    if x.shape[-1] >= 16 or x.numel() < 512:
        probs = torch.softmax(x, -1)  # whose largest value is exp(top - lse)
        return probs, top - probs.amax(-1, keepdim=True).log_()
    # torch.softmax does not vectorise rows shorter than a CPU's vector; this is up to five times as fast there.
    exps = (x - top).exp_()
    total = exps.sum(-1, keepdim=True)
    return exps.div_(total), total.log_().add_(top)


def per_modality(value: Tensor, like: Tensor) -> Tensor:
    """``[M]`` shaped to multiply ``like``, ``[M, ...]``."""
    return value.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def split_like(values: Tensor, groups: Sequence[Tensor]) -> Sequence[Tensor]:
    """``[M, ...]`` in the groups' sizes."""
    return [values] if len(groups) == 1 else torch.split_with_sizes(values, [len(group) for group in groups])


def join(groups: Sequence[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(list(groups))


def keep_counted(value: Tensor, counted: Tensor | None) -> Tensor:
    return value if counted is None else torch.where(counted, value, 0)


def add(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def fuse_rows(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> Fused:
    rows = _read_rows(logits, rule)
    if present is None:
        if rule.combined:
            if all(all_finite(x) for x in rows.logits):
                return _combine(rows, rule)
        else:
            energy, tempered, measured, weights = _weigh(rows, rule)
            fused = _weighted_sum(rows.logits, weights)
            if all_finite(fused):  # which a row that does not count makes impossible
                return Fused(rows, rows.logits, tempered, energy, weights, fused, measured)
    rows = _mask_rows(rows, present, strict=rule.combined)
    if rule.combined:
        return _combine(rows, rule)
    energy, tempered, measured, weights = _weigh(rows, rule)
    ruled_out = [x == -torch.inf for x in rows.logits]
    finite = [x.masked_fill(out, 0) for x, out in zip(rows.logits, ruled_out, strict=True)]
    fused = _weighted_sum(finite, weights).masked_fill(join(ruled_out).any(0), -torch.inf)
    return Fused(rows, finite, tempered, energy, weights, fused, measured)


def _combine(rows: Rows, rule: WeightRule) -> Fused:
    energy, tempered, measured, weights = _weigh(rows, rule)
    combined = combination.combine(
        rule.combine, rows.logits[0] - rows.lse, weights, rows.counted, rule.odds, rule.static
    )
    return Fused(rows, rows.logits, tempered, energy, combined.weights, combined.logits, measured, combined)


def _read_rows(logits: Sequence[Tensor], rule: WeightRule) -> Rows:
    """As if every row counted; ``_mask_rows`` sorts out those that do not."""
    dtype = accumulate_dtype(logits)
    logits = [x.to(dtype) for x in logits]
    together = rule.combined or logits[0].numel() <= _STACK_BELOW
    groups = [torch.stack(logits)] if together else [x.unsqueeze(0) for x in logits]
    norms = None
    if rule.normalize_logits is not None:
        pairs = [normalize(x, rule.normalize_logits) for x in groups]
        groups, norms = [x for x, _ in pairs], [norm for _, norm in pairs]
    probs, lse = zip(*(softmax_lse(x) for x in groups), strict=True)
    return Rows(groups, list(probs), join(lse), norms, None)


def _mask_rows(rows: Rows, present: Tensor | None, strict: bool) -> Rows:
    """``strict``: only rows that are finite throughout count."""
    counted = torch.isfinite(rows.lse)
    if strict:
        counted = counted & join([torch.isfinite(x).all(-1, keepdim=True) for x in rows.logits])
    if present is not None:
        counted = counted & present.unsqueeze(-1)
    keep = split_like(counted, rows.logits)
    norms = rows.norms
    if norms is not None:
        norms = [Norms(*(torch.where(k, x, 1) for x in norm)) for k, norm in zip(keep, norms, strict=True)]
    return Rows(
        [torch.where(k, x, 0) for k, x in zip(keep, rows.logits, strict=True)],
        [torch.where(k, p, 0) for k, p in zip(keep, rows.probs, strict=True)],
        torch.where(counted, rows.lse, 0),
        norms,
        counted,
    )


def _weigh(rows: Rows, rule: WeightRule) -> tuple[Tensor, list[Tensor], Measured | None, Tensor]:
    """Energies (Eq. 13), softmaxes of x / T, other uncertainties, and weights (Eq. 9)."""
    if rule.temperature is None:
        energy, tempered = -rows.lse, rows.probs
    else:
        t = per_modality(rule.temperature, rows.lse)
        scaled = (x / t_m for x, t_m in zip(rows.logits, split_like(t, rows.logits), strict=True))
        probs, lse = zip(*(softmax_lse(x) for x in scaled), strict=True)
        energy, tempered = -t * join(lse), list(probs)
    measured = None
    if rule.measured:
        parts = zip(tempered, rows.logits, _temperatures(rule, rows), strict=True)
        each = [uncertainty.measure(rule.uncertainty, p, x, t) for p, x, t in parts]
        measured = Measured(*(join(values) for values in zip(*each, strict=True)))
    weights = _raw_weights(energy if measured is None else measured.value, rule)
    if rule.clamped:
        weights = weights.clamp(min=0)
    if rows.counted is not None:
        weights = torch.where(rows.counted, weights, 0)
        energy = torch.where(rows.counted, energy, torch.inf)
    if rule.normalize:
        total = weights.sum(0)
        # Where every weight is 0, the modalities that count share equally.
        equal = torch.ones_like(weights) if rows.counted is None else rows.counted.to(weights.dtype)
        weights = torch.where(total > 0, weights, equal)
        weights = weights / torch.where(total > 0, total, equal.sum(0).clamp(min=1))
    return energy, tempered, measured, weights


def _temperatures(rule: WeightRule, rows: Rows) -> Sequence[Tensor | None]:
    """Each group's T, shaped to divide it; None for 1."""
    if rule.temperature is None:
        return [None] * len(rows.logits)
    return split_like(per_modality(rule.temperature, rows.lse), rows.logits)


def _raw_weights(u: Tensor, rule: WeightRule) -> Tensor:
    """``alpha * u + beta`` (Eq. 9), or the weights that stand in for it."""
    if rule.weights is not None:
        return rule.weights.unsqueeze(-1).to(u.dtype)
    return torch.addcmul(per_modality(rule.beta, u), per_modality(rule.alpha, u), u)


def _uncertainty(fused: Fused) -> Tensor:
    """Eq. 9's u, finite in rows that do not count."""
    return keep_counted(fused.energy, fused.rows.counted) if fused.measured is None else fused.measured.value


def _weighted_sum(groups: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Eq. 11: ``f = sum_m w[m] * x[m]``, ``[*, K]``."""
    if len(groups) == 1:
        return (weights * groups[0]).sum(0)
    total = weights[0] * groups[0][0]
    for w, group in zip(weights[1:], groups[1:], strict=True):
        total.addcmul_(w, group[0])
    return total


def _row_products(x: Tensor, groups: Sequence[Tensor]) -> Tensor:
    """``<x, y>`` over the classes for each modality's y, ``[M, *, 1]``."""
    if len(groups) == 1:
        return (x * groups[0]).sum(-1, keepdim=True)
    scratch = torch.empty_like(groups[0])  # one for all: to touch fresh memory costs more than the product
    return torch.cat([torch.mul(x, y, out=scratch).sum(-1, keepdim=True) for y in groups])


def forget_ruled_out(grad_fused: Tensor, fused: Fused) -> Tensor:
    """No gradient passes through the fused logit of a class that is ruled out: it is -inf whatever the others say."""
    return grad_fused if fused.rows.counted is None else grad_fused.masked_fill(fused.logits == -torch.inf, 0)


def fuse_backward_rows(
    grad_fused: Tensor, grad_weights: Tensor | None, fused: Fused, rule: WeightRule, detach_weights: bool
) -> tuple[Pull | None, Tensor | None]:
    """Backward of Eq. 11, or of what stands for it: the gradients of the weights, with ``grad_weights``; and for a
    combination what goes to the logits besides (``pull_logits``).
    """
    if fused.combined is None:
        return None, grad_weights if detach_weights else add(_row_products(grad_fused, fused.finite), grad_weights)
    pulled = combination.pull(rule.combine, grad_fused, grad_weights, fused.combined, fused.rows.counted, rule.static)
    if rule.combine != "probabilities":
        return pulled, None
    return pulled, grad_weights if detach_weights or pulled.weights is None else add(pulled.weights, grad_weights)


def pull_logits(pulled: Pull, probs: Tensor) -> Tensor:
    """From the gradients of log-probabilities ``[M, *, K]`` to those of logits with this softmax."""
    return torch.addcmul(pulled.log_probs, probs, pulled.log_probs.sum(-1, keepdim=True), value=-1)


def weigh_backward(grad_weights: Tensor | None, grad_energy: Tensor | None, fused: Fused, rule: WeightRule) -> RowGrads:
    """Backward of Eq. 9."""
    counted = fused.rows.counted
    grad = grad_weights
    if grad is None:
        grad = torch.zeros_like(fused.weights)
    grad = keep_counted(grad, counted)
    if rule.clamped:
        raw = keep_counted(_raw_weights(_uncertainty(fused), rule).clamp(min=0), counted)
        if rule.normalize:
            total = raw.sum(0)
            grad = (grad - (grad * fused.weights).sum(0)) / torch.where(total > 0, total, torch.inf)
        grad = torch.where(raw > 0, grad, 0)
    d_uncertainty = grad * per_modality(rule.alpha, grad) if rule.weights is None else torch.zeros_like(grad)
    outside = None if grad_energy is None else keep_counted(grad_energy, counted)
    if fused.measured is None:
        d_energy = add(d_uncertainty, outside)
        return RowGrads(grad, d_energy, d_energy, None)
    d_energy = torch.zeros_like(grad) if outside is None else outside
    if rule.temperature is not None:
        d_uncertainty = d_uncertainty / per_modality(rule.temperature, grad)
    of_softmax, of_shape = uncertainty.slope(rule.uncertainty, fused.measured.factor, fused.logits.shape[-1])
    d_softmax = d_energy if of_softmax is None else torch.addcmul(d_energy, d_uncertainty, of_softmax, value=-1)
    return RowGrads(grad, d_energy, d_softmax, d_uncertainty * of_shape)


def shapes(fused: Fused, rule: WeightRule) -> Iterable[Tensor | None]:
    """The shapes of the uncertainty's slope, group by group as they are asked for; None where it is the energy."""
    if fused.measured is None:
        return [None] * len(fused.tempered)
    factors = split_like(fused.measured.factor, fused.tempered)
    parts = zip(factors, fused.tempered, fused.rows.logits, _temperatures(rule, fused.rows), strict=True)
    return (uncertainty.shape(rule.uncertainty, *part) for part in parts)


def maker_grads(grads: RowGrads, fused: Fused, rule: WeightRule) -> MakerGrads:
    """From the results of ``weigh_backward`` to the gradients of alpha, beta and the temperature (Eq. 9, 13)."""
    energy = keep_counted(fused.energy, fused.rows.counted)
    rest = tuple(range(1, energy.dim()))
    zeros = energy.new_zeros(len(energy))
    out = MakerGrads(grads.weights.squeeze(-1).clone(), zeros, zeros.clone(), zeros.clone())
    if rule.weights is None:
        u = energy if fused.measured is None else fused.measured.value
        out = out._replace(alpha=(grads.weights * u).sum(rest), beta=grads.weights.sum(rest))
    if rule.temperature is not None:
        # With E = -T lse(x / T), dE/dT = (E + <softmax(x / T), x>) / T.
        both = zip(fused.tempered, fused.finite, strict=True)
        mean = join([(p * x).sum(-1, keepdim=True) for p, x in both])
        slope = (energy + mean) / per_modality(rule.temperature, energy)
        change = grads.energy * slope
        if grads.shape is not None:
            # With u a function of x / T, du/dT = -<du/dx, x> / T.
            pairs = zip(shapes(fused, rule), fused.finite, strict=True)
            moments = [(s * x).sum(-1, keepdim=True) for s, x in pairs if s is not None]
            moment = (grads.energy - grads.softmax) * mean + grads.shape * join(moments)
            change = change - moment / per_modality(rule.temperature, energy)
        out = out._replace(temperature=change.sum(rest))
    return out


def separate(groups: Sequence[Tensor], fused: Fused, rule: WeightRule) -> list[Tensor]:
    """From the gradients of the groups, as they were seen, to those of the modalities, M of ``[*, K]``, no two in one
    storage.
    """
    temperature, norms = rule.normalize_logits, fused.rows.norms
    if temperature is not None and norms is not None:
        parts = zip(groups, fused.rows.logits, norms, strict=True)
        groups = [normalize_backward(grad, x, norm, temperature) for grad, x, norm in parts]
    if len(groups[0]) == 1:
        return [group[0] for group in groups]
    return [x.clone() for x in groups[0].unbind(0)]


def fuse(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits ``[*, K]``, weights and energies ``[M, *]``."""
    fused = fuse_rows(logits, present, rule)
    return fused.logits, fused.weights.squeeze(-1), fused.energy.squeeze(-1)


def fuse_backward(
    grads: Sequence[Tensor],
    logits: Sequence[Tensor],
    present: Tensor | None,
    rule: WeightRule,
    detach_weights: bool,
) -> tuple[list[Tensor], MakerGrads]:
    """From the gradients of fused logits, weights and energies to those of the logits and of what made the weights."""
    grad_fused, grad_weights, grad_energy = grads[0], grads[1].unsqueeze(-1), grads[2].unsqueeze(-1)
    fused = fuse_rows(logits, present, rule)
    grad_fused = forget_ruled_out(grad_fused, fused)
    pulled, d_weights = fuse_backward_rows(grad_fused, grad_weights, fused, rule, detach_weights)
    d_rows = weigh_backward(d_weights, grad_energy, fused, rule)
    sizes = fused.finite
    if pulled is None:
        d_groups = [w * grad_fused for w in split_like(fused.weights, sizes)]
    else:
        d_groups = [pull_logits(pulled, fused.rows.probs[0])]
    for grad, slope, d in zip(d_groups, fused.tempered, split_like(d_rows.softmax, sizes), strict=True):
        grad.addcmul_(slope, d, value=-1)
    if d_rows.shape is not None:
        for grad, d, shape in zip(d_groups, split_like(d_rows.shape, sizes), shapes(fused, rule), strict=True):
            if shape is not None:
                grad.addcmul_(d, shape)
    d_logits = [grad.to(x.dtype) for grad, x in zip(separate(d_groups, fused, rule), logits, strict=True)]
    return d_logits, maker_grads(d_rows, fused, rule)
