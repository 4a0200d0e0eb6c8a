"""The objective (Eq. 18), forward and backward, in plain PyTorch.

Shape contract: M heads' ``logits`` ``[B, *, K]`` (see ``fusion``), ``target`` ``[B, *]`` int64, ``kappa`` ``[M, B]`` or
None for no ranking, ``class_weight`` ``[K]`` or None. ``*`` is empty for classification and the positions of a sample
in dense prediction, where the ranking compares each sample's mean weight.

``objective`` returns the losses and, where asked, the gradients of ``loss``, in the same pass: nothing of size
``[B, K]`` outlives it but those gradients. ``objective_backward`` serves whoever differentiates another output, and
passes over the logits once more.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..rules import Losses, LossGrads, LossRule, ObjectiveOptions, RuleGrads
from .fusion import (
    Fusion,
    add,
    forget_ruled_out,
    fuse_rows,
    per_modality,
    rule_grads,
    separate,
    softmax_lse,
    split_like,
    weigh_backward,
)
from .ranking import ranking


class _Kept(NamedTuple):
    """What the forward leaves for the backward; ``S`` is ``[M + 1, B, *, 1]``, the modalities, then the fused row."""

    fusion: Fusion
    fused_probs: Tensor  # [B, *, K]
    label: Tensor  # [1, B, *, 1]
    hard: Tensor  # S, each row's coefficient on its label's cross-entropy
    soft: Tensor | None  # S, the same on the smoothed labels' share
    ranking_grad: Tensor | None  # [M, B]


def objective(
    logits: Sequence[Tensor], given: ObjectiveOptions, gradients: bool, rule_gradients: bool
) -> tuple[Losses, list[Tensor], RuleGrads | None]:
    """The losses, and where asked the gradients of ``loss`` with respect to the logits (in the accumulating dtype) and
    to the rule's tensors.
    """
    out, kept = _forward(logits, given)
    if not gradients:
        return out, [], None
    d_logits, d_rule = _backward(None, kept, given, rule_gradients)
    return out, d_logits, d_rule


def objective_backward(
    grads: LossGrads, logits: Sequence[Tensor], given: ObjectiveOptions
) -> tuple[list[Tensor], RuleGrads]:
    """From gradients of the losses to those of the logits and of the rule's tensors."""
    _, kept = _forward(logits, given)
    d_logits, d_rule = _backward(grads, kept, given, True)
    assert d_rule is not None
    return d_logits, d_rule


def _forward(logits: Sequence[Tensor], given: ObjectiveOptions) -> tuple[Losses, _Kept]:
    target, kappa, loss_rule = given.target, given.kappa, given.loss_rule
    fusion = fuse_rows(logits, given.present, given.weight_rule)
    rows = fusion.rows
    fused_probs, fused_lse = softmax_lse(fusion.logits)
    num_classes = fusion.logits.shape[-1]

    valid = valid_targets(target, num_classes, loss_rule.ignore_index)
    label = (target if valid is None else torch.where(valid, target, 0)).view(1, *target.shape, 1)
    lse = torch.cat([rows.lse, fused_lse.unsqueeze(0)])
    groups = [*rows.logits, fusion.logits.unsqueeze(0)]
    entropies = lse - torch.cat([x.gather(-1, label.expand(len(x), *label.shape[1:])) for x in groups])

    counted = None
    if rows.counted is not None or valid is not None:
        # A sample with no modality, or whose modalities rule every class out between them, has no fused loss.
        row_counted = torch.isfinite(rows.lse) if rows.counted is None else rows.counted
        counted = torch.cat([row_counted, (torch.isfinite(fused_lse) & row_counted.any(0)).unsqueeze(0)])
        counted = counted if valid is None else counted & valid.unsqueeze(-1)
        fused_probs = torch.where(counted[-1], fused_probs, 0)
        entropies = torch.where(counted, entropies, 0)
    hard, soft = _coefficients(lse, counted, label, loss_rule, num_classes)
    losses = _mean_losses(groups, lse, entropies, counted, hard, soft, loss_rule)

    sample_losses = sample_means(entropies[:-1], None if counted is None else counted[:-1])
    loss = losses.sum()
    ranking_grad = None
    if kappa is None:
        ranking_loss = losses.new_zeros(())
    else:
        sample_weights, kappa = sample_means(fusion.weights, rows.counted), kappa.to(loss.dtype)
        if counted is not None:
            left_out = torch.isnan(sample_losses)
            sample_weights = torch.where(left_out, 0, sample_weights)
            kappa = torch.where(left_out, torch.nan, kappa)
        ranking_loss, ranking_grad = ranking(sample_weights, kappa, loss_rule.form, loss_rule.pairs)
        loss = torch.add(loss, ranking_loss, alpha=loss_rule.ranking_weight)  # Eq. 18
    out = Losses(
        loss=loss,
        fused_loss=losses[-1].clone(),
        unimodal_losses=losses[:-1].clone(),
        ranking_loss=ranking_loss,
        logits=fusion.logits if given.return_logits else fusion.logits.new_empty((0,)),
        weights=fusion.weights.squeeze(-1),
        energy=fusion.energy.squeeze(-1),
        sample_losses=sample_losses,
    )
    return out, _Kept(fusion, fused_probs, label, hard, soft, ranking_grad)


