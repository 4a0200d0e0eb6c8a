"""The launchers: what the operators of ``qmf_kernels`` compute, by fused kernels.

Shape contract as in ``qmf_kernels.objective``: M heads' ``logits`` ``[B, *, K]`` of any strides and floating dtypes,
``target`` ``[B, *]`` int64, ``present`` bool ``[M, *]`` or None, all on one device. Three launches make a training step
(one more in dense prediction, for the samples' means), one where the batch is small; none waits for the device.
Shapes, dtypes and devices are checked by whoever calls; targets and indices by the kernels, where they lie.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..fusion import MakerGrads, WeightRule, accumulate_dtype
from ..objective import Losses, LossRule
from ..trajectory import Past
from .arguments import (
    TYPES,
    Rows,
    give_back,
    launch,
    lay_rows,
    make_labels,
    make_makers,
    make_rules,
    make_trajectory,
    ranking_rules,
    recording_rules,
    row_constants,
)
from .backward import Kept, MakerOut, backward_kernel
from .bookkeeping import Results, Samples, bookkeeping_kernel
from .forward import forward_kernel
from .gradients import Grads
from .history import record_kernel
from .positions import positions_kernel
from .ranking import ranking_kernel
from .rows import Labels, Rules, Stats, plan_stats, split_number
from .single import scale_kernel, single_kernel
from .tiling import fits_one, sample_block, tile

__all__ = [
    "fake_kept",
    "fuse",
    "fuse_backward",
    "is_small",
    "objective",
    "objective_backward",
    "ranking",
    "record",
    "scale_gradients",
]

_NO_GRADS = Grads(None, None, None, None, None, None, None)
_NO_MAKERS = MakerOut(None, None)
_SCALE_BLOCK = 1024


class Made(NamedTuple):
    """What the forward leaves for the backward: stats, one over each mean's denominator, and the ranking's gradient."""

    stats: Tensor
    inverse: Tensor
    ranking_grad: Tensor  # empty without ranking


def fake_kept(rows: Tensor, ranks: bool, weight_rule: WeightRule, loss_rule: LossRule) -> list[Tensor]:
    """Empty tensors like those of ``Made``; ``rows`` is ``[M, B, *]`` in the accumulating dtype."""
    slots = plan_stats(len(rows), make_rules(weight_rule, loss_rule))
    num, batch = rows.shape[:2]
    ranking_grad = rows.new_empty((num, batch) if ranks else (0,))
    return [rows.new_empty((slots.size, rows[0].numel())), rows.new_empty((num + 1,)), ranking_grad]


def is_small(logits: Sequence[Tensor], pairs: str) -> bool:
    """Whether the objective and its gradients take one launch."""
    first = logits[0]
    return first.dim() == 2 and fits_one(len(logits), first.shape[1], first.shape[0], pairs)


# Fusion alone (Eq. 13, 9, 11)


def fuse(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits ``[*, K]``, weights and energies ``[M, *]``: one launch."""
    dtype, first = accumulate_dtype(logits), logits[0]
    fused = torch.empty_like(first, dtype=dtype)
    weights, energy = (first.new_empty((len(logits), *first.shape[:-1]), dtype=dtype) for _ in range(2))
    rows = lay_rows(logits, present, fused)
    rules = make_rules(rule)
    tiling = tile(len(logits), rows.num_classes, rows.num_rows, dtype == torch.float64, crowded=rules.crowded)
    launch(
        forward_kernel,
        -(-rows.num_rows // tiling.rows),
        first.device,
        *(rows.logits, rows.layout.sizes, rows.layout.strides, rows.present, rows.layout.present_strides),
        *(make_makers(rule), None, None, None, rows.extra[0], weights, energy, None, None, None),
        *(rows.num_rows, rows.num_classes, 1),
        **row_constants(rows, rules, plan_stats(len(logits), rules), dtype, tiling),
    )
    give_back(rows.extra, [fused])
    return fused, weights, energy


def fuse_backward(
    grads: Sequence[Tensor],
    energy: Tensor,
    logits: Sequence[Tensor],
    rule: WeightRule,
    detach_weights: bool,
    maker_gradients: bool,
) -> tuple[list[Tensor], MakerGrads | None]:
    """Gradients of the logits and of what made the weights: one launch, and one to sum up the latter."""
    given = _NO_GRADS._replace(fused=grads[0], weights=grads[1].contiguous(), energy=grads[2].contiguous())
    kept = Kept(None, None, None, energy.contiguous())
    rules = make_rules(rule, detach=detach_weights)
    return _backward(given, kept, logits, None, rule, rules, 0.0, maker_gradients)


# Ranking alone (Eq. 15 to 17)


def ranking(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    """The ranking loss and its gradient with respect to ``weights`` ``[M, B]``: one launch, and one for the sum."""
    num, batch = weights.shape
    block = sample_block(batch, pairs)
    programs = -(-batch // block.samples)
    weights = weights.contiguous()
    grad, partial = torch.empty_like(weights), weights.new_empty((programs,), dtype=torch.float64)
    launch(
        ranking_kernel,
        programs,
        weights.device,
        *(weights, kappa.contiguous(), grad, partial, batch),
        **{"M": num, "SB": block.samples, "JB": block.partners, "RULES": ranking_rules(form, pairs)},
        **{"ACC": TYPES[weights.dtype], "num_warps": block.warps},
    )
    return partial.sum().to(weights.dtype), grad


# The loss history (Eq. 14)


def record(
    history: Tensor, low: Tensor, span: Tensor, visits: Tensor | None, start_epoch: int, losses: Tensor, index: Tensor
) -> None:
    """``trajectory.record``: one launch of one program."""
    num, batch = losses.shape
    past = history.new_empty((2, num, batch))
    trajectory = Past(history, low, span, visits, index, start_epoch, minmax=True, ranks=False, records=True)
    launch(
        record_kernel,
        1,
        history.device,
        *(make_trajectory(None, trajectory), losses.contiguous(), past, batch),
        **{"M": num, "SB": 1024, "RULES": recording_rules(), "num_warps": 8},
    )


# The objective (Eq. 18)


class _Outputs(NamedTuple):
    """Memory for everything that the forward and the bookkeeping write."""

    losses: Losses
    made: Made
    past: Tensor | None


def _allocate(
    logits: Sequence[Tensor], dtype: torch.dtype, num_rows: int, slots: Stats, fused: Tensor, ranks: bool, reads: bool
) -> _Outputs:
    num, shape = len(logits), logits[0].shape
    new = logits[0].new_empty
    losses = Losses(
        *(new((), dtype=dtype), new((), dtype=dtype), new((num,), dtype=dtype), new((), dtype=dtype), fused),
        *(new((num, *shape[:-1]), dtype=dtype), new((num, *shape[:-1]), dtype=dtype)),
        sample_losses=new((num, num_rows), dtype=dtype),
    )
    ranking_grad = new((num, shape[0]) if ranks else (0,), dtype=dtype)
    made = Made(new((slots.size, num_rows), dtype=dtype), new((num + 1,), dtype=dtype), ranking_grad)
    return _Outputs(losses, made, new((2, num, shape[0]), dtype=torch.float64) if reads else None)


def objective(
    logits: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    detach_weights: bool,
    gradients: bool,
    maker_gradients: bool,
    return_logits: bool,
    past: Past | None = None,
) -> tuple[Losses, list[Tensor], MakerGrads | None, list[Tensor]]:
    """Every loss of Eq. 18; the gradients of the loss with respect to the logits, in the accumulating dtype, and to
    what made the weights, where asked for; and what ``objective_backward`` needs. With ``past``, kappa comes from the
    history and the batch goes into it.

    Two launches, or three with ``gradients``, but one where the batch is small.
    """
    num, first = len(logits), logits[0]
    dtype, batch = accumulate_dtype(logits), first.shape[0]
    fused = torch.empty_like(first, dtype=dtype) if return_logits else first.new_empty((0,), dtype=dtype)
    rows = lay_rows(logits, present, *([fused] if return_logits else []))
    positions = rows.num_rows // batch
    ranks = kappa is not None if past is None else past.ranks
    single = gradients and not maker_gradients and is_small(logits, loss_rule.pairs)
    rules = make_rules(weight_rule, loss_rule, detach_weights, single, ranks, past)
    slots = plan_stats(num, rules)
    out = _allocate(logits, dtype, rows.num_rows, slots, fused, ranks, rules.reads)
    losses, made = out.losses, out.made
    block = sample_block(batch, loss_rule.pairs, alone=single)
    programs = -(-batch // block.samples)
    partial = first.new_empty((3 * num + 3, programs), dtype=torch.float64)
    trajectory, labels = make_trajectory(kappa, past), make_labels(target, loss_rule)
    heavy = dtype == torch.float64 or (single and rules.tempered and rules.smoothing)
    tiling = tile(num, rows.num_classes, rows.num_rows, heavy, single, rules.crowded)
    where = (rows.logits, rows.layout.sizes, rows.layout.strides, rows.present, rows.layout.present_strides)
    written = (
        made.stats,
        rows.extra[0] if return_logits else None,
        losses.weights,
        losses.energy,
        losses.sample_losses,
    )
    samples = Samples(losses.weights, losses.sample_losses, made.stats[slots.fused_loss], out.past, None, None, None)
    if positions == 1 and (rules.weighted or rules.smoothing):
        samples = samples._replace(numerator=made.stats[slots.numerator], denominator=made.stats[slots.denominator])
    ranking_grad = made.ranking_grad if ranks else None
    results = Results(
        losses.loss, losses.fused_loss, losses.unimodal_losses, losses.ranking, made.inverse, ranking_grad
    )
    ranking_weight = split_number(float(loss_rule.ranking_weight))
    constants = row_constants(rows, rules, slots, dtype, tiling)
    by_samples = {"SB": block.samples, "JB": block.partners}
    if single:
        d_logits = [torch.empty_like(x, dtype=dtype) for x in logits]
        del constants["DIMS"]
        launch(
            single_kernel,
            1,
            first.device,
            *(*where, make_makers(weight_rule), labels, trajectory, samples, results, partial, ranking_weight),
            *(*written, _NO_GRADS, Kept(made.stats, made.inverse, ranking_grad, None)),
            *(tuple(d_logits), tuple((d.stride(0), d.stride(-1)) for d in d_logits), _NO_MAKERS, batch),
            rows.num_classes,
            **constants,
            **by_samples,
        )
        return losses, d_logits, None, list(made)

    counter = first.new_empty((1,), dtype=torch.int32)
    launch(
        forward_kernel,
        -(-rows.num_rows // tiling.rows),
        first.device,
        *(*where, make_makers(weight_rule), labels, trajectory, *written, out.past, counter),
        *(rows.num_rows, rows.num_classes, positions),
        **constants,
    )
    if return_logits:
        give_back(rows.extra, [fused])
    if positions > 1 or first.dim() > 2:
        samples = _sample_means(samples, losses.energy, made.stats, batch, positions, rules, slots)
        losses = Losses(*losses[:7], samples.losses)
    launch(
        bookkeeping_kernel,
        programs,
        first.device,
        *(samples, results, trajectory, partial, counter, batch, ranking_weight),
        **{"M": num, **by_samples, "GB": 128, "RULES": rules, "ACC": TYPES[dtype], "num_warps": block.warps},
    )
    if not gradients:
        return losses, [], None, list(made)
    rules = make_rules(weight_rule, loss_rule, detach_weights, unit=True)
    kept = Kept(made.stats, made.inverse, ranking_grad, None)
    d_logits, d_makers = _backward(
        _NO_GRADS, kept, logits, labels, weight_rule, rules, loss_rule.ranking_weight, maker_gradients, dtype
    )
    return losses, d_logits, d_makers, list(made)


def objective_backward(
    grads: Sequence[Tensor | None],
    kept: Sequence[Tensor],
    logits: Sequence[Tensor],
    target: Tensor,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    detach_weights: bool,
    maker_gradients: bool,
) -> tuple[list[Tensor], MakerGrads | None]:
    """From gradients of the first seven of ``Losses`` (None is zero): one launch, and one more for the makers' sums."""
    loss, fused_loss, unimodal_losses, of_ranking, fused, weights, energy = grads
    given = Grads(
        *(loss, fused_loss, None if unimodal_losses is None else unimodal_losses.contiguous(), of_ranking, fused),
        *(None if x is None else x.contiguous() for x in (weights, energy)),
    )
    made = Made(*kept)
    ranking_grad = made.ranking_grad if made.ranking_grad.numel() else None
    return _backward(
        given,
        Kept(made.stats, made.inverse, ranking_grad, None),
        logits,
        make_labels(target, loss_rule),
        weight_rule,
        make_rules(weight_rule, loss_rule, detach_weights),
        loss_rule.ranking_weight,
        maker_gradients,
    )


def scale_gradients(d_logits: Sequence[Tensor], scale: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
    """``d_logits`` times the scalar ``scale``, in the logits' dtypes; in place where those are theirs: one launch."""
    in_place = all(d.dtype == x.dtype for d, x in zip(d_logits, logits, strict=True))
    # Dense tensors of one shape and the same strides: what follows in memory is all that counts.
    out = d_logits if in_place else [torch.empty_like(d, dtype=x.dtype) for d, x in zip(d_logits, logits, strict=True)]
    size = d_logits[0].numel()
    launch(
        scale_kernel,
        -(-size // _SCALE_BLOCK),
        logits[0].device,
        *(tuple(d_logits), scale, tuple(out), size),
        **{"M": len(logits), "BLOCK": _SCALE_BLOCK, "IN_PLACE": in_place, "num_warps": 4},
    )
    return list(out)


def _backward(
    grads: Grads,
    kept: Kept,
    logits: Sequence[Tensor],
    labels: Labels | None,
    rule: WeightRule,
    rules: Rules,
    ranking_weight: float,
    maker_gradients: bool,
    grad_dtype: torch.dtype | None = None,  # default: the logits' own
) -> tuple[list[Tensor], MakerGrads | None]:
    num, first = len(logits), logits[0]
    dtype = accumulate_dtype(logits)
    d_logits = [torch.empty_like(x, dtype=grad_dtype) for x in logits]
    rows = lay_rows(logits, None, *d_logits, *([] if grads.fused is None else [grads.fused]))
    written, incoming = rows.extra[:num], rows.extra[num:]
    strides = rows.layout.strides
    tiling = tile(num, rows.num_classes, rows.num_rows, dtype == torch.float64, crowded=rules.crowded)
    programs = -(-rows.num_rows // tiling.rows)
    out = _maker_out(rule, rows, programs, dtype) if maker_gradients else _NO_MAKERS
    launch(
        backward_kernel,
        programs,
        first.device,
        *(rows.logits, rows.layout.sizes, strides[:num] + strides[2 * num :], make_makers(rule), labels),
        *(grads._replace(fused=incoming[0] if incoming else None), kept, split_number(float(ranking_weight))),
        *(written, strides[num : 2 * num], out, rows.num_rows, rows.num_classes),
        rows.num_rows // first.shape[0],
        **row_constants(rows, rules, plan_stats(num, rules), dtype, tiling),
    )
    give_back(written, d_logits)
    return d_logits, _maker_grads(out, rule, rows) if maker_gradients else None


def _maker_out(rule: WeightRule, rows: Rows, programs: int, dtype: torch.dtype) -> MakerOut:
    num, first = len(rows.logits), rows.logits[0]
    given = None if rule.weights is None else first.new_empty((num, *first.shape[:-1]), dtype=dtype)
    return MakerOut(given, first.new_empty((3 if rule.temperature is not None else 2, num, programs), dtype=dtype))


def _maker_grads(out: MakerOut, rule: WeightRule, rows: Rows) -> MakerGrads:
    num, first = len(rows.logits), rows.logits[0]
    sums = out.sums.sum(2)
    zeros = sums.new_zeros(num)
    weights = sums.new_zeros((num, *first.shape[:-1])) if out.weights is None else out.weights
    alpha, beta = (zeros, zeros.clone()) if rule.weights is not None else (sums[0].clone(), sums[1].clone())
    return MakerGrads(weights, alpha, beta, zeros.clone() if rule.temperature is None else sums[2].clone())


def _sample_means(
    samples: Samples, energy: Tensor, stats: Tensor, batch: int, positions: int, rules: Rules, slots: Stats
) -> Samples:
    """Each sample's means over its positions."""
    num = len(samples.weights)
    weights, losses, counts = (stats.new_empty((num, batch)) for _ in range(3))
    numerator, denominator = (stats.new_empty((num + 1, batch), dtype=torch.float64) for _ in range(2))
    launch(
        positions_kernel,
        batch * (num + 1),
        stats.device,
        *(samples.weights, energy, samples.losses, stats, weights, losses, counts, numerator, denominator),
        *(positions, batch),
        **{"M": num, "PB": 1024, "RULES": rules, "SLOTS": slots, "ACC": TYPES[stats.dtype], "num_warps": 8},
    )
    return Samples(weights, losses, samples.fused_loss, samples.past, numerator, denominator, counts)
