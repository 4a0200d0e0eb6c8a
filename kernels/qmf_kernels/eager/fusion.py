"""Energies (Eq. 13), weights (Eq. 9) and fused logits (Eq. 11), forward and backward, in plain PyTorch.

Shape contract: ``logits`` holds M tensors ``[*, K]`` of one shape, any strides, any floating dtypes; ``alpha``,
``beta`` and ``temperature`` are ``[M]``; per-row scalars are modality-first and keep the class dimension,
``[M, *, 1]``.
Arithmetic is in float32, or in float64 if any head's logits are.

A row (one modality of one sample) counts when it is present and its log-sum-exp is finite, that is, when it holds no
NaN, no +inf and at least one value above -inf. A row that does not count has weight exactly 0, energy +inf and no
gradient. A -inf in a row that counts rules that class out: its fused logit is -inf, whatever the weight's sign.

A mask of rows is None where every row is known to count. That is worth a glance at the host's memory, never a wait
for a device: on one, masks are always there.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import RuleGrads, WeightRule

# Elements per head up to which calls cost more than copying the heads' logits into one tensor.
_STACK_BELOW = 16_384


def energy(lse: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """``E = -T * logsumexp(x / T)`` from that log-sum-exp (Eq. 13)."""
    return -temperature * lse


def affine_weights(uncertainty: Tensor, alpha: Tensor, beta: Tensor) -> Tensor:
    """``w = alpha * u + beta`` (Eq. 9), of tensors that broadcast."""
    return torch.addcmul(beta, alpha, uncertainty)


class Rows(NamedTuple):
    """The logits, and what one pass over them leaves. Rows that do not count are zero.

    The modalities come in groups, ``[G, *, K]``: all in one where the batch is small, one each, uncopied, elsewhere.
    """

    logits: list[Tensor]  # groups of [G, *, K]; no NaN and no +inf
    probs: list[Tensor]  # groups of [G, *, K], softmax of the logits
    lse: Tensor  # [M, *, 1], log-sum-exp of the logits
    counted: Tensor | None  # [M, *, 1], bool


class Fusion(NamedTuple):
    """Eq. 13, 9 and 11."""

    rows: Rows
    finite: list[Tensor]  # groups of [G, *, K], the rows' logits with 0 for -inf
    tempered: list[Tensor]  # groups of [G, *, K], softmax(x / T), the slope of -E; `rows.probs` itself where T is 1
    energy: Tensor  # [M, *, 1]; +inf in rows that do not count
    uncertainty: Tensor  # [M, *, 1], Eq. 9's u; 0 in rows that do not count
    weights: Tensor  # [M, *, 1], clamped and normalised as asked
    logits: Tensor  # [*, K]


class RowGrads(NamedTuple):
    """Gradients of what is one number per row, ``[M, *, 1]``."""

    weights: Tensor  # before clamping
    energy: Tensor


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


def _join(groups: Sequence[Tensor]) -> Tensor:
    return groups[0] if len(groups) == 1 else torch.cat(list(groups))


def keep_counted(value: Tensor, counted: Tensor | None) -> Tensor:
    return value if counted is None else torch.where(counted, value, 0)


def add(x: Tensor, y: Tensor | None) -> Tensor:
    return x if y is None else x + y


def fuse_rows(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> Fusion:
    rows = _read_rows(logits)
    if present is None:
        out = _fuse(rows, rule)
        # A row that does not count makes one of these infinite or NaN.
        if all_finite(out.logits) and (rule.fused is None or all_finite(rows.lse)):
            return out
    return _fuse(_mask_rows(rows, present), rule)


def _read_rows(logits: Sequence[Tensor]) -> Rows:
    """As if every row counted; ``_mask_rows`` sorts out those that do not."""
    dtype = accumulate_dtype(logits)
    logits = [x.to(dtype) for x in logits]
    groups = [torch.stack(logits)] if logits[0].numel() <= _STACK_BELOW else [x.unsqueeze(0) for x in logits]
    probs, lse = zip(*(softmax_lse(x) for x in groups), strict=True)
    return Rows(groups, list(probs), _join(lse), None)


def _mask_rows(rows: Rows, present: Tensor | None) -> Rows:
    counted = torch.isfinite(rows.lse)
    if present is not None:
        counted = counted & present.unsqueeze(-1)
    keep = split_like(counted, rows.logits)
    return Rows(
        [torch.where(k, x, 0) for k, x in zip(keep, rows.logits, strict=True)],
        [torch.where(k, p, 0) for k, p in zip(keep, rows.probs, strict=True)],
        torch.where(counted, rows.lse, 0),
        counted,
    )


def _fuse(rows: Rows, rule: WeightRule) -> Fusion:
    e, tempered = _energies(rows, rule)
    u = e if rule.uncertainty is None else rule.uncertainty.unsqueeze(-1).to(e.dtype)
    u = keep_counted(u, rows.counted)
    raw = affine_weights(u, per_modality(rule.alpha, u), per_modality(rule.beta, u))
    weights = clamp_weights(raw, rows.counted, rule.nonnegative, rule.normalize)
    finite, ruled_out = rows.logits, None
    if rows.counted is not None:
        e = torch.where(rows.counted, e, torch.inf)
        ruled_out = [x == -torch.inf for x in rows.logits]
        finite = [x.masked_fill(out, 0) for x, out in zip(rows.logits, ruled_out, strict=True)]
    if rule.fused is not None:
        fused = rule.fused.to(e.dtype, copy=True)  # an operator's results share no storage with what it is given
    else:
        fused = _weighted_sum(finite, weights)
        if ruled_out is not None:
            fused = fused.masked_fill(_join(ruled_out).any(0), -torch.inf)
    return Fusion(rows, finite, tempered, e, u, weights, fused)


def _energies(rows: Rows, rule: WeightRule) -> tuple[Tensor, list[Tensor]]:
    """Eq. 13 ``[M, *, 1]``, and softmax(x / T) in groups: the rows' own where T is known to be 1."""
    if rule.temperature is None or (rule.temperature.is_cpu and bool((rule.temperature == 1).all())):
        return energy(rows.lse), rows.probs
    t = per_modality(rule.temperature, rows.lse)
    scaled = (x / t_m for x, t_m in zip(rows.logits, split_like(t, rows.logits), strict=True))
    probs, lse = zip(*(softmax_lse(x) for x in scaled), strict=True)
    return energy(_join(lse), t), list(probs)