def _mean_losses(
    groups: Sequence[Tensor],
    lse: Tensor,
    entropies: Tensor,
    counted: Tensor | None,
    hard: Tensor,
    soft: Tensor | None,
    rule: LossRule,
) -> Tensor:
    """The M + 1 cross-entropies, ``[M + 1]``."""
    dims = tuple(range(1, lse.dim()))
    if counted is None and rule.class_weight is None and soft is None:
        return entropies.mean(dims)
    losses = torch.where(hard > 0, hard * entropies, 0).sum(dims)
    if soft is not None:
        mass, sums = _class_sums(groups, rule.class_weight)
        smoothed = torch.where(soft > 0, soft * (mass * lse - sums), 0)
        losses = losses + (smoothed if counted is None else torch.where(counted, smoothed, 0)).sum(dims)
    return losses


def _backward(
    grads: LossGrads | None, kept: _Kept, given: ObjectiveOptions, rule_gradients: bool
) -> tuple[list[Tensor], RuleGrads | None]:
    """``grads`` None is 1 for the loss and nothing else. May use up ``kept``'s softmaxes."""
    fusion, sizes = kept.fusion, kept.fusion.finite
    weight_rule, loss_rule = given.weight_rule, given.loss_rule
    scale = None if grads is None else _loss_scale(grads, kept.hard)
    share = hard = kept.hard if scale is None else kept.hard * scale
    soft = None
    if kept.soft is not None:
        soft = kept.soft if scale is None else kept.soft * scale
        share = hard + soft * _class_mass(loss_rule.class_weight, fusion.logits)

    d_fused = kept.fused_probs.mul_(share[-1])
    _subtract_labels(d_fused.unsqueeze(0), kept.label, hard[-1:], None if soft is None else soft[-1:], loss_rule)
    d_fused = forget_ruled_out(add(d_fused, None if grads is None else grads.logits), fusion)

    d_weights = None if grads is None or grads.weights is None else grads.weights.unsqueeze(-1)
    d_energy = None if grads is None or grads.energy is None else grads.energy.unsqueeze(-1)
    if kept.ranking_grad is not None:
        d_ranking = kept.ranking_grad * _ranking_scale(grads, loss_rule.ranking_weight)
        d_weights = add(_spread(d_ranking, fusion.rows.counted, fusion.weights), d_weights)
    d_rows = weigh_backward(d_fused, d_weights, d_energy, fusion, weight_rule)
    d_rule = rule_grads(d_rows, d_fused, fusion, weight_rule) if rule_gradients else None

    share = share[:-1]
    tempered_apart = fusion.tempered is not fusion.rows.probs
    if not tempered_apart:
        share = share - d_rows.energy
    columns = [split_like(x, sizes) for x in (share, fusion.weights, d_rows.energy, hard[:-1])]
    softs = [None] * len(sizes) if soft is None else split_like(soft[:-1], sizes)
    d_groups = []
    for probs, tempered, c, w, d, h, s in zip(fusion.rows.probs, fusion.tempered, *columns, softs, strict=True):
        grad = probs.mul_(c)
        if weight_rule.fused is None:
            grad.addcmul_(w, d_fused)
        if tempered_apart:
            grad.addcmul_(tempered, d, value=-1)
        _subtract_labels(grad, kept.label, h, s, loss_rule)
        d_groups.append(grad)
    return separate(d_groups), d_rule


def _ranking_scale(grads: LossGrads | None, ranking_weight: float) -> Tensor | float:
    """The incoming gradient of the ranking loss, directly and through the loss."""
    if grads is None:
        return ranking_weight
    through_loss = 0.0 if grads.loss is None else grads.loss * ranking_weight
    return through_loss if grads.ranking_loss is None else grads.ranking_loss + through_loss


