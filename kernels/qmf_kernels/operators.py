"""The operators in the namespace ``qmf``: schemas, fakes, and which implementation a call takes.

On CUDA and ROCm tensors fusion and objective run the Triton kernels, elsewhere and without Triton plain PyTorch;
``backend`` forces one. Ranking and history on their own are plain PyTorch everywhere. ``autograd`` makes them
differentiable. Loaded twice in one process (from two paths), the second copy registers under a name of its own.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .eager import fusion, history, objective
from .eager.fusion import accumulate_dtype
from .eager.ranking import ranking
from .rules import FuseOptions, Losses, LossGrads, ObjectiveOptions, RuleGrads, WeightRule, schema, unflatten

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


def _given(record: Any, device: torch.device, rest: Iterable[Any]) -> tuple[Any, ...]:
    """The options at the start of ``rest``, whether Triton's kernels take them, and what follows."""
    following = iter(rest)
    options = unflatten(record, following)
    return options, rule_takes_triton(device, options.weight_rule, options.backend), *following


def _as_list(grads: RuleGrads | None, like: Tensor) -> list[Tensor]:
    """As a schema's ``Tensor[]``, which holds no None: empty where the rule has no such tensor."""
    return [like.new_empty((0,)) if grad is None else grad for grad in grads or ()]


# What fakes say: shapes, dtypes and strides of results.


def per_row(logits: Sequence[Tensor]) -> Tensor:
    """An empty ``[M, *]`` in the accumulating dtype."""
    return logits[0].new_empty((len(logits), *logits[0].shape[:-1]), dtype=accumulate_dtype(logits))


def _fake_like(x: Tensor, dtype: torch.dtype, triton: bool) -> Tensor:
    """Triton's kernels leave results as the logits lie, PyTorch's operations as ``[*, K]``."""
    return torch.empty_like(x, dtype=dtype) if triton else x.new_empty(x.shape, dtype=dtype)


def _fake_gradients(
    logits: Sequence[Tensor], rule: WeightRule, triton: bool, rule_gradients: bool, dtype: torch.dtype | None = None
) -> tuple[list[Tensor], list[Tensor]]:
    """Of the logits, in ``dtype`` or each in its own; and of the rule's tensors, where asked for."""
    d_logits = [_fake_like(x, dtype or x.dtype, triton) for x in logits]
    rows = per_row(logits)
    shapes = {"uncertainty": rows.shape, "fused": logits[0].shape}  # of the others: [M]
    wanted = [shapes.get(n, rows.shape[:1]) if getattr(rule, n) is not None else (0,) for n in RuleGrads._fields]
    return d_logits, [rows.new_empty(shape) for shape in wanted if rule_gradients]


# Ranking (Eq. 15 to 17) and the loss history (Eq. 14), which on their own are not worth a kernel.

_define(
    "ranking(Tensor weights, Tensor kappa, str form, str pairs) -> (Tensor, Tensor)",
    ranking,
    lambda weights, *_: (weights.new_empty(()), weights.new_empty(weights.shape)),
)
_define(
    "record(Tensor(a!) history, Tensor(b!) low, Tensor(c!) span, Tensor(d!)? visits, int start_epoch, Tensor losses, "
    "Tensor index) -> ()",
    history.record,
    lambda *_: None,
)


# Fusion alone (Eq. 13, 9, 11)


def _fuse(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    given, triton = _given(FuseOptions, logits[0].device, rest)
    return (triton_kernels() if triton else fusion).fuse(logits, given.present, given.weight_rule)


def _fuse_fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Tensor, ...]:
    _, triton = _given(FuseOptions, logits[0].device, rest)
    rows = per_row(logits)
    return _fake_like(logits[0], rows.dtype, triton), rows, rows.new_empty(rows.shape)


