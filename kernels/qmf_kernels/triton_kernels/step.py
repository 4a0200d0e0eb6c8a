"""The objective (Eq. 18) of a training step: three launches, or one where the batch is small.

Shape contract as in ``eager.objective``: M heads' ``logits`` ``[B, *, K]`` of any strides and floating dtypes,
``target`` ``[B, *]`` int64, ``present`` bool ``[M, *]`` or None, all on one device. Shapes, dtypes and devices are
checked by whoever calls; targets and indices by the kernels, where they lie. Nothing waits for the device.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..eager.fusion import accumulate_dtype
from ..eager.objective import sample_means
from ..rules import Losses, LossGrads, ObjectiveOptions, Past, RuleGrads
from . import tiling
from .backward import launch_backward
from .bookkeeping import launch_bookkeeping
from .config import make_config
from .cross_entropy import make_labels
from .forward import launch_forward
from .history import make_trajectory
from .memory import Memory, allocate, contiguous, new_kept
from .rows import lay_out, put_back
from .single import launch_single


def is_small(logits: Sequence[Tensor], pairs: str) -> bool:
    """Whether the objective and its gradients take one launch."""
    first = logits[0]
    return first.dim() == 2 and tiling.fits_one(len(logits), first.shape[1], first.shape[0], pairs)


def objective(
    logits: Sequence[Tensor],
    given: ObjectiveOptions,
    gradients: bool,
    rule_gradients: bool,
    past: Past | None = None,
) -> tuple[Losses, list[Tensor], RuleGrads | None, list[Tensor]]:
    """Every loss of Eq. 18; where asked for, the gradients of the loss with respect to the logits, in the accumulating
    dtype, and to the rule's tensors; and what ``objective_backward`` needs. With ``past``, kappa comes from the history
    and the batch goes into it.

    Two launches, or three with ``gradients``, but one where the batch is small. In dense prediction PyTorch makes each
    sample's means between the first two.
    """
    weight_rule, loss_rule = given.weight_rule, given.loss_rule
    num, first, dtype = len(logits), logits[0], accumulate_dtype(logits)
    batch, dense = first.shape[0], first.dim() > 2
    alone = gradients and not rule_gradients and is_small(logits, loss_rule.pairs)
    block = tiling.sample_block(batch, loss_rule.pairs, alone)
    config = make_config(num, dtype, weight_rule, loss_rule)
    ranks = given.kappa is not None if past is None else past.ranks
    rows = first.new_empty((num, *first.shape[:-1]), dtype=dtype)
    kept = new_kept(rows, ranks, weight_rule, loss_rule)
    memory, trajectory = allocate(kept, rows, loss_rule, -(-batch // block.samples)), None
    if past is None:
        memory = memory._replace(past=None if given.kappa is None else given.kappa.contiguous())
    elif past.ranks or past.records:
        memory = memory._replace(past=first.new_empty((2, num, batch), dtype=torch.float64))
        trajectory = make_trajectory(past)
        config = config._replace(reads=True, minmax=past.minmax, records=past.records)
    wanted = [torch.empty_like(first, dtype=dtype)] if given.return_logits else []
    inputs, written = lay_out(logits, given.present, wanted)
    memory = memory._replace(fused=written[0] if written else None)
    rule, labels = contiguous(weight_rule), make_labels(given.target, loss_rule)
    d_logits: list[Tensor] = []
    if alone:
        samples, d_logits = memory, [torch.empty_like(x, dtype=dtype) for x in logits]
        launch_single(inputs, rule, labels, trajectory, memory, d_logits, config._replace(block=block))
    else:
        launch_forward(inputs, rule, labels, trajectory, memory, batch, config)
        put_back(written, wanted)
        samples = _average(memory, batch) if dense else memory
        launch_bookkeeping(samples, trajectory, batch, config._replace(block=block))
    if dense and ranks:  # a position's share in its sample's weight
        memory.ranking_grad.div_((memory.energy < torch.inf).flatten(2).sum(2).clamp(min=1))
    losses = Losses(
        loss=memory.loss,
        fused_loss=memory.fused_loss,
        unimodal_losses=memory.unimodal_losses,
        ranking_loss=memory.ranking_loss,
        logits=wanted[0] if wanted else first.new_empty((0,), dtype=dtype),
        weights=memory.weights,
        energy=memory.energy,
        sample_losses=samples.losses[:num],
    )
    if alone or not gradients:
        return losses, d_logits, None, kept
    config = config._replace(unit=True)
    d_logits, d_rule = launch_backward(LossGrads(), memory, logits, labels, rule, rule_gradients, config, dtype)
    return losses, d_logits, d_rule, kept


def _average(rows: Memory, batch: int) -> Memory:
    """Dense prediction: from the memory of B P rows to that of B samples."""
    dtype, losses = rows.losses.dtype, rows.losses.view(len(rows.losses), batch, -1)
    return rows._replace(
        weights=sample_means(rows.weights.double(), rows.energy < torch.inf).to(dtype),
        losses=sample_means(losses.double(), ~losses.isnan()).to(dtype),
        numerator=rows.numerator.view_as(losses).sum(2, dtype=torch.float64),
        denominator=rows.denominator.view_as(losses).sum(2, dtype=torch.float64),
    )
