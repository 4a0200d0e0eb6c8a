"""The objective (Eq. 18) of a training step: three launches, or one where the batch is small.

Shape contract as in ``eager.objective``: M heads' ``logits`` ``[B, *, K]`` of any strides and floating dtypes,
``target`` ``[B, *]`` int64, ``present`` bool ``[M, *]`` or None, all on one device. Shapes, dtypes and devices are
checked by whoever calls; targets and indices by the kernels, where they lie. Nothing waits for the device.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..eager.fusion import accumulate_dtype
from ..rules import Losses, LossGrads, LossRule, Past, RuleGrads, WeightRule
from . import tiling
from .backward import keep, launch_backward
from .bookkeeping import Results, Samples, launch_bookkeeping
from .config import has_shares, make_config, plan_slots, split_number
from .cross_entropy import make_labels
from .forward import Outputs, launch_forward
from .history import make_trajectory
from .positions import sample_means
from .rows import lay_out, put_back
from .single import launch_single
from .weights import make_coefficients


class Memory(NamedTuple):
    """What a step's results are written to, and what its launches leave for each other."""

    losses: Losses
    kept: list[Tensor]  # stats [slots, R], one over the means' denominators [M + 1], the ranking's gradient [M, B]
    past: Tensor | None
    partial: Tensor
    counter: Tensor | None


def is_small(logits: Sequence[Tensor], pairs: str) -> bool:
    """Whether the objective and its gradients take one launch."""
    first = logits[0]
    return first.dim() == 2 and tiling.fits_one(len(logits), first.shape[1], first.shape[0], pairs)


def objective(
    logits: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    gradients: bool,
    rule_gradients: bool,
    return_logits: bool,
    past: Past | None = None,
) -> tuple[Losses, list[Tensor], RuleGrads | None, list[Tensor]]:
    """Every loss of Eq. 18; where asked for, the gradients of the loss with respect to the logits, in the accumulating
    dtype, and to the rule's tensors; and what ``objective_backward`` needs. With ``past``, kappa comes from the history
    and the batch goes into it.

    Two launches (one more in dense prediction, for the samples' means), or three with ``gradients``, but one where the
    batch is small.
    """
    dtype, batch = accumulate_dtype(logits), logits[0].shape[0]
    ranks = kappa is not None if past is None else past.ranks
    records = past is not None and past.records
    alone = gradients and not rule_gradients and is_small(logits, loss_rule.pairs)
    block = tiling.sample_block(batch, loss_rule.pairs, alone)
    memory = allocate(logits, weight_rule, loss_rule, ranks, ranks or records, return_logits, block, alone)
    losses = memory.losses
    inputs, fused = lay_out(logits, present, [losses.fused] if return_logits else [])
    coefficients, labels = make_coefficients(weight_rule), make_labels(target, loss_rule)
    trajectory = make_trajectory(kappa, past)
    out = Outputs(
        weights=losses.weights,
        energy=losses.energy,
        fused=fused[0] if fused else None,
        losses=losses.sample_losses,
        stats=memory.kept[0],
        past=memory.past,
        counter=memory.counter,
    )
    samples = _find_samples(memory, weight_rule, loss_rule)
    results = _find_results(memory, loss_rule)
    config = make_config(len(logits), dtype, weight_rule, loss_rule)._replace(
        minmax=past is not None and past.minmax, records=records
    )
    kept = keep(memory.kept, loss_rule)
    if alone:
        d_logits = [torch.empty_like(x, dtype=dtype) for x in logits]
        launch_single(inputs, coefficients, labels, trajectory, out, samples, results, kept, d_logits, block, config)
        return losses, d_logits, None, memory.kept

    launch_forward(inputs, coefficients, labels, trajectory, out, batch, config)
    if return_logits:
        put_back(fused, [losses.fused])
    if logits[0].dim() > 2:
        samples = sample_means(samples, losses.energy, batch, config)
        losses = losses._replace(sample_losses=samples.losses)
    launch_bookkeeping(samples, results, trajectory, batch, block, config)
    if not gradients:
        return losses, [], None, memory.kept
    config = config._replace(unit=True)
    d_logits, d_rule = launch_backward(
        LossGrads(), kept, logits, labels, weight_rule, config, rule_gradients, grad_dtype=dtype
    )
    return losses, d_logits, d_rule, memory.kept


def new_kept(rows: Tensor, ranks: bool, weight_rule: WeightRule, loss_rule: LossRule) -> list[Tensor]:
    """Memory for what ``objective`` keeps; ``rows`` is ``[M, B, *]`` in the accumulating dtype."""
    num, batch = rows.shape[:2]
    stats = rows.new_empty((plan_slots(num, weight_rule, loss_rule).size, rows[0].numel()))
    return [stats, rows.new_empty((num + 1,)), rows.new_empty((num, batch) if ranks else (0,))]


def allocate(
    logits: Sequence[Tensor],
    weight_rule: WeightRule,
    loss_rule: LossRule,
    ranks: bool,
    reads: bool,
    return_logits: bool,
    block: tiling.Block,
    alone: bool,
) -> Memory:
    """``reads``: kappa or a history."""
    num, first, dtype = len(logits), logits[0], accumulate_dtype(logits)
    batch = first.shape[0]
    energy = first.new_empty((num, *first.shape[:-1]), dtype=dtype)
    new = energy.new_empty
    losses = Losses(
        loss=new(()),
        fused_loss=new(()),
        unimodal_losses=new((num,)),
        ranking=new(()),
        fused=torch.empty_like(first, dtype=dtype) if return_logits else new((0,)),
        weights=new(energy.shape),
        energy=energy,
        sample_losses=new((num, energy[0].numel())),
    )
    programs = -(-batch // block.samples)
    return Memory(
        losses=losses,
        kept=new_kept(energy, ranks, weight_rule, loss_rule),
        past=new((2, num, batch), dtype=torch.float64) if reads else None,
        partial=new((3 * num + 3, programs), dtype=torch.float64),
        counter=None if alone else new((1,), dtype=torch.int32),
    )


def _find_samples(memory: Memory, weight_rule: WeightRule, loss_rule: LossRule) -> Samples:
    losses, stats = memory.losses, memory.kept[0]
    slots = plan_slots(len(losses.weights), weight_rule, loss_rule)
    shares = has_shares(loss_rule)
    return Samples(
        weights=losses.weights,
        losses=losses.sample_losses,
        fused_loss=stats[slots.fused_loss],
        numerator=stats[slots.numerator] if shares else None,
        denominator=stats[slots.denominator] if shares else None,
        past=memory.past,
        positions=None,
    )


def _find_results(memory: Memory, loss_rule: LossRule) -> Results:
    losses, (_, inverse, ranking_grad) = memory.losses, memory.kept
    return Results(
        loss=losses.loss,
        fused_loss=losses.fused_loss,
        unimodal_losses=losses.unimodal_losses,
        ranking=losses.ranking,
        inverse=inverse,
        ranking_grad=ranking_grad if ranking_grad.numel() else None,
        ranking_weight=split_number(float(loss_rule.ranking_weight)),
        partial=memory.partial,
        counter=memory.counter,
    )
