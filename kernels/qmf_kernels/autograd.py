"""The operators made differentiable: each pairs a forward with its backward, once.

``torch.autograd.Function`` at half the cost per step of ``torch.library.register_autograd``.
"""

import functools
from typing import Any

import torch
from torch import Tensor

from . import operators, trajectory
from .fusion import WeightRule
from .objective import LossRule
from .registry import below_autograd, fused, ops, takes_triton
from .trajectory import Past

_W, _L = len(WeightRule._fields), len(LossRule._fields)
_MAKERS = 4  # weights, alpha, beta, temperature: the first of the rule's tensors, which have gradients
_TENSORS = 5  # the rule's tensors, its first fields
# Where Objective's arguments stand: target, kappa, present, the weights' rule, the loss's, detach_weights; the logits.
_CLASS_WEIGHT, _OTHERS, _LOGITS = 3 + _W, 3 + _W + _L + 1, 3 + _W + _L + 4
_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that has a say in what an operator does
_objective = below_autograd(operators.run_objective)
_objective_backward = below_autograd(operators.objective_backward)


def _once_differentiable(backward: Any) -> Any:
    """Let whoever differentiates the gradients fail: PyTorch's own decorator lets an incoming gradient of 1 pass."""

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        functions: Any = torch._C._functions
        error = functions.DelayedError(b"the gradients of qmf operators can't be differentiated again", len(out))
        return error(*(None if x is None else x.detach().requires_grad_() for x in out))

    return once


def _where_given(grads: Any, given: Any) -> list[Tensor | None]:
    grads = grads or [None] * 4
    return [None if tensor is None else grad for grad, tensor in zip(grads, given, strict=True)]


