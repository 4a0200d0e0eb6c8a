"""The objective (Eq. 18) as one differentiable expression, for ``torch.compile`` on a CPU.

An operator is a closed box to the compiler. Where there is no kernel behind it, an open expression of the same thing
lets Inductor fuse the passes over the logits, forward and backward, and is twice as fast for large ones. Same inputs,
outputs and treatment of rows that do not count as ``objective.objective``, whose results its tests compare.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from .fusion import WeightRule, accumulate_dtype, per_modality
from .objective import Losses, LossRule
from .operators import Ranking


def objective_expression(
    logits: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    detach_weights: bool,
) -> Losses:
    """``Losses``, differentiable in the logits and in what makes the weights. Targets are the compiler's to check."""
    dtype = accumulate_dtype(logits)
    # A row's largest value is finite exactly when its log-sum-exp is. Rows that do not count are made harmless before
    # anything is computed of them: a mask afterwards would leave 0 * NaN to the backward.
    counted = torch.stack([torch.isfinite(x.detach().amax(-1)) for x in logits])
    if present is not None:
        counted = counted & present
    rows = [torch.where(c.unsqueeze(-1), x.to(dtype), 0) for c, x in zip(counted, logits, strict=True)]
    lse = torch.stack([torch.logsumexp(x, -1) for x in rows])
    energy, weights = _weigh(rows, lse, counted, weight_rule)

    fused = torch.zeros_like(rows[0])
    ruled_out = torch.zeros_like(fused, dtype=torch.bool)
    for w, x in zip(weights.detach() if detach_weights else weights, rows, strict=True):
        out = x == -torch.inf
        fused = fused + w.unsqueeze(-1) * torch.where(out, 0, x)
        ruled_out = ruled_out | out
    fused = torch.where(ruled_out, -torch.inf, fused)
    fused_counted = torch.isfinite(fused.detach().amax(-1)) & counted.any(0)
    safe = torch.where(fused_counted.unsqueeze(-1), fused, 0)

    valid = target != loss_rule.ignore_index
    label = torch.where(valid, target, 0).unsqueeze(-1)
    every = [*rows, safe]
    every_lse = torch.cat([lse, torch.logsumexp(safe, -1).unsqueeze(0)])
    every_counted = torch.cat([counted, fused_counted.unsqueeze(0)]) & valid
    picked = torch.stack([x.gather(-1, label).squeeze(-1) for x in every])
    entropies = torch.where(every_counted, every_lse - picked, 0)
    losses = _means(every, every_lse, entropies, every_counted, label, loss_rule)

    sample_losses = _sample_means(entropies[:-1].detach(), every_counted[:-1])
    if kappa is None:
        ranking = losses.new_zeros(())
    else:
        left_out = torch.isnan(sample_losses)
        sample_weights = torch.where(left_out, 0, _sample_means(weights, counted, 0.0))
        history = torch.where(left_out, torch.nan, kappa.to(dtype))
        ranking = Ranking.apply(sample_weights, history, loss_rule.form, loss_rule.pairs)
    loss = losses.sum() + loss_rule.ranking_weight * ranking
    energy = torch.where(counted, energy, torch.inf)
    return Losses(loss, losses[-1], losses[:-1], ranking, fused, weights, energy, sample_losses)


def _weigh(rows: Sequence[Tensor], lse: Tensor, counted: Tensor, rule: WeightRule) -> tuple[Tensor, Tensor]:
    """Energies (Eq. 13) and weights (Eq. 9), ``[M, *]``."""
    if rule.temperature is None:
        energy = -lse
    else:
        t = per_modality(rule.temperature, lse)
        scaled = [
            # Whole rows of -inf are masked by now, and a single one would make the temperature's gradient NaN.
            torch.where(x == -torch.inf, -torch.inf, torch.where(x == -torch.inf, 0, x) / t_m.unsqueeze(-1))
            for x, t_m in zip(rows, t, strict=True)
        ]
        energy = -t * torch.stack([torch.logsumexp(x, -1) for x in scaled])
    if rule.weights is None:
        weights = per_modality(rule.alpha, energy) * energy + per_modality(rule.beta, energy)
    else:
        weights = torch.where(counted, rule.weights.to(energy.dtype), 0)
    if rule.nonnegative or rule.normalize:
        weights = torch.where(weights > 0, weights, 0)
    weights = torch.where(counted, weights, 0)
    if rule.normalize:
        total = weights.sum(0)
        equal = counted.to(weights.dtype) / counted.sum(0).clamp(min=1)
        weights = torch.where(total > 0, weights / torch.where(total > 0, total, 1), equal)
    return energy, weights


def _means(
    rows: Sequence[Tensor], lse: Tensor, entropies: Tensor, counted: Tensor, label: Tensor, rule: LossRule
) -> Tensor:
    """Each set of rows' mean cross-entropy, as in ``torch.nn.CrossEntropyLoss``, ``[M + 1]``; 0 over nothing."""
    dims, share = tuple(range(1, counted.dim())), counted.to(entropies.dtype)
    weight = None if rule.class_weight is None else rule.class_weight.to(entropies.dtype)
    if weight is not None:
        share = share * weight[label.squeeze(-1)]
    total = share.sum(dims)
    total = torch.where(total > 0, total, 1)
    losses = (1 - rule.label_smoothing) * torch.where(share > 0, share * entropies, 0).sum(dims) / total
    if rule.label_smoothing:
        mass = rows[0].shape[-1] if weight is None else weight.sum()
        sums = torch.stack([(x if weight is None else x * weight).sum(-1) for x in rows])
        smooth = torch.where(counted, mass * lse - sums, 0).sum(dims) / total
        losses = losses + rule.label_smoothing / rows[0].shape[-1] * smooth
    return losses


def _sample_means(values: Tensor, counted: Tensor, empty: float = torch.nan) -> Tensor:
    """``[M, B, *]`` to ``[M, B]``, the mean over the positions that count."""
    if values.dim() == 2:
        return torch.where(counted, values, empty)
    values, counted = values.flatten(2), counted.flatten(2)
    number = counted.sum(2)
    mean = torch.where(counted, values, 0).sum(2) / number.clamp(min=1)
    return torch.where(number > 0, mean, empty)
