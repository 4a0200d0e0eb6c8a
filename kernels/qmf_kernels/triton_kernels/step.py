"""The objective (Eq. 18) of a training step: three launches, or one where the batch is small.

Shape contract as in ``eager.objective``: M heads' ``logits`` ``[B, *, K]`` of any strides and floating dtypes,
``target`` ``[B, *]`` int64, ``present`` bool ``[M, *]`` or None, all on one device. Shapes, dtypes and devices are
checked by whoever calls; targets and indices by the kernels, where they lie. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..eager.fusion import accumulate_dtype
from ..rules import Losses, LossGrads, LossRule, Past, RuleGrads, WeightRule
from . import tiling
from .backward import launch_backward
from .bookkeeping import launch_bookkeeping
from .config import make_config
from .cross_entropy import make_labels
from .forward import launch_forward
from .history import make_trajectory
from .memory import Memory, allocate, contiguous
from .positions import sample_means
from .rows import lay_out, put_back
from .single import launch_single


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
    num, first, dtype, batch = len(logits), logits[0], accumulate_dtype(logits), logits[0].shape[0]
    alone = gradients and not rule_gradients and is_small(logits, loss_rule.pairs)
    block = tiling.sample_block(batch, loss_rule.pairs, alone)
    config = make_config(num, dtype, weight_rule, loss_rule)
    ranks = kappa is not None if past is None else past.ranks
    memory = allocate(logits, weight_rule, loss_rule, dtype, ranks, -(-batch // block.samples))
    trajectory = None
    if past is None:
        memory = memory._replace(past=None if kappa is None else kappa.contiguous())
    elif past.ranks or past.records:
        memory = memory._replace(past=first.new_empty((2, num, batch), dtype=torch.float64))
        trajectory = make_trajectory(past)
        config = config._replace(reads=True, minmax=past.minmax, records=past.records)
    fused = torch.empty_like(first, dtype=dtype) if return_logits else first.new_empty((0,), dtype=dtype)
    inputs, written = lay_out(logits, present, [fused] if return_logits else [])
    if return_logits:
        memory = memory._replace(fused=written[0])
    rule, labels = contiguous(weight_rule), make_labels(target, loss_rule)
    kept = [memory.stats, memory.inverse, memory.ranking_grad if ranks else first.new_empty((0,), dtype=dtype)]
    if alone:
        d_logits = [torch.empty_like(x, dtype=dtype) for x in logits]
        launch_single(inputs, rule, labels, trajectory, memory, d_logits, config._replace(block=block))
        return _losses(memory, fused), d_logits, None, kept

    launch_forward(inputs, rule, labels, trajectory, memory, batch, config)
    put_back(written, [fused] if return_logits else [])
    samples = sample_means(memory, batch, config) if first.dim() > 2 else memory
    launch_bookkeeping(samples, trajectory, batch, config._replace(block=block))
    losses = _losses(memory, fused)._replace(sample_losses=samples.losses[:num])
    if not gradients:
        return losses, [], None, kept
    config = config._replace(unit=True)
    d_logits, d_rule = launch_backward(LossGrads(), memory, logits, labels, rule, rule_gradients, config, dtype)
    return losses, d_logits, d_rule, kept


def _losses(memory: Memory, fused: Tensor) -> Losses:
    return Losses(
        loss=memory.loss,
        fused_loss=memory.fused_loss,
        unimodal_losses=memory.unimodal_losses,
        ranking_loss=memory.ranking_loss,
        logits=fused,
        weights=memory.weights,
        energy=memory.energy,
        sample_losses=memory.losses[:-1],
    )
