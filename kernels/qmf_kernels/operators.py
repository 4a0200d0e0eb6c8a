"""The operators in the namespace ``qmf``: schemas, implementations, fakes, and the autograd functions over them.

PyTorch's dispatcher picks an operator's implementation from the tensors' device; the one registered here, for every
device, is plain PyTorch. The operators themselves are not differentiable: ``Fuse``, ``Objective`` and ``Ranking`` pair
a forward with its backward, at half the cost per step of ``torch.library.register_autograd``.

Loaded twice in one process (from two paths), the second copy registers under a name of its own.
"""

import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import fusion, objective, trajectory
from .fusion import WeightRule, accumulate_dtype
from .objective import Losses, LossRule
from .ranking import ranking
from .small import small_objective

_OPERATORS = ("fuse", "fuse_backward", "objective", "objective_backward", "ranking", "record")


def _free_namespace() -> str:
    if not any(hasattr(torch.ops.qmf, operator) for operator in _OPERATORS):
        return "qmf"
    return "qmf_" + hashlib.sha256(__file__.encode()).hexdigest()[:12]


NAMESPACE = _free_namespace()
ops: Any = getattr(torch.ops, NAMESPACE)
_registry: Any = torch.library
_library = _registry.Library(NAMESPACE, "FRAGMENT")

_PLAIN = (Tensor, torch.nn.Parameter)  # no subclass that has a say in what an operator does
_RULE = "Tensor? weights, Tensor alpha, Tensor beta, Tensor? temperature, bool nonnegative, bool normalize"
_LOSS_RULE = "Tensor? class_weight, float label_smoothing, int ignore_index, float ranking_weight, str form, str pairs"
_LOSS_GRADS = ", ".join(f"Tensor? grad_{name}" for name in Losses._fields[:7])
_INPUTS = f"Tensor[] logits, Tensor target, Tensor? kappa, Tensor? present, {_RULE}, {_LOSS_RULE}"


def _define(schema: str, implementation: Any, fake: Any) -> None:
    name = schema[: schema.index("(")]

    @functools.wraps(implementation)
    def below_autograd(*inputs: Any) -> Any:
        # What torch.library.custom_op does too: a quarter of a small batch's time would go into autograd's bookkeeping.
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*inputs)

    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, below_autograd, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


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


def _fake_makers(per_row: Tensor) -> list[Tensor]:
    return [per_row.new_empty(per_row.shape), *(per_row.new_empty((len(per_row),)) for _ in range(3))]


def _per_row(logits: Sequence[Tensor]) -> Tensor:
    return logits[0].new_empty((len(logits), *logits[0].shape[:-1]), dtype=accumulate_dtype(logits))


def _where_given(grads: Sequence[Tensor], given: Sequence[Tensor | None]) -> list[Tensor | None]:
    return [None if tensor is None else grad for grad, tensor in zip(grads, given, strict=True)]


# Ranking (Eq. 15 to 17)