class Ranking(torch.autograd.Function):
    """``apply(weights, kappa, form, pairs)``: the ranking loss, differentiable in the weights."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, kappa: Tensor, form: str, pairs: str) -> Tensor:
        loss: Tensor
        loss, grad = ops.ranking.default(weights, kappa, form, pairs)
        ctx.save_for_backward(grad)
        return loss

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = ctx.saved_tensors
        return grad_loss * grad, None, None, None


class Fuse(torch.autograd.Function):
    """``apply(present, *WeightRule, detach_weights, backend, *logits)``.

    Returns fused logits ``[*, K]``, weights ``[M, *]`` and energies ``[M, *]``.
    """

    @staticmethod
    def forward(ctx: Any, present: Tensor | None, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        rule, (ctx.detach, ctx.backend), logits = inputs[:_W], inputs[_W : _W + 2], inputs[_W + 2 :]
        ctx.rule = rule[_TENSORS:]
        fused_logits, weights, energy = ops.fuse.default(logits, present, *rule, ctx.backend)
        ctx.save_for_backward(energy, present, *rule[:_TENSORS], *logits)
        return fused_logits, weights, energy

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        energy, present, *saved = ctx.saved_tensors
        tensors, logits = saved[:_TENSORS], saved[_TENSORS:]
        makers = any(ctx.needs_input_grad[1 : 1 + _MAKERS])
        d_logits, d_makers = ops.fuse_backward.default(
            *grads, energy, logits, present, *tensors, *ctx.rule, ctx.detach, makers, ctx.backend
        )
        return None, *_where_given(d_makers, tensors[:_MAKERS]), *(None,) * (_W + 2 - _MAKERS), *d_logits


class Objective(torch.autograd.Function):
    """``apply(target, kappa, present, *WeightRule, *LossRule, detach_weights, backend, return_logits, past, *logits)``.

    Returns ``Losses``, the per-sample losses without a gradient. With ``past`` (``trajectory.Past`` or None), kappa
    comes from the history and the batch goes into it.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        others, (backend, return_logits, past), logits = inputs[:_OTHERS], inputs[_OTHERS:_LOGITS], inputs[_LOGITS:]
        device, needed = others[0].device, ctx.needs_input_grad
        gradients, makers = any(needed), any(needed[3 : 3 + _MAKERS])
        # On a CPU, handing these arguments to the dispatcher costs a tenth of a small batch's step.
        direct = device.type in ("cpu", "cuda") and not torch.compiler.is_compiling()
        direct = direct and all(type(x) in _PLAIN for x in logits)
        triton = takes_triton(device, backend)
        if triton:  # which makes them in the forward where that takes one launch for all, and else in the backward
            pairs = others[_CLASS_WEIGHT + _L - 1]
            gradients = gradients and not makers and direct and fused().is_small(logits, pairs)
        flags = (gradients, makers, return_logits, backend)
        if past is None:
            out = (_objective if direct else ops.objective.default)(logits, *others, *flags)
        elif triton and direct:
            out = _fused_step(logits, others, flags, past)
        else:
            others = _with_kappa(others, past)
            out = (_objective if direct else ops.objective.default)(logits, *others, *flags)
            if past.records:
                record = trajectory.record if device.type == "cpu" else ops.record.default
                record(past.history, past.low, past.span, past.visits, past.start_epoch, out[7], past.samples)
        *losses, ctx.d_logits, ctx.d_makers, ctx.kept = out
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses[7])
        ctx.backend, ctx.direct, ctx.triton = backend, direct, triton
        ctx.rule, ctx.loss_rule = others[3 + _TENSORS : _CLASS_WEIGHT], others[_CLASS_WEIGHT + 1 :]
        ctx.save_for_backward(*others[: 3 + _TENSORS], others[_CLASS_WEIGHT], *logits)
        return tuple(losses)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        given, class_weight, logits = tensors[: 3 + _TENSORS], tensors[3 + _TENSORS], tensors[4 + _TENSORS :]
        others = (*given, *ctx.rule, class_weight, *ctx.loss_rule)
        makers = any(ctx.needs_input_grad[3 : 3 + _MAKERS])
        # The gradients of the loss are handed over once, which frees them; whoever comes again recomputes them.
        d_logits, d_makers, ctx.d_logits, ctx.d_makers = ctx.d_logits, ctx.d_makers, None, None
        scale, of_loss = grads[0], all(grad is None for grad in grads[1:7])
        if scale is not None and of_loss and ctx.triton and d_logits:
            d_logits = fused().scale_gradients(d_logits, scale, logits)
        elif scale is not None and of_loss and not ctx.triton:
            if d_logits is None:
                *_, d_logits, d_makers, _ = ops.objective.default(logits, *others, True, makers, False, ctx.backend)
            # Scaled in the accumulating dtype, so that a loss scale reaches gradients too small for the logits' own.
            if not (scale.is_cpu and scale.item() == 1):
                d_logits, d_makers = [d * scale for d in d_logits], [d * scale for d in d_makers]
            d_logits = [d if d.dtype == x.dtype else d.to(x.dtype) for d, x in zip(d_logits, logits, strict=True)]
        else:
            kept = (d_logits or [], d_makers or [], ctx.kept)
            run = _objective_backward if ctx.direct else ops.objective_backward.default
            d_logits, d_makers = run(*grads[:7], logits, *others, makers, *kept, ctx.backend)
        d_makers = _where_given(d_makers, given[3 : 3 + _MAKERS])
        return None, None, None, *d_makers, *(None,) * (_LOGITS - 3 - _MAKERS), *d_logits


def _with_kappa(others: tuple[Any, ...], past: Past) -> tuple[Any, ...]:
    if not past.ranks:
        return others
    kappa = trajectory.kappa(past.history, past.low, past.span, past.samples, past.minmax)
    return (others[0], kappa, *others[2:])


@below_autograd
def _fused_step(logits: Any, others: tuple[Any, ...], flags: tuple[Any, ...], past: Past) -> tuple[Any, ...]:
    """kappa, objective and record in the launches of the objective."""
    target, _, present, *rest = others
    gradients, makers, return_logits, _ = flags
    rules = WeightRule(*rest[:_W]), LossRule(*rest[_W : _W + _L])
    losses, d_logits, _, kept = fused().objective(
        logits, target, None, present, *rules, rest[_W + _L], gradients, makers, return_logits, past
    )
    return *losses, d_logits, [], kept
