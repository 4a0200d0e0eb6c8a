"""What the launches of a step write, and leave for each other."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..rules import LossRule, WeightRule
from .config import plan_slots, split_number


class Memory(NamedTuple):
    """Pointers (and one number) that kernels share; None where they are not needed.

    First those of rows, which in the bookkeeping of dense prediction are each sample's means (and sums of numerators
    and denominators); then those of the batch. What is M + 1 has the fused row after the modalities.
    """

    weights: Any = None  # [M, R]
    energy: Any = None  # [M, R]
    fused: Any = None  # [R, K], with strides after the M heads'
    losses: Any = None  # [M + 1, R], NaN where there is none
    numerator: Any = None  # [M + 1, R], the rows' shares in their mean losses
    denominator: Any = None
    stats: Any = None  # [slots, R], see ``config.Slots``
    past: Any = None  # [2, M, B], see ``history``; or kappa [M, B], where there is no history
    loss: Any = None
    fused_loss: Any = None
    unimodal_losses: Any = None  # [M]
    ranking_loss: Any = None
    inverse: Any = None  # [M + 1], one over each mean's denominator
    ranking_grad: Any = None  # [M, B]; None: without ranking
    ranking_weight: Any = None  # in two parts
    partial: Any = None  # float64 [3 M + 3, programs], each program's sums
    counter: Any = None  # int32, of the programs that have finished


def allocate(kept: Sequence[Tensor], rows: Tensor, loss_rule: LossRule, programs: int) -> Memory:
    """For an objective that leaves ``kept`` and whose bookkeeping takes so many programs."""
    new, num, num_rows = rows.new_empty, len(rows), rows[0].numel()
    return recall(kept, loss_rule)._replace(
        weights=new(rows.shape),
        energy=new(rows.shape),
        losses=new((num + 1, num_rows)),
        numerator=new((num + 1, num_rows)),
        denominator=new((num + 1, num_rows)),
        loss=new(()),
        fused_loss=new(()),
        unimodal_losses=new((num,)),
        ranking_loss=new(()),
        partial=new((3 * num + 3, programs), dtype=torch.float64),
        counter=new((1,), dtype=torch.int32),
    )


def new_kept(rows: Tensor, ranks: bool, rule: WeightRule, loss_rule: LossRule) -> list[Tensor]:
    """Memory for what an objective keeps for its backward: stats, inverse, and the ranking's gradient, empty without
    ranking. ``rows`` is ``[M, B, *]`` in the accumulating dtype.
    """
    num, batch = rows.shape[:2]
    stats = rows.new_empty((plan_slots(num, rule, loss_rule).size, rows[0].numel()))
    return [stats, rows.new_empty((num + 1,)), rows.new_empty((num, batch) if ranks else (0,))]


def recall(kept: Sequence[Tensor], loss_rule: LossRule) -> Memory:
    """From what an objective kept to what its backward reads."""
    stats, inverse, ranking_grad = kept
    return Memory(
        stats=stats,
        inverse=inverse,
        ranking_grad=ranking_grad if ranking_grad.numel() else None,
        ranking_weight=split_number(float(loss_rule.ranking_weight)),
    )


def contiguous(record: Any) -> Any:
    """The record with its tensors contiguous, for kernels that take them to be."""
    return record._replace(**{name: x.contiguous() for name, x in record._asdict().items() if isinstance(x, Tensor)})
