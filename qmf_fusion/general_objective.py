"""Eq. 18 of targets that are probabilities (mixup, distillation) and of rules with a loss of their own.

In plain PyTorch: the operators take classes, and know the cross-entropy alone.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import qmf_kernels
from qmf_kernels import Losses, LossRule, WeightRule
from qmf_kernels.eager.objective import sample_means, valid_targets

from .checks import can_look

RowLoss = Callable[[Tensor, Tensor], Tensor]  # of rows ``[S, *, K]`` and labels ``[*, K]`` that broadcast: ``[S, *]``


def labels_of(target: Tensor, num_classes: int, ignore_index: int) -> tuple[Tensor, Tensor | None]:
    """Targets as probabilities ``[*, K]``, and which of them count, bool ``[*]``; None for all."""
    if target.is_floating_point():
        return target, None
    # A graph being compiled cannot look at the classes; what it scatters by raises of one that is none.
    looks = can_look(target) or not target.is_cpu
    valid = valid_targets(target, num_classes, ignore_index) if looks else target != ignore_index
    target = target.long() if valid is None else torch.where(valid, target, 0).long()
    # Not by one_hot, which waits for a device.
    label = torch.zeros(*target.shape, num_classes, device=target.device)
    return label.scatter(-1, target.unsqueeze(-1), 1.0), valid


def general_objective(
    logits: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    *,
    backend: str | None = None,
    return_logits: bool = True,
    valid: Tensor | None = None,
    row_loss: RowLoss | None = None,
) -> Losses:
    """``qmf_kernels.objective`` with targets ``[B, *, K]``: probabilities, as ``torch.nn.CrossEntropyLoss`` takes them.

    So a mean is over the rows that count, whatever their classes weigh, smoothing comes before the class weights, and
    there is no ``ignore_index``: ``valid``, bool ``[B, *]``, says which rows have a target. Where the targets are
    one-hot and nothing is weighted, both are the same. ``row_loss`` stands in for the cross-entropy, of the fused row
    too; the losses of the samples, which a trajectory records, are cross-entropies all the same.
    """
    fused, weights, energy = qmf_kernels.fuse(logits, present, weight_rule, backend)
    own = (energy < torch.inf).unsqueeze(-1)  # [M, B, *, 1]
    if valid is not None:
        own = own & valid.unsqueeze(-1)
    rows = torch.where(own, torch.stack([x.to(fused.dtype) for x in logits]), 0)
    # A sample with no modality, or whose modalities rule every class out between them, has no fused loss.
    some = torch.isfinite(torch.logsumexp(fused.detach(), -1, keepdim=True)) & own.any(0)
    counted = torch.cat([own, some.unsqueeze(0)]).squeeze(-1)
    rows = torch.cat([rows, torch.where(some, fused, 0).unsqueeze(0)])
    log_probs = torch.log_softmax(rows if row_loss is None else rows[:-1].detach(), -1)

    target = target.to(log_probs.dtype)
    smoothed = target * (1 - loss_rule.label_smoothing) + loss_rule.label_smoothing / target.shape[-1]
    if loss_rule.class_weight is not None:
        smoothed = smoothed * loss_rule.class_weight.to(smoothed.dtype)
    each = _cross_entropies(log_probs, smoothed) if row_loss is None else row_loss(rows, smoothed)
    losses = torch.where(counted, each, 0).flatten(1)
    means = losses.sum(1) / counted.flatten(1).sum(1).clamp_min(1)
    plain = _cross_entropies(log_probs[: len(own)].detach(), target.detach())
    sample_losses = sample_means(plain.unsqueeze(-1), own)

    ranking_loss = means.new_zeros(())
    if kappa is not None:
        ranked = ~sample_losses.isnan()
        sample_weights = torch.where(ranked, sample_means(weights.unsqueeze(-1), own), 0)
        kappa = torch.where(ranked, kappa.to(sample_weights.dtype), torch.nan)
        ranking_loss = qmf_kernels.rank(sample_weights, kappa, loss_rule.form, loss_rule.pairs)
    return Losses(
        loss=means.sum() + loss_rule.ranking_weight * ranking_loss,
        fused_loss=means[-1],
        unimodal_losses=means[:-1],
        ranking_loss=ranking_loss,
        logits=fused if return_logits else fused.new_empty((0,)),
        weights=weights,
        energy=energy,
        sample_losses=sample_losses,
    )


def _cross_entropies(log_probs: Tensor, target: Tensor) -> Tensor:
    """``[S, *]`` of ``[S, *, K]`` and ``[*, K]``; a class that is ruled out and has no share is no loss."""
    return -(target * log_probs.masked_fill((target == 0) & (log_probs == -torch.inf), 0)).sum(-1)
