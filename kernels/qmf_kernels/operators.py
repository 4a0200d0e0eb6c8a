"""The operators in the namespace ``qmf``: schemas, implementations and fakes (``autograd`` makes them differentiable).

``objective`` returns the losses and three lists, each empty unless it applies: the gradients of
the loss with respect to the logits, in the accumulating dtype (``gradients``), those of what made the weights
(``maker_gradients``), and what Triton's forward leaves for its backward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fusion, objective, trajectory
from .fusion import WeightRule, accumulate_dtype
from .objective import Losses, LossRule
from .ranking import ranking
from .registry import define, fused, takes_triton
from .small import small_objective

_RULE = (
    "Tensor? weights, Tensor alpha, Tensor beta, Tensor? temperature, Tensor? static, bool nonnegative, "
    "bool normalize, str uncertainty, str combine, float? normalize_logits, float odds"
)
_W, _L = len(WeightRule._fields), len(LossRule._fields)
_LOSS_RULE = "Tensor? class_weight, float label_smoothing, int ignore_index, float ranking_weight, str form, str pairs"
_LOSS_GRADS = ", ".join(f"Tensor? grad_{name}" for name in Losses._fields[:7])
_INPUTS = f"Tensor[] logits, Tensor target, Tensor? kappa, Tensor? present, {_RULE}, {_LOSS_RULE}"
_FLAGS = "bool detach_weights, bool gradients, bool maker_gradients, bool return_logits, str? backend"
_LOSSES = f"({', '.join(['Tensor'] * len(Losses._fields))}, Tensor[], Tensor[], Tensor[])"


def _fake_makers(per_row: Tensor) -> list[Tensor]:
    return [per_row.new_empty(per_row.shape), *(per_row.new_empty((len(per_row),)) for _ in range(3))]


def per_row(logits: Sequence[Tensor]) -> Tensor:
    """An empty ``[M, *]`` in the accumulating dtype."""
    return logits[0].new_empty((len(logits), *logits[0].shape[:-1]), dtype=accumulate_dtype(logits))


def _fake_like(x: Tensor, dtype: torch.dtype, backend: str | None) -> Tensor:
    """Triton's kernels leave results as the logits lie, PyTorch's operations as ``[*, K]``."""
    return torch.empty_like(x, dtype=dtype) if takes_triton(x.device, backend) else x.new_empty(x.shape, dtype=dtype)


def _makers(grads: fusion.MakerGrads | None, wanted: bool) -> list[Tensor]:
    return [] if grads is None or not wanted else list(grads)


# Ranking (Eq. 15 to 17)


def _ranking_triton(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    return (
        fused().ranking(weights, kappa, form, pairs)
        if takes_triton(weights.device, None)
        else ranking(weights, kappa, form, pairs)
    )


def _ranking_fake(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    return weights.new_empty(()), weights.new_empty(weights.shape)


define(
    "ranking(Tensor weights, Tensor kappa, str form, str pairs) -> (Tensor, Tensor)",
    ranking,
    _ranking_triton,
    _ranking_fake,
)


# The loss history (Eq. 14)


def _record_triton(*inputs: Any) -> None:
    (fused().record if takes_triton(inputs[0].device, None) else trajectory.record)(*inputs)


define(
    "record(Tensor(a!) history, Tensor(b!) low, Tensor(c!) span, Tensor(d!)? visits, int start_epoch, Tensor losses, "
    "Tensor index) -> ()",
    trajectory.record,
    _record_triton,
    lambda *_: None,
)


# Fusion alone (Eq. 13, 9, 11)


def fuse(logits: Sequence[Tensor], present: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    rule, backend = WeightRule(*rest[:_W]), rest[_W]
    run = fused().fuse if takes_triton(logits[0].device, backend) else fusion.fuse
    return run(logits, present, rule)


def _fuse_fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    row = per_row(logits)
    return _fake_like(logits[0], row.dtype, rest[-1]), row, row.new_empty(row.shape)


def fuse_backward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments as in the schema."""
    grads, energy, logits, present, rest = inputs[:3], inputs[3], inputs[4], inputs[5], inputs[6:]
    rule, (detach_weights, maker_gradients, backend) = WeightRule(*rest[:_W]), rest[_W:]
    if takes_triton(energy.device, backend):
        d_logits, d_makers = fused().fuse_backward(grads, energy, logits, rule, detach_weights, maker_gradients)
    else:
        d_logits, d_makers = fusion.fuse_backward(grads, logits, present, rule, detach_weights)
    return d_logits, _makers(d_makers, maker_gradients)


def _fuse_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    grad_weights, logits, (maker_gradients, backend) = inputs[1], inputs[4], inputs[-2:]
    return [_fake_like(x, x.dtype, backend) for x in logits], _fake_makers(grad_weights) if maker_gradients else []