def clamp_weights(weights: Tensor, counted: Tensor | None, nonnegative: bool, normalize: bool) -> Tensor:
    """Weights ``[M, ...]`` clamped at 0 and normalised over the modalities as asked, 0 where a row does not count."""
    if nonnegative or normalize:
        weights = weights.clamp(min=0)
    weights = keep_counted(weights, counted)
    if normalize:
        total = weights.sum(0)
        # Where every weight is 0, the modalities that count share equally.
        equal = torch.ones_like(weights) if counted is None else counted.to(weights.dtype)
        weights = torch.where(total > 0, weights, equal)
        weights = weights / torch.where(total > 0, total, equal.sum(0).clamp(min=1))
    return weights


def _weighted_sum(groups: Sequence[Tensor], weights: Tensor) -> Tensor:
    """``f = sum_m w[m] * x[m]``, ``[*, K]`` (Eq. 11)."""
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


def forget_ruled_out(grad_fused: Tensor, out: Fusion) -> Tensor:
    """No gradient passes through the fused logit of a class that is ruled out: it is -inf whatever the others say."""
    return grad_fused if out.rows.counted is None else grad_fused.masked_fill(out.logits == -torch.inf, 0)


def weigh_backward(
    grad_fused: Tensor, grad_weights: Tensor | None, grad_energy: Tensor | None, out: Fusion, rule: WeightRule
) -> RowGrads:
    """Backward of Eq. 11 with respect to the weights, and of Eq. 9; ``grad_weights`` and ``grad_energy`` come from
    elsewhere.
    """
    counted = out.rows.counted
    grad = grad_weights
    if rule.fused is None and not rule.detach:
        grad = add(_row_products(grad_fused, out.finite), grad)
    grad = keep_counted(torch.zeros_like(out.weights) if grad is None else grad, counted)
    if rule.nonnegative or rule.normalize:
        u = out.uncertainty
        raw = affine_weights(u, per_modality(rule.alpha, u), per_modality(rule.beta, u))
        raw = keep_counted(raw.clamp(min=0), counted)
        if rule.normalize:
            total = raw.sum(0)
            grad = (grad - (grad * out.weights).sum(0)) / torch.where(total > 0, total, torch.inf)
        grad = torch.where(raw > 0, grad, 0)
    d_energy = None if grad_energy is None else keep_counted(grad_energy, counted)
    if rule.uncertainty is None:
        d_energy = add(grad * per_modality(rule.alpha, grad), d_energy)
    return RowGrads(grad, torch.zeros_like(grad) if d_energy is None else d_energy)


