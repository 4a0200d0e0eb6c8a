"""The operators made differentiable: each pairs a forward with its backward, once.

``torch.autograd.Function`` at half the cost per step of ``torch.library.register_autograd``. A function takes the
options flattened, since autograd sees only tensors that are arguments of their own, and the logits last.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .eager import history, plain
from .operators import below_autograd, ops, rule_takes_triton, triton_kernels
from .rules import (
    NAMES,
    FuseOptions,
    Losses,
    LossRule,
    ObjectiveOptions,
    Past,
    RuleGrads,
    WeightRule,
    flatten,
    unflatten,
)


def fuse(
    logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule, backend: str | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits ``[*, K]``, weights and energies ``[M, *]`` (Eq. 13, 9, 11) of M tensors ``[*, K]``.

    ``present`` is bool ``[M, *]`` or None. Arguments are not checked here. Exported, and inside of ``torch.func``'s
    transforms, it is plain PyTorch, whatever the backend.
    """
    if plain.is_exporting() or plain.is_transformed():
        return plain.fuse(logits, present, rule)
    return _Fuse.apply(*flatten(FuseOptions(present, rule, backend)), *logits)


def rank(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> Tensor:
    """The ranking loss (Eq. 15 to 17) of ``[M, B]`` and ``[M, B]``, a scalar, differentiable in the weights."""
    _refuse_transforms()
    return _Rank.apply(weights, kappa, form, pairs)


def objective(
    logits: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    *,
    past: Past | None = None,
    backend: str | None = None,
    return_logits: bool = True,
) -> Losses:
    """Eq. 18 of M tensors ``[B, *, K]``, targets ``[B, *]``, kappa ``[M, B]`` and present ``[M, B, *]`` or None each.

    With ``past``, kappa comes from the history and the batch goes into it: in the kernels' own launches where they run,
    but for torch.compile, whose graph may not write to a history inside of a differentiable operator.
    Arguments are not checked here.
    """
    _refuse_transforms()
    # No operator's schema says that the kernels read and write the history too: only for plain tensors.
    inside = past is not None and rule_takes_triton(logits[0].device, weight_rule, backend) and _are_plain(logits)
    if past is not None and past.ranks and not inside:
        kappa = history.kappa(past.history, past.low, past.span, past.samples, past.minmax)
    options = flatten(ObjectiveOptions(target, kappa, present, weight_rule, loss_rule, return_logits, backend))
    out = Losses(*_Objective.apply(past if inside else None, *options, *logits))
    if past is not None and past.records and not inside:
        tensors = (past.history, past.low, past.span, past.visits)
        ops.record.default(*tensors, past.start_epoch, out.sample_losses, past.samples)
    return out


def _refuse_transforms() -> None:
    if plain.is_transformed():
        raise RuntimeError(
            "the objective and the ranking loss can't be inside of torch.func's transforms (vmap, grad, ...): they are "
            "differentiated by backward(), and a training step records. Take a loss of the fused logits there"
        )


def _are_plain(logits: Sequence[Tensor]) -> bool:
    """Whether nobody looks on: neither torch.compile nor a subclass that has a say in what an operator does."""
    return not torch.compiler.is_compiling() and all(type(x) in (Tensor, torch.nn.Parameter) for x in logits)


def _once_differentiable(backward: Any) -> Any:
    """Let whoever differentiates the gradients fail. PyTorch's own decorator does not connect them with what they come
    from: where plain operations lead there too, a second derivative would come out without the operator's part.
    """

    @functools.wraps(backward)
    def once(ctx: Any, *grads: Tensor | None) -> Any:
        if not torch.is_grad_enabled():
            return backward(ctx, *grads)
        with torch.no_grad():
            out = backward(ctx, *grads)
        sources = [x for x in (*ctx.saved_tensors, *grads) if x is not None and x.requires_grad]
        found = [x for x in out if x is not None]
        refusing = iter(_Refuse.apply(len(found), *found, *sources))
        return tuple(None if x is None else next(refusing) for x in out)

    return once


class _Refuse(torch.autograd.Function):
    """``apply(count, *tensors)``: the first ``count`` tensors, to be differentiated by nobody."""

    @staticmethod
    def forward(ctx: Any, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(x.view_as(x) for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> Any:
        raise RuntimeError("the gradients of qmf operators can't be differentiated again")


def _save(ctx: Any, logits: Sequence[Tensor], options: Sequence[Any], *others: Tensor) -> None:
    """Keep these for ``_saved``, the tensors where autograd looks after them, and what their gradients are for."""
    ctx.sizes = len(logits), len(options)
    ctx.constants = [None if isinstance(x, Tensor) else x for x in options]
    ctx.save_for_backward(*logits, *(x if isinstance(x, Tensor) else None for x in options), *others)


def _saved(ctx: Any) -> tuple[Sequence[Tensor], list[Any], Sequence[Tensor]]:
    """Logits, options and other tensors as ``_save`` was given them."""
    (num, size), tensors = ctx.sizes, ctx.saved_tensors
    options = [c if x is None else x for x, c in zip(tensors[num : num + size], ctx.constants, strict=True)]
    return tensors[:num], options, tensors[num + size :]


def _option_grads(record: type, options: Sequence[Any], d_rule: Sequence[Tensor] | None) -> list[Tensor | None]:
    """What ``backward`` returns for flat options: the operators' ``RuleGrads`` where they are tensors, else None."""
    grads = dict(zip(RuleGrads._fields, d_rule, strict=True)) if d_rule else {}
    parts = zip(NAMES[record], options, strict=True)
    return [grads.get(name) if isinstance(x, Tensor) else None for name, x in parts]


class _Rank(torch.autograd.Function):
    """``apply(weights, kappa, form, pairs)``."""

    @staticmethod
    def forward(ctx: Any, weights: Tensor, kappa: Tensor, form: str, pairs: str) -> Tensor:
        loss: Tensor
        loss, grad = ops.ranking.default(weights, kappa, form, pairs)
        ctx.save_for_backward(grad, weights)
        return loss

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        grad, _ = ctx.saved_tensors
        return grad_loss * grad, None, None, None


class _Fuse(torch.autograd.Function):
    """``apply(*FuseOptions, *logits)``."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        size = len(NAMES[FuseOptions])
        options, logits = inputs[:size], inputs[size:]
        fused_logits, weights, energy = ops.fuse.default(logits, *options)
        ctx.rule_gradients = any(ctx.needs_input_grad[:size])
        _save(ctx, logits, options, energy)
        return fused_logits, weights, energy

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        logits, options, (energy,) = _saved(ctx)
        d_logits, d_rule = ops.fuse_backward.default(*grads, energy, logits, *options, ctx.rule_gradients)
        return *_option_grads(FuseOptions, options, d_rule), *d_logits


class _Objective(torch.autograd.Function):
    """``apply(past, *ObjectiveOptions, *logits)``; returns ``Losses``, the per-sample losses without a gradient."""

    @staticmethod
    def forward(ctx: Any, past: Past | None, *inputs: Any) -> tuple[Tensor, ...]:
        size = len(NAMES[ObjectiveOptions])
        options, logits = inputs[:size], inputs[size:]
        given: ObjectiveOptions = unflatten(ObjectiveOptions, options)
        gradients, ctx.rule_gradients = any(ctx.needs_input_grad), any(ctx.needs_input_grad[: size + 1])
        ctx.triton = rule_takes_triton(logits[0].device, given.weight_rule, given.backend)
        if ctx.triton:  # which makes them in the forward where that takes one launch for all, and else in the backward
            gradients = gradients and not ctx.rule_gradients and _are_plain(logits)
            gradients = gradients and triton_kernels().is_small(logits, given.loss_rule.pairs)
        ctx.d_rule = None
        if past is None:
            out = ops.objective.default(logits, *options, gradients, ctx.rule_gradients)
            *losses, ctx.d_logits, ctx.d_rule, ctx.kept = out
        else:
            step = below_autograd(triton_kernels().objective)
            losses, ctx.d_logits, _, ctx.kept = step(logits, given, gradients, False, past)
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(losses[-1])
        _save(ctx, logits, options)
        return tuple(losses)

    @staticmethod
    @_once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        logits, options, _ = _saved(ctx)
        scale, *others = of_losses = grads[:-1]
        # The gradients of the loss are handed over once, which frees them; whoever comes again recomputes them.
        d_logits, d_rule, ctx.d_logits, ctx.d_rule = ctx.d_logits, ctx.d_rule, None, None
        if d_logits and scale is not None and all(grad is None for grad in others):
            if ctx.triton:
                d_logits = triton_kernels().scale_gradients(d_logits, scale, logits)
            # Scaled in the accumulating dtype, so that a loss scale reaches gradients too small for the logits' own.
            elif not (scale.is_cpu and scale.item() == 1):
                d_logits, d_rule = [d * scale for d in d_logits], [d * scale for d in d_rule]
            d_logits = [d if d.dtype == x.dtype else d.to(x.dtype) for d, x in zip(d_logits, logits, strict=True)]
        else:
            made = (d_logits or [], d_rule or [], ctx.kept)
            d_logits, d_rule = ops.objective_backward.default(*of_losses, logits, *options, ctx.rule_gradients, *made)
        return None, *_option_grads(ObjectiveOptions, options, d_rule), *d_logits