def _fuse_backward(
    grad_fused: Tensor, grad_weights: Tensor, grad_energy: Tensor, energy: Tensor, logits: Sequence[Tensor], *rest: Any
) -> tuple[list[Tensor], list[Tensor]]:
    given, triton, rule_gradients = _given(FuseOptions, energy.device, rest)
    grads = (grad_fused, grad_weights, grad_energy)
    if triton:
        d_logits, d_rule = triton_kernels().fuse_backward(grads, energy, logits, given.weight_rule, rule_gradients)
    else:
        d_logits, d_rule = fusion.fuse_backward(grads, logits, given.present, given.weight_rule)
    return d_logits, _as_list(d_rule, energy) if rule_gradients else []


def _fuse_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    _, _, _, energy, logits, *rest = inputs
    given, triton, rule_gradients = _given(FuseOptions, energy.device, rest)
    return _fake_gradients(logits, given.weight_rule, triton, rule_gradients)


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
    given, triton, *asked = _given(ObjectiveOptions, logits[0].device, rest)
    losses, d_logits, d_rule, *kept = (triton_kernels() if triton else objective).objective(logits, given, *asked)
    return *losses, d_logits, _as_list(d_rule, losses.energy), kept[0] if triton else []


def _objective_fake(logits: Sequence[Tensor], *rest: Any) -> tuple[Any, ...]:
    given, triton, gradients, rule_gradients = _given(ObjectiveOptions, logits[0].device, rest)
    rows = per_row(logits)
    new, num = rows.new_empty, len(logits)
    out = Losses(
        loss=new(()),
        fused_loss=new(()),
        unimodal_losses=new((num,)),
        ranking_loss=new(()),
        logits=_fake_like(logits[0], rows.dtype, triton) if given.return_logits else new((0,)),
        weights=rows,
        energy=new(rows.shape),
        sample_losses=new((num, logits[0].shape[0])),
    )
    made: tuple[list[Tensor], list[Tensor]] = [], []
    if gradients:
        made = _fake_gradients(logits, given.weight_rule, triton, rule_gradients, rows.dtype)
    kept = []
    if triton:
        kept = triton_kernels().new_kept(rows, given.kappa is not None, given.weight_rule, given.loss_rule)
    return *out, *made, kept


def _objective_backward(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    following = iter(inputs)
    grads: LossGrads = unflatten(LossGrads, following)
    logits: Sequence[Tensor] = next(following)
    given, triton, rule_gradients, d_logits, d_rule, kept = _given(ObjectiveOptions, logits[0].device, following)
    if grads.logits is not None and not grads.logits.numel():
        grads = grads._replace(logits=None)  # under torch.compile, fused logits that were left out have a gradient too
    if d_logits and grads.loss is not None and not any(map(_may_differ_from_zero, grads._replace(loss=None))):
        d_logits, d_rule = [d * grads.loss for d in d_logits], [d * grads.loss for d in d_rule]
    else:
        if triton:
            kernels = triton_kernels()
            if not kept:
                *_, kept = kernels.objective(logits, given._replace(return_logits=False), False, False)
            d_logits, found = kernels.objective_backward(grads, kept, logits, given, rule_gradients)
        else:
            d_logits, found = objective.objective_backward(grads, logits, given)
        d_rule = _as_list(found, per_row(logits))
    return [grad.to(x.dtype) for grad, x in zip(d_logits, logits, strict=True)], d_rule if rule_gradients else []


def _may_differ_from_zero(grad: Tensor | None) -> bool:
    """Under torch.compile, unused outputs have gradients of zeros; on a device, looking would mean waiting."""
    return grad is not None and not (grad.is_cpu and all(x.item() == 0 for x in torch.aminmax(grad)))


def _objective_backward_fake(*inputs: Any) -> tuple[list[Tensor], list[Tensor]]:
    following = iter(inputs)
    unflatten(LossGrads, following)
    logits: Sequence[Tensor] = next(following)
    given, triton, rule_gradients, *_ = _given(ObjectiveOptions, logits[0].device, following)
    return _fake_gradients(logits, given.weight_rule, triton, rule_gradients)


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
