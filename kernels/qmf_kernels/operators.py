"""The operators in the namespace ``qmf``: schemas, fakes, and which implementation a call takes.

On CUDA and ROCm tensors they run the Triton kernels, elsewhere and without Triton plain PyTorch; ``backend`` forces
one. ``autograd`` makes them differentiable. Loaded twice in one process (from two paths), the second copy registers
under a name of its own.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .eager import fusion, history, objective
from .eager.fusion import accumulate_dtype
from .eager.ranking import ranking
from .rules import (
    FuseOptions,
    Losses,
    LossGrads,
    ObjectiveOptions,
    RuleGrads,
    WeightRule,
    schema,
    unflatten,
)

_OPERATORS = ("fuse", "fuse_backward", "objective", "objective_backward", "ranking", "record")


def _free_namespace() -> str:
    if not any(hasattr(torch.ops.qmf, operator) for operator in _OPERATORS):
        return "qmf"
    return "qmf_" + hashlib.sha256(__file__.encode()).hexdigest()[:12]


NAMESPACE = _free_namespace()
ops: Any = getattr(torch.ops, NAMESPACE)
_registry: Any = torch.library
_library = _registry.Library(NAMESPACE, "FRAGMENT")


NEEDED_TRITON = (3, 6)  # older ones fail to compile the kernels


def _triton_version() -> tuple[int, int] | None:
    """Read from the package's text, for an import would take a second; the names it is distributed by are many."""
    try:
        spec = importlib.util.find_spec("triton")
    except (ImportError, ValueError):  # somebody has put it aside
        return None
    if spec is None or spec.origin is None:
        return None
    found = re.search(r"^__version__ = ['\"](\d+)\.(\d+)", Path(spec.origin).read_text("utf-8"), re.MULTILINE)
    return (int(found[1]), int(found[2])) if found else None


# Known once, at import: torch.compile traces what asks.
TRITON_VERSION = _triton_version()
HAS_TRITON = TRITON_VERSION is not None and TRITON_VERSION >= NEEDED_TRITON
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


@functools.cache
def triton_kernels() -> Any:
    """The launchers of the Triton kernels, imported when they are first needed."""
    return importlib.import_module(".triton_kernels", __package__)


def takes_triton(device: torch.device, backend: str | None) -> bool:
    """Whether a call on tensors of ``device`` runs Triton's kernels.

    Raises:
        RuntimeError: ``backend="triton"`` where they can't run.
    """
    if backend != "triton":
        return backend is None and device.type == "cuda" and HAS_TRITON
    if TRITON_VERSION is None:
        raise RuntimeError("backend='triton' needs Triton: pip install triton (on Linux)")
    if not HAS_TRITON:
        needed, found = ("{}.{}".format(*version) for version in (NEEDED_TRITON, TRITON_VERSION))
        raise RuntimeError(
            f"backend='triton' needs Triton {needed} or newer, and Triton {found} is installed: upgrade PyTorch, which "
            "brings its own Triton (2.10 and newer bring one that will do)"
        )
    if device.type == "cpu" and not INTERPRETED:
        raise RuntimeError(
            "backend='triton' on CPU tensors needs Triton's interpreter: set TRITON_INTERPRET=1 in the environment "
            "before Python starts; or move the tensors to a CUDA or ROCm device"
        )
    if device.type not in ("cpu", "cuda", "meta"):
        raise RuntimeError(f"backend='triton' needs CUDA or ROCm tensors, got a tensor on {device}")
    return True


def rule_takes_triton(device: torch.device, rule: WeightRule, backend: str | None) -> bool:
    """The same of fusion and objective: ready fused logits go with plain PyTorch everywhere."""
    return takes_triton(device, backend) and rule.fused is None