def _ranking_fake(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    return weights.new_empty(()), weights.new_empty(weights.shape)


_define("ranking(Tensor weights, Tensor kappa, str form, str pairs) -> (Tensor, Tensor)", ranking, _ranking_fake)


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


# The loss history (Eq. 14)

_define(
    "record(Tensor(a!) history, Tensor(b!) low, Tensor(c!) span, Tensor(d!)? visits, int start_epoch, Tensor losses, "
    "Tensor index) -> ()",
    trajectory.record,
    lambda *_: None,
)


# Fusion alone (Eq. 13, 9, 11)


def _fuse(logits: Sequence[Tensor], present: Tensor | None, *rule: Any) -> tuple[Tensor, ...]:
    return fusion.fuse(logits, present, WeightRule(*rule))


def _fuse_fake(logits: Sequence[Tensor], *_: Any) -> tuple[Tensor, ...]:
    new = logits[0].new_empty((), dtype=accumulate_dtype(logits)).new_empty
    per_row = (len(logits), *logits[0].shape[:-1])
    return new(logits[0].shape), new(per_row), new(per_row)


def _fuse_backward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    grads, (logits, present), rule, detach_weights = inputs[:3], inputs[3:5], inputs[5:-1], inputs[-1]
    d_logits, d_makers = fusion.fuse_backward(grads, logits, present, WeightRule(*rule), detach_weights)
    return d_logits, list(d_makers)


def _fuse_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    grad_weights, logits = inputs[1], inputs[3]
    return [x.new_empty(x.shape) for x in logits], _fake_makers(grad_weights)


_define(f"fuse(Tensor[] logits, Tensor? present, {_RULE}) -> (Tensor, Tensor, Tensor)", _fuse, _fuse_fake)
_define(
    "fuse_backward(Tensor grad_fused, Tensor grad_weights, Tensor grad_energy, Tensor[] logits, Tensor? present, "
    f"{_RULE}, bool detach_weights) -> (Tensor[], Tensor[])",
    _fuse_backward,
    _fuse_backward_fake,
)


class Fuse(torch.autograd.Function):
    """``apply(present, weights, alpha, beta, temperature, nonnegative, normalize, detach_weights, *logits)``.

    Returns fused logits ``[*, K]``, weights ``[M, *]`` and energies ``[M, *]``.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        others, logits = inputs[:8], inputs[8:]
        ctx.flags = others[5:]
        ctx.save_for_backward(*others[:5], *logits)
        fused, weights, energy = ops.fuse.default(logits, *others[:7])
        return fused, weights, energy

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        tensors, logits = ctx.saved_tensors[:5], ctx.saved_tensors[5:]
        d_logits, d_makers = ops.fuse_backward.default(*grads, logits, *tensors, *ctx.flags)
        return None, *_where_given(d_makers, tensors[1:]), None, None, None, *d_logits


# The objective (Eq. 18)


def _objective(
    logits: Sequence[Tensor], target: Tensor, kappa: Tensor | None, present: Tensor | None, *rest: Any
) -> tuple[Any, ...]:
    rules, flags = (WeightRule(*rest[:6]), LossRule(*rest[6:12])), rest[12:]
    inputs = (logits, target, kappa, present, *rules, *flags)
    out, d_logits, d_makers = small_objective(*inputs) or objective.objective(*inputs)
    return *out, d_logits, d_makers


def _directly(*inputs: Any) -> tuple[Any, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return _objective(*inputs)


def _objective_fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    gradients, maker_gradients = rest[-2:]
    num, shape = len(logits), logits[0].shape
    new = logits[0].new_empty((), dtype=accumulate_dtype(logits)).new_empty
    per_row = (num, *shape[:-1])
    out = Losses(
        loss=new(()),
        fused_loss=new(()),
        unimodal_losses=new((num,)),
        ranking=new(()),
        fused=new(shape),
        weights=new(per_row),
        energy=new(per_row),
        sample_losses=new((num, shape[0])),
    )
    d_logits = [new(shape) for _ in logits if gradients]
    return *out, d_logits, _fake_makers(out.weights) if gradients and maker_gradients else []


def _objective_backward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    grads, logits, rest, of_loss = inputs[:7], inputs[7], inputs[11:-2], inputs[-2:]
    scale, d_logits, d_makers = grads[0], *of_loss
    if d_logits and scale is not None and not any(_may_differ_from_zero(grad) for grad in grads[1:]):
        d_logits, d_makers = [d * scale for d in d_logits], [d * scale for d in d_makers]
        d_makers = d_makers or [torch.zeros_like(x) for x in _fake_makers(_per_row(logits))]
    else:
        rules: Any = (WeightRule(*rest[:6]), LossRule(*rest[6:12]), rest[12])
        d_logits, d_makers = objective.objective_backward(grads, *inputs[7:11], *rules)
    return [grad.to(x.dtype) for grad, x in zip(d_logits, logits, strict=True)], list(d_makers)


def _may_differ_from_zero(grad: Tensor | None) -> bool:
    """Under torch.compile, unused outputs have gradients of zeros; on a device, looking would mean waiting."""
    return grad is not None and not (grad.is_cpu and all(x.item() == 0 for x in torch.aminmax(grad)))


def _objective_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    logits = inputs[7]
    return [x.new_empty(x.shape) for x in logits], _fake_makers(_per_row(logits))


_define(
    f"objective({_INPUTS}, bool detach_weights, bool gradients, bool maker_gradients) "
    f"-> ({', '.join(['Tensor'] * len(Losses._fields))}, Tensor[], Tensor[])",
    _objective,
    _objective_fake,
)
_define(
    f"objective_backward({_LOSS_GRADS}, {_INPUTS}, bool detach_weights, Tensor[] d_logits, Tensor[] d_makers) "
    "-> (Tensor[], Tensor[])",
    _objective_backward,
    _objective_backward_fake,
)


class Objective(torch.autograd.Function):
    """``apply(target, kappa, present, weights, alpha, beta, temperature, nonnegative, normalize, class_weight,
    label_smoothing, ignore_index, ranking_weight, form, pairs, detach_weights, *logits)``.

    Returns ``Losses``, the per-sample losses without a gradient.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        others, logits, needed = inputs[:16], inputs[16:], ctx.needs_input_grad
        inputs = (logits, *others, any(needed), any(needed[3:7]))
        # On a CPU, handing these arguments to the dispatcher costs a tenth of a small batch's step.
        direct = others[0].is_cpu and not torch.compiler.is_compiling() and all(type(x) in _PLAIN for x in logits)
        *losses, d_logits, d_makers = (_directly if direct else ops.objective.default)(*inputs)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses[7])
        ctx.flags = others[7:9] + others[10:]
        ctx.save_for_backward(*others[:7], others[9], *logits)
        ctx.d_logits, ctx.d_makers = d_logits, d_makers
        return tuple(losses)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        given, class_weight, logits = tensors[:7], tensors[7], tensors[8:]
        others = (*given, *ctx.flags[:2], class_weight, *ctx.flags[2:])
        # The gradients of the loss are handed over once, which frees them; whoever comes again recomputes them.
        d_logits, d_makers, ctx.d_logits, ctx.d_makers = ctx.d_logits, ctx.d_makers, None, None
        scale = grads[0]
        if scale is not None and all(grad is None for grad in grads[1:7]):
            if d_logits is None:
                makers = any(ctx.needs_input_grad[3:7])
                *_, d_logits, d_makers = ops.objective.default(logits, *others, True, makers)
            # Scaled in the accumulating dtype, so that a loss scale reaches gradients too small for the logits' own.
            if not (scale.is_cpu and scale.item() == 1):
                d_logits, d_makers = [d * scale for d in d_logits], [d * scale for d in d_makers]
            d_logits = [d if d.dtype == x.dtype else d.to(x.dtype) for d, x in zip(d_logits, logits, strict=True)]
            d_makers = d_makers or [None] * 4
        else:
            d_logits, d_makers = ops.objective_backward.default(
                *grads[:7], logits, *others, d_logits or [], d_makers or []
            )
        return None, None, None, *_where_given(d_makers, given[3:]), *(None,) * 9, *d_logits