define(
    f"fuse(Tensor[] logits, Tensor? present, {_RULE}, str? backend) -> (Tensor, Tensor, Tensor)", fuse, fuse, _fuse_fake
)
define(
    "fuse_backward(Tensor grad_fused, Tensor grad_weights, Tensor grad_energy, Tensor energy, Tensor[] logits, "
    f"Tensor? present, {_RULE}, bool detach_weights, bool maker_gradients, str? backend) -> (Tensor[], Tensor[])",
    fuse_backward,
    fuse_backward,
    _fuse_backward_fake,
)


# The objective (Eq. 18)


def run_objective(
    logits: Sequence[Tensor], target: Tensor, kappa: Tensor | None, present: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    """Arguments as in the schema."""
    rules = WeightRule(*rest[:_W]), LossRule(*rest[_W : _W + _L])
    detach_weights, gradients, maker_gradients, return_logits, backend = rest[_W + _L :]
    inputs = (logits, target, kappa, present, *rules, detach_weights, gradients, maker_gradients)
    if takes_triton(logits[0].device, backend):
        losses, d_logits, d_makers, kept = fused().objective(*inputs, return_logits)
        return *losses, d_logits, _makers(d_makers, True), kept
    losses, d_logits, d_makers = small_objective(*inputs) or objective.objective(*inputs)
    if not return_logits:
        losses = Losses(*losses[:4], losses.fused.new_empty((0,)), *losses[5:])
    return *losses, d_logits, d_makers, []


def _objective_fake(logits: Sequence[Tensor], _: Any, kappa: Any, __: Any, *rest: Any) -> tuple[Any, ...]:
    weight_rule, loss_rule = WeightRule(*rest[:_W]), LossRule(*rest[_W : _W + _L])
    _, gradients, maker_gradients, return_logits, backend = rest[_W + _L :]
    num, shape = len(logits), logits[0].shape
    rows = per_row(logits)
    new = rows.new_empty
    out = Losses(
        loss=new(()),
        fused_loss=new(()),
        unimodal_losses=new((num,)),
        ranking=new(()),
        fused=_fake_like(logits[0], rows.dtype, backend) if return_logits else new((0,)),
        weights=rows,
        energy=new(rows.shape),
        sample_losses=new((num, shape[0])),
    )
    d_logits = [_fake_like(x, rows.dtype, backend) for x in logits if gradients]
    d_makers = _fake_makers(rows) if gradients and maker_gradients else []
    kept = []
    if takes_triton(rows.device, backend):
        kept = fused().fake_kept(rows, kappa is not None, weight_rule, loss_rule)
    return *out, d_logits, d_makers, kept


def objective_backward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Arguments as in the schema."""
    grads, (logits, target, kappa, present), rest = inputs[:7], inputs[7:11], inputs[11:]
    rules: Any = (WeightRule(*rest[:_W]), LossRule(*rest[_W : _W + _L]))
    detach_weights, maker_gradients, d_logits, d_makers, kept, backend = rest[_W + _L :]
    # Under torch.compile, fused logits that were left out have a gradient too, as empty as they are.
    grads = tuple(None if grad is not None and not grad.numel() else grad for grad in grads)
    scale = grads[0]
    if d_logits and scale is not None and not any(_may_differ_from_zero(grad) for grad in grads[1:]):
        d_logits, d_makers = [d * scale for d in d_logits], [d * scale for d in d_makers]
    elif takes_triton(logits[0].device, backend):
        if not kept:
            inputs = (logits, target, kappa, present, *rules, detach_weights, False, False, False)
            kept = fused().objective(*inputs)[3]
        flags = (detach_weights, maker_gradients)
        d_logits, d_makers = fused().objective_backward(grads, kept, logits, target, *rules, *flags)
    else:
        inputs = (logits, target, kappa, present, *rules, detach_weights)
        d_logits, d_makers = objective.objective_backward(grads, *inputs)
    d_logits = [grad.to(x.dtype) for grad, x in zip(d_logits, logits, strict=True)]
    if not maker_gradients:
        return d_logits, []
    return d_logits, list(d_makers) or [torch.zeros_like(x) for x in _fake_makers(per_row(logits))]


def _may_differ_from_zero(grad: Tensor | None) -> bool:
    """Under torch.compile, unused outputs have gradients of zeros; on a device, looking would mean waiting."""
    return grad is not None and not (grad.is_cpu and all(x.item() == 0 for x in torch.aminmax(grad)))


def _objective_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    logits, maker_gradients, backend = inputs[7], inputs[-5], inputs[-1]
    return [_fake_like(x, x.dtype, backend) for x in logits], _fake_makers(per_row(logits)) if maker_gradients else []


define(f"objective({_INPUTS}, {_FLAGS}) -> {_LOSSES}", run_objective, run_objective, _objective_fake)
define(
    f"objective_backward({_LOSS_GRADS}, {_INPUTS}, bool detach_weights, bool maker_gradients, Tensor[] d_logits, "
    "Tensor[] d_makers, Tensor[] kept, str? backend) -> (Tensor[], Tensor[])",
    objective_backward,
    objective_backward,
    _objective_backward_fake,
)