def below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.library.custom_op does too: a quarter of a small batch's time would go into autograd's bookkeeping."""

    @functools.wraps(implementation)
    def inner(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*inputs)

    return inner


def _define(signature: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Register an operator whose implementation takes the signature's arguments, on every device."""
    name = signature[: signature.index("(")]
    _library.define(signature, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, below_autograd(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


# What fakes say: shapes, dtypes and strides of results.


def per_row(logits: Sequence[Tensor]) -> Tensor:
    """An empty ``[M, *]`` in the accumulating dtype."""
    return logits[0].new_empty((len(logits), *logits[0].shape[:-1]), dtype=accumulate_dtype(logits))


def _fake_like(x: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    """Triton's kernels leave results as the logits lie, PyTorch's operations as ``[*, K]``."""
    return torch.empty_like(x, dtype=dtype) if triton else x.new_empty(x.shape, dtype=dtype)


def _fake_rule_grads(rows: Tensor, rule: WeightRule) -> list[Tensor]:
    def new(wanted: bool, shape: Sequence[int]) -> Tensor:
        return rows.new_empty(shape if wanted else (0,))

    grads = RuleGrads(
        uncertainty=new(rule.uncertainty is not None, rows.shape),
        alpha=new(True, rows.shape[:1]),
        beta=new(True, rows.shape[:1]),
        temperature=new(rule.temperature is not None, rows.shape[:1]),
        fused=None if rule.fused is None else new(True, rule.fused.shape),
    )
    return _as_list(grads, rows)


def _as_list(grads: RuleGrads, like: Tensor) -> list[Tensor]:
    """As a schema's ``Tensor[]``, which holds no None: empty where the rule has no such tensor."""
    return [like.new_empty((0,)) if grad is None else grad for grad in grads]


# Ranking (Eq. 15 to 17)


def _ranking(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    run = triton_kernels().ranking if takes_triton(weights.device, None) else ranking
    return run(weights, kappa, form, pairs)


_define(
    "ranking(Tensor weights, Tensor kappa, str form, str pairs) -> (Tensor, Tensor)",
    _ranking,
    lambda weights, *_: (weights.new_empty(()), weights.new_empty(weights.shape)),
)


# The loss history (Eq. 14)


def _record(*inputs: Any) -> None:
    (triton_kernels() if takes_triton(inputs[0].device, None) else history).record(*inputs)


_define(
    "record(Tensor(a!) history, Tensor(b!) low, Tensor(c!) span, Tensor(d!)? visits, int start_epoch, Tensor losses, "
    "Tensor index) -> ()",
    _record,
    lambda *_: None,
)


# Fusion alone (Eq. 13, 9, 11)


def _fuse(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    present, rule, backend = unflatten(FuseOptions, rest)
    run = triton_kernels() if rule_takes_triton(logits[0].device, rule, backend) else fusion
    return run.fuse(logits, present, rule)


def _fuse_fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    _, rule, backend = unflatten(FuseOptions, rest)
    row = per_row(logits)
    triton = rule_takes_triton(row.device, rule, backend)
    return _fake_like(logits[0], row.dtype, triton), row, row.new_empty(row.shape)


def _fuse_backward(
    grad_fused: Tensor, grad_weights: Tensor, grad_energy: Tensor, energy: Tensor, logits: Sequence[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    following = iter(rest)
    present, rule, backend = unflatten(FuseOptions, following)
    (rule_gradients,) = following
    grads = (grad_fused, grad_weights, grad_energy)
    if rule_takes_triton(energy.device, rule, backend):
        d_logits, d_rule = triton_kernels().fuse_backward(grads, energy, logits, rule, rule_gradients)
    else:
        d_logits, d_rule = fusion.fuse_backward(grads, logits, present, rule)
    return d_logits, _as_list(d_rule, energy) if rule_gradients else []


def _fuse_backward_fake(
    _: Tensor, __: Tensor, ___: Tensor, energy: Tensor, logits: Sequence[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    following = iter(rest)
    _, rule, backend = unflatten(FuseOptions, following)
    (rule_gradients,) = following
    triton = rule_takes_triton(energy.device, rule, backend)
    d_logits = [_fake_like(x, x.dtype, triton) for x in logits]
    return d_logits, _fake_rule_grads(energy, rule) if rule_gradients else []


_define(f"fuse(Tensor[] logits, {schema(FuseOptions)}) -> (Tensor, Tensor, Tensor)", _fuse, _fuse_fake)
_define(
    "fuse_backward(Tensor grad_fused, Tensor grad_weights, Tensor grad_energy, Tensor energy, Tensor[] logits, "
    f"{schema(FuseOptions)}, bool rule_gradients) -> (Tensor[], Tensor[])",
    _fuse_backward,
    _fuse_backward_fake,
)


# The objective (Eq. 18). It returns ``Losses`` and three lists, each empty unless it applies: the gradients of the
# loss with respect to the logits, in the accumulating dtype; to the rule's tensors (``RuleGrads``); and what Triton's
# forward leaves for its backward.


def _objective(logits: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    following = iter(rest)
    given: ObjectiveOptions = unflatten(ObjectiveOptions, following)
    gradients, rule_gradients = following
    inputs = (logits, given.target, given.kappa, given.present, given.weight_rule, given.loss_rule)
    kept: list[Tensor] = []
    if rule_takes_triton(logits[0].device, given.weight_rule, given.backend):
        losses, d_logits, d_rule, kept = triton_kernels().objective(
            *inputs, gradients, rule_gradients, given.return_logits
        )
    else:
        losses, d_logits, d_rule = objective.objective(*inputs, gradients, rule_gradients)
        if not given.return_logits:
            losses = losses._replace(logits=losses.logits.new_empty((0,)))
    return *losses, d_logits, [] if d_rule is None else _as_list(d_rule, losses.energy), kept


def _objective_fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    following = iter(rest)
    given: ObjectiveOptions = unflatten(ObjectiveOptions, following)
    gradients, rule_gradients = following
    num, shape = len(logits), logits[0].shape
    rows = per_row(logits)
    new = rows.new_empty
    triton = rule_takes_triton(rows.device, given.weight_rule, given.backend)
    out = Losses(
        loss=new(()),
        fused_loss=new(()),
        unimodal_losses=new((num,)),
        ranking_loss=new(()),
        logits=_fake_like(logits[0], rows.dtype, triton) if given.return_logits else new((0,)),
        weights=rows,
        energy=new(rows.shape),
        sample_losses=new((num, shape[0])),
    )
    d_logits = [_fake_like(x, rows.dtype, triton) for x in logits if gradients]
    d_rule = _fake_rule_grads(rows, given.weight_rule) if gradients and rule_gradients else []
    kept = []
    if triton:
        kept = triton_kernels().fake_kept(rows, given.kappa is not None, given.weight_rule, given.loss_rule)
    return *out, d_logits, d_rule, kept


def _objective_backward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    following = iter(inputs)
    grads: LossGrads = unflatten(LossGrads, following)
    logits: Sequence[Tensor] = next(following)
    given: ObjectiveOptions = unflatten(ObjectiveOptions, following)
    rule_gradients, d_logits, d_rule, kept = following
    if grads.logits is not None and not grads.logits.numel():
        grads = grads._replace(logits=None)  # under torch.compile, fused logits that were left out have a gradient too
    others = (grads.fused_loss, grads.unimodal_losses, grads.ranking_loss, grads.logits, grads.weights, grads.energy)
    inputs = (logits, given.target, given.kappa, given.present, given.weight_rule, given.loss_rule)
    if d_logits and grads.loss is not None and not any(_may_differ_from_zero(grad) for grad in others):
        d_logits, d_rule = [d * grads.loss for d in d_logits], [d * grads.loss for d in d_rule]
    elif rule_takes_triton(logits[0].device, given.weight_rule, given.backend):
        kernels = triton_kernels()
        kept = kept or kernels.objective(*inputs, False, False, False)[3]
        d_logits, grads_of_rule = kernels.objective_backward(
            grads, kept, logits, given.target, given.weight_rule, given.loss_rule, rule_gradients
        )
        d_rule = [] if grads_of_rule is None else _as_list(grads_of_rule, per_row(logits))
    else:
        d_logits, grads_of_rule = objective.objective_backward(grads, *inputs)
        d_rule = _as_list(grads_of_rule, per_row(logits))
    return [grad.to(x.dtype) for grad, x in zip(d_logits, logits, strict=True)], d_rule if rule_gradients else []


def _may_differ_from_zero(grad: Tensor | None) -> bool:
    """Under torch.compile, unused outputs have gradients of zeros; on a device, looking would mean waiting."""
    return grad is not None and not (grad.is_cpu and all(x.item() == 0 for x in torch.aminmax(grad)))


def _objective_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    following = iter(inputs)
    unflatten(LossGrads, following)
    logits: Sequence[Tensor] = next(following)
    given: ObjectiveOptions = unflatten(ObjectiveOptions, following)
    rule_gradients = next(following)
    triton = rule_takes_triton(logits[0].device, given.weight_rule, given.backend)
    d_rule = _fake_rule_grads(per_row(logits), given.weight_rule) if rule_gradients else []
    return [_fake_like(x, x.dtype, triton) for x in logits], d_rule


_define(
    f"objective(Tensor[] logits, {schema(ObjectiveOptions)}, bool gradients, bool rule_gradients) -> "
    f"({', '.join(['Tensor'] * len(Losses._fields))}, Tensor[], Tensor[], Tensor[])",
    _objective,
    _objective_fake,
)
_define(
    f"objective_backward({schema(LossGrads)}, Tensor[] logits, {schema(ObjectiveOptions)}, bool rule_gradients, "
    "Tensor[] d_logits, Tensor[] d_rule, Tensor[] kept) -> (Tensor[], Tensor[])",
    _objective_backward,
    _objective_backward_fake,
)