def valid_targets(target: Tensor, num_classes: int, ignore_index: int) -> Tensor | None:
    """The rows whose target is not ``ignore_index``, or None for all of them; raises where a target is no class."""
    if target.is_cpu:
        low, high = (x.item() for x in torch.aminmax(target))
        if low >= 0 and high < num_classes and not low <= ignore_index <= high:
            return None
    valid = target != ignore_index
    inside = (~valid | ((target >= 0) & (target < num_classes))).all()
    message = f"target must hold classes 0 to {num_classes - 1} (or ignore_index={ignore_index})"
    if not target.is_cpu:
        torch._assert_async(inside, message)
    elif not inside.item():
        raise IndexError(f"{message}, got values from {low} to {high}")
    return valid


def _coefficients(
    lse: Tensor, counted: Tensor | None, label: Tensor, rule: LossRule, num_classes: int
) -> tuple[Tensor, Tensor | None]:
    """Each row's coefficient in its mean: on its label, and on every class's smoothed share."""
    if counted is None and rule.class_weight is None:
        hard = soft = lse.new_full(lse.shape, 1 / label.numel())
    else:
        ones = torch.ones_like(lse) if counted is None else counted.to(lse.dtype)
        hard = ones if rule.class_weight is None else ones * rule.class_weight.to(lse.dtype)[label]
        total = hard.sum(tuple(range(1, hard.dim())), keepdim=True)
        # Where the targets' classes weigh nothing, there is nothing to average: coefficients of 0, not of 1.
        hard, soft = (torch.where(total > 0, x / total, 0) for x in (hard, ones))
    if not rule.label_smoothing:
        return hard, None
    return hard * (1 - rule.label_smoothing), soft * (rule.label_smoothing / num_classes)


def _class_sums(groups: Sequence[Tensor], class_weight: Tensor | None) -> tuple[Tensor | float, Tensor]:
    """The classes' total weight, and the sums of the logits so weighted, ``[M + 1, B, *, 1]``."""
    mass = _class_mass(class_weight, groups[0])
    if class_weight is not None:
        # A class that is ruled out and weighs nothing is no loss: 0 times -inf would be NaN.
        groups = [torch.where(class_weight > 0, x * class_weight.to(x.dtype), 0) for x in groups]
    return mass, torch.cat([x.sum(-1, keepdim=True) for x in groups])


def _class_mass(class_weight: Tensor | None, like: Tensor) -> Tensor | float:
    return like.shape[-1] if class_weight is None else class_weight.to(like.dtype).sum()


def _subtract_labels(grad: Tensor, label: Tensor, hard: Tensor, soft: Tensor | None, rule: LossRule) -> None:
    """Take the (smoothed) label's share off ``grad``, ``[G, B, *, K]``, in place."""
    grad.scatter_add_(-1, label.expand(len(grad), *label.shape[1:]), -hard)
    if soft is not None:
        grad -= soft if rule.class_weight is None else soft * rule.class_weight.to(grad.dtype)


def _loss_scale(grads: LossGrads, like: Tensor) -> Tensor:
    """The incoming gradient of each of the M + 1 cross-entropies, shaped to multiply ``like``."""
    scale = like.new_full(like.shape[:1], 0.0)
    if grads.unimodal_losses is not None:
        scale[:-1] = grads.unimodal_losses
    if grads.fused_loss is not None:
        scale[-1] = grads.fused_loss
    return per_modality(scale if grads.loss is None else scale + grads.loss, like)


def sample_means(values: Tensor, counted: Tensor | None) -> Tensor:
    """``[M, B, ...]`` to ``[M, B]``, the mean over the positions that count; NaN where none does."""
    values = values.flatten(2)
    if counted is None:
        return values.squeeze(2) if values.shape[2] == 1 else values.mean(2)
    counted = counted.flatten(2)
    return torch.where(counted, values, 0).sum(2) / counted.sum(2)


def _spread(grad: Tensor, counted: Tensor | None, weights: Tensor) -> Tensor:
    """Backward of ``sample_means`` of the weights: ``[M, B]`` to ``[M, B, *, 1]``."""
    if weights.dim() == 3:
        return grad.unsqueeze(-1)
    if counted is None:
        counted = torch.ones_like(weights, dtype=torch.bool)
    grad = grad / counted.flatten(2).sum(2).clamp(min=1)
    return torch.where(counted, grad.view(*grad.shape, *(1,) * (weights.dim() - 2)), 0)