def rule_grads(grads: RowGrads, d_fused: Tensor, out: Fusion, rule: WeightRule) -> RuleGrads:
    """From the results of ``weigh_backward`` to the gradients of the rule's tensors (Eq. 9, 13)."""
    rest = tuple(range(1, grads.weights.dim()))
    d_temperature = None
    if rule.temperature is not None:
        # With E = -T lse(x / T), dE/dT = (E + <softmax(x / T), x>) / T.
        e = keep_counted(out.energy, out.rows.counted)
        mean = _join([(p * x).sum(-1, keepdim=True) for p, x in zip(out.tempered, out.finite, strict=True)])
        d_temperature = (grads.energy * (e + mean) / per_modality(rule.temperature, e)).sum(rest)
    d_uncertainty = None
    if rule.uncertainty is not None:
        d_uncertainty = (grads.weights * per_modality(rule.alpha, grads.weights)).squeeze(-1)
    return RuleGrads(
        uncertainty=d_uncertainty,
        alpha=(grads.weights * out.uncertainty).sum(rest),
        beta=grads.weights.sum(rest),
        temperature=d_temperature,
        fused=None if rule.fused is None else d_fused,
    )


def separate(groups: Sequence[Tensor]) -> list[Tensor]:
    """From groups to modalities, M of ``[*, K]``, no two in one storage."""
    if len(groups[0]) == 1:
        return [group[0] for group in groups]
    return [x.clone() for x in groups[0].unbind(0)]


def fuse(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits ``[*, K]``, weights and energies ``[M, *]``."""
    out = fuse_rows(logits, present, rule)
    return out.logits, out.weights.squeeze(-1), out.energy.squeeze(-1)


def fuse_backward(
    grads: Sequence[Tensor], logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule
) -> tuple[list[Tensor], RuleGrads]:
    """From the gradients of fused logits, weights and energies to those of the logits and of the rule's tensors."""
    grad_fused, grad_weights, grad_energy = grads[0], grads[1].unsqueeze(-1), grads[2].unsqueeze(-1)
    out = fuse_rows(logits, present, rule)
    grad_fused = forget_ruled_out(grad_fused if rule.fused is None else grad_fused.clone(), out)
    d_rows = weigh_backward(grad_fused, grad_weights, grad_energy, out, rule)
    through = 0 * out.weights if rule.fused is not None else out.weights
    d_groups = [w * grad_fused for w in split_like(through, out.finite)]
    for grad, slope, d in zip(d_groups, out.tempered, split_like(d_rows.energy, out.finite), strict=True):
        grad.addcmul_(slope, d, value=-1)
    d_logits = [grad.to(x.dtype) for grad, x in zip(separate(d_groups), logits, strict=True)]
    return d_logits, rule_grads(d_rows, grad_fused, out, rule)
