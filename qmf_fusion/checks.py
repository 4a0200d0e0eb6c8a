"""What every public call checks of its arguments before it computes: errors that name the argument.

Nothing here waits for a device: values are looked at only where they lie in the host's memory, outside of
``torch.compile``; class weights also once, where a module is made. On a device an out-of-range target or index ends in
a device-side assertion.
"""

import operator
from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from qmf_kernels.eager.plain import is_transformed

from .warn import warn_user

Logits = Sequence[Tensor | None] | Mapping[str, Tensor | None] | Tensor
Present = Tensor | Mapping[str, Tensor]


def can_look(x: Tensor) -> bool:
    """Whether code may depend on the values of ``x``: no device to wait for, no graph being compiled or exported, and
    no transform of ``torch.func``, under which a tensor stands for many.
    """
    return x.is_cpu and not torch.compiler.is_compiling() and not is_transformed()


def modality_names(modalities: int | Iterable[str]) -> tuple[str, ...]:
    """Names from a count (``"0"``, ``"1"``, ...) or from names."""
    count = as_integer(modalities)
    if count is not None:
        if count < 1:
            raise ValueError(f"modalities must be at least 1, got {count}")
        return tuple(str(m) for m in range(count))
    if not isinstance(modalities, Iterable) or isinstance(modalities, str):
        raise TypeError(f"modalities must be a count or a list of names, got {modalities!r}")
    names = tuple(modalities)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"modalities must be non-empty names, at least one, got {list(names)!r}")
    if len(set(names)) != len(names):
        raise ValueError(f"modalities must be distinct names, got {list(names)!r}")
    return names


def in_order(what: str, given: Any, names: Sequence[str] | None) -> Any:
    """A mapping by modality's name as a list in the order of ``names``, which it must hold; all else as it is."""
    if not isinstance(given, Mapping):
        return given
    if names is None:
        return list(given.values())
    if set(given) != set(names):
        none = " (None for an absent one)" if what == "logits" else ""
        raise ValueError(f"{what} must hold the modalities {list(names)} by name{none}, got {list(given)}")
    return [given[name] for name in names]


def unpack_logits(logits: Logits, names: Sequence[str] | None = None, what: str = "logits") -> list[Tensor | None]:
    """One entry per modality, in the order of ``names``, from a sequence, a mapping by name or a stacked tensor."""
    if isinstance(logits, Mapping):
        return list(in_order(what, logits, names))
    if isinstance(logits, Tensor):
        if logits.dim() < 2:
            size, got = "K" if what == "logits" else "D", tuple(logits.shape)
            raise ValueError(f"{what} must be stacked [M, *, {size}] when given as one tensor, got {got}")
        given: list[Tensor | None] = list(logits.unbind(0))
    elif isinstance(logits, Sequence):
        given = list(logits)
    else:
        raise TypeError(
            f"{what} must be a sequence, a mapping by name or a stacked tensor, got {type(logits).__name__}"
        )
    if names is not None and len(given) != len(names):
        raise ValueError(f"{what} must hold {len(names)} modalities {list(names)}, got {len(given)}")
    if not given:
        raise ValueError(f"{what} must hold at least one modality, got none")
    return given


def check_logits(
    logits: Logits, names: Sequence[str] | None = None, class_dim: int = -1
) -> tuple[list[Tensor], Tensor | None]:
    """M tensors ``[*, K]`` of one shape on one device, and which are there (``[M]`` bool), None for all.

    An absent modality, None among the inputs, becomes zeros.
    """
    given = unpack_logits(logits, names)
    labels = [repr(name) for name in names] if isinstance(logits, Mapping) and names is not None else range(len(given))
    there = [(label, x) for label, x in zip(labels, given, strict=True) if x is not None]
    if not there:
        raise ValueError("logits must hold at least one modality that is not None")
    first_label, first = there[0]
    for label, x in there:
        if not isinstance(x, Tensor):
            raise TypeError(f"logits[{label}] must be a tensor, got {type(x).__name__}")
        if not x.dtype.is_floating_point:
            raise TypeError(f"logits[{label}] must be floating point, got {x.dtype}")
        if x is first:
            if not -x.dim() <= class_dim < x.dim():
                raise ValueError(f"logits[{label}] has no class dimension {class_dim}: its shape is {tuple(x.shape)}")
            continue
        if x.dim() == first.dim() and x.shape[class_dim] != first.shape[class_dim]:
            counts = f"logits[{first_label}] has {first.shape[class_dim]}, logits[{label}] has {x.shape[class_dim]}"
            raise ValueError(f"logits must agree in their number of classes: {counts}")
        if x.shape != first.shape:
            shapes = f"logits[{first_label}] is {tuple(first.shape)}, logits[{label}] is {tuple(x.shape)}"
            raise ValueError(f"logits must agree in shape: {shapes}")
        if x.device != first.device:
            devices = f"logits[{first_label}] is on {first.device}, logits[{label}] on {x.device}"
            raise ValueError(f"logits must be on one device: {devices}")
    if first.numel() == 0:
        raise ValueError(f"logits must not be empty: the shape is {tuple(first.shape)}")
    rows = [torch.zeros_like(first) if x is None else x for x in given]
    if class_dim not in (-1, first.dim() - 1):
        rows = [x.movedim(class_dim, -1) for x in rows]
    if len(there) == len(given):
        return rows, None
    # Filled where it lies: a tensor made of a list would have to be copied to the device, and waited for.
    return rows, torch.stack([first.new_full((), x is not None, dtype=torch.bool) for x in given])


def check_features(
    features: Logits | None, widths: Sequence[int | None] | None, names: Sequence[str], row: Tensor, class_dim: int
) -> list[Tensor | None] | None:
    """M tensors ``[*, D]`` or None, on the device and of the leading dimensions of ``row`` ``[*, K]``.

    A modality without a width, of a rule that takes some, has None whatever is given. None where all are.
    """
    if features is None:
        return None
    given = unpack_logits(features, names, "features")
    if widths is None:
        if any(f is not None for f in given):
            raise ValueError(
                "features must be None for a rule that takes none; QualityAwareFusion.robust(..., features=[...]) with "
                "their widths makes one that does"
            )
        return None
    taken = [None if width is None else f for f, width in zip(given, widths, strict=True)]
    for name, f, width in zip(names, taken, widths, strict=True):
        if f is None:
            continue
        check_floating(f"features[{name!r}]", f)
        dim = f.dim() - 1 if class_dim == -1 else class_dim
        if f.dim() != row.dim() or (*f.shape[:dim], *f.shape[dim + 1 :], f.shape[dim]) != (*row.shape[:-1], width):
            expected = [*row.shape[:-1]]
            expected.insert(len(expected) if class_dim == -1 else class_dim, width or 0)
            raise ValueError(
                f"features[{name!r}] must be {tuple(expected)}, the logits' shape with the width {width} instead of "
                f"the classes, got {tuple(f.shape)}"
            )
        if f.device != row.device:
            raise ValueError(f"features[{name!r}] must be on the logits' device {row.device}, got {f.device}")
    if class_dim != -1:
        taken = [None if f is None else f.movedim(class_dim, -1) for f in taken]
    return taken if any(f is not None for f in taken) else None


def check_widths(features: Sequence[int | None] | None, num_modalities: int) -> tuple[int | None, ...] | None:
    """The width of each modality's features; None where none has any."""
    if features is None:
        return None
    if not isinstance(features, Sequence) or len(features) != num_modalities:
        raise ValueError(
            f"features must be None or {num_modalities} widths, one per modality or None, got {features!r}"
        )
    widths = tuple(None if width is None else check_count("features", width) for width in features)
    return widths if any(width is not None for width in widths) else None


def check_batch(
    logits: Logits,
    target: Tensor,
    present: Present | None,
    names: Sequence[str] | None = None,
    class_dim: int = -1,
    wanted: str = "[B, *, K]",
    soft: bool = False,
) -> tuple[list[Tensor], Tensor, Tensor | None]:
    """Rows, M of ``[B, *, K]``, targets int64 ``[B, *]``, and which modalities are present, ``[M, B, *]`` or None.

    With ``soft``, targets may be probabilities, ``[B, *, K]`` floating point, laid out as the logits are when given.
    """
    rows, there = check_logits(logits, names, class_dim)
    if rows[0].dim() < 2:
        raise ValueError(f"logits must be {wanted}, got {tuple(rows[0].shape)}")
    if rows[0].shape[-1] == 1 and not torch.compiler.is_compiling():
        warn_user(
            "logits have one class, of which the softmax is always 1: every loss is 0, and nothing is learned. A head "
            "with one logit for two classes needs two, such as torch.cat([torch.zeros_like(x), x], -1)"
        )
    shape, device = (len(rows), *rows[0].shape[:-1]), rows[0].device
    target = check_target(target, rows[0].shape, device, class_dim, soft)
    names = named_by(logits) if names is None else names
    return rows, target, check_present(present, there, shape, device, names)


def named_by(logits: Logits) -> list[str] | None:
    """The modalities' names where logits come by name, in the order in which they are taken; else None."""
    return list(logits) if isinstance(logits, Mapping) else None


def stack_present(present: Mapping[str, Tensor], names: Sequence[str] | None) -> Tensor:
    """Masks by modality's name, each bool ``[B]`` or ``[*]``, as one ``[M, *]``."""
    given = in_order("present", present, names)
    for name, mask in zip(present if names is None else names, given, strict=True):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
            raise TypeError(f"present[{name!r}] must be a bool tensor, [B] or of the logits' leading shape, got {got}")
        if mask.shape != given[0].shape or mask.device != given[0].device:
            got = ", ".join(f"{tuple(x.shape)} on {x.device}" for x in given)
            raise ValueError(f"present must hold masks of one shape on one device, got {got}")
    return torch.stack(given)


def check_present(
    present: Present | None,
    there: Tensor | None,
    shape: Sequence[int],
    device: torch.device,
    names: Sequence[str] | None = None,
) -> Tensor | None:
    """``present`` (bool ``[M]``, ``[M, B]`` or ``[M, *]``, or by name) as ``[M, *]``, only where the modality is
    ``there``.
    """
    if isinstance(present, Mapping):
        present = stack_present(present, names)
    if present is not None:
        if not isinstance(present, Tensor) or present.dtype != torch.bool:
            got = present.dtype if isinstance(present, Tensor) else type(present).__name__
            raise TypeError(f"present must be a bool tensor, got {got}")
        if present.dim() == 0 or tuple(present.shape) != tuple(shape[: present.dim()]):
            raise ValueError(f"present must be {tuple(shape)} or its first dimensions, got {tuple(present.shape)}")
        if present.device != device:
            raise ValueError(f"present must be on the logits' device {device}, got {present.device}")
    masks = [mask for mask in (present, there) if mask is not None]
    if not masks:
        return None
    full = [mask.reshape(*mask.shape, *(1,) * (len(shape) - mask.dim())).expand(*shape) for mask in masks]
    return full[0] if len(full) == 1 else full[0] & full[1]


def check_floating(name: str, x: Tensor, kind: str = "tensor") -> None:
    if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
        got = x.dtype if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a floating point {kind}, got {got}")


def check_integers(name: str, x: Tensor, kind: str) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype.is_floating_point or x.dtype.is_complex or x.dtype == torch.bool:
        raise TypeError(f"{name} must hold {kind} indices (an integer dtype), got {x.dtype}")


def check_target(
    target: Tensor, shape: Sequence[int], device: torch.device, class_dim: int = -1, soft: bool = False
) -> Tensor:
    """Classes as int64 ``[*]`` for logits of the ``shape`` ``[*, K]``, or where ``soft`` probabilities ``[*, K]``."""
    of_classes, got = tuple(shape[:-1]), tuple(target.shape) if isinstance(target, Tensor) else ()
    laid_out = [*of_classes]
    laid_out.insert(len(laid_out) if class_dim == -1 else class_dim % len(shape), shape[-1])
    like_logits = got == tuple(laid_out)
    floating = isinstance(target, Tensor) and target.dtype.is_floating_point
    if like_logits and floating and soft:
        return _check_probabilities(target.movedim(class_dim, -1), device)
    if like_logits and floating:
        raise TypeError(
            f"target must hold class indices here, got {target.dtype} of the logits' shape: of probabilities give "
            "target.argmax at their largest; several labels a sample (multi-hot) are out of scope"
        )
    if floating:
        raise TypeError(
            f"target must hold class indices (an integer dtype), got {target.dtype} of shape {got}: regression is out "
            f"of scope, and probabilities must have the logits' shape {tuple(laid_out)}"
        )
    if like_logits and got != of_classes:
        raise ValueError(
            f"target must have the logits' shape without classes, {of_classes}, got {got} of {target.dtype}: give "
            "target.argmax of what is one-hot; several labels a sample (multi-hot) are out of scope"
        )
    check_integers("target", target, "class")
    if got != of_classes:
        raise ValueError(f"target must have the logits' shape without classes, {of_classes}, got {got}")
    if target.device != device:
        raise ValueError(f"target must be on the logits' device {device}, got {target.device}")
    return target.long()


def _check_probabilities(target: Tensor, device: torch.device) -> Tensor:
    """``[*, K]``, not negative, of sum 1 to what float16 makes of it; on a device, an assertion there says so."""
    if target.device != device:
        raise ValueError(f"target must be on the logits' device {device}, got {target.device}")
    message = "target must hold probabilities, at least 0 and of sum 1 over the classes (multi-hot is out of scope)"
    values = target.detach().float()
    held = ((values.sum(-1) - 1).abs() <= 0.01).all() & (values >= 0).all()
    if target.is_cuda:
        torch._assert_async(held, message)
    elif can_look(target) and not bool(held):
        raise ValueError(f"{message}, got sums from {values.sum(-1).min():.4g} to {values.sum(-1).max():.4g}")
    return target


def check_class_weight(weight: Tensor | None, num_classes: int | None = None, once: bool = False) -> None:
    """Class weights ``[K]``, 0 to 1e30, whose sums float32 holds; on a device, where to look takes a wait, only if
    ``once``.
    """
    if weight is None:
        return
    if not isinstance(weight, Tensor) or weight.is_complex():
        got = weight.dtype if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"class_weight must be a tensor [K] of real numbers or None, got {got}")
    if weight.dim() != 1 or num_classes not in (None, len(weight)):
        raise ValueError(f"class_weight must be [{num_classes or 'K'}], one per class, got {tuple(weight.shape)}")
    if not can_look(weight) and (not once or weight.is_meta or torch.compiler.is_compiling()):
        return
    values = weight.float()
    wrong = ~((values >= 0) & (values <= 1e30))
    if bool(wrong.any()):
        first = int(wrong.int().argmax())
        raise ValueError(f"class_weight must be from 0 to 1e30, got {weight[first].item()} for class {first}")


def as_integer(value: object) -> int | None:
    """A Python int of any kind of integer, NumPy's included; None of everything else, truth values too."""
    try:
        return None if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        return None


def check_integer(name: str, value: int) -> int:
    integer = as_integer(value)
    if integer is None:
        raise TypeError(f"{name} must be an integer, got {value!r}")
    return integer


def check_count(name: str, value: int) -> int:
    count = as_integer(value)
    if count is None or count < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return count


def check_number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{name} must be a number, got {value!r}")


def check_confidence(value: float) -> None:
    check_number("confidence", value)
    if not 0 < value < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {value}")


def check_logit_norm(temperature: float | None) -> float | None:
    if temperature is None:
        return None
    try:
        value = float(temperature)
    except (TypeError, ValueError) as error:
        raise TypeError(f"normalize_logits must be a number or None, got {temperature!r}") from error
    if not 1e-30 <= value <= 1e30:  # so that float32 holds what it divides by
        raise ValueError(f"normalize_logits must be a positive temperature, 1e-30 to 1e30, or None, got {temperature}")
    return value


def check_choice(name: str, value: str | None, choices: Sequence[str | None]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {list(choices)}, got {value!r}")


def check_prior(prior: Sequence[float] | Tensor) -> Tensor:
    """The log shares of positive numbers ``[K]``, a sequence, an array or a tensor: float64, on the CPU."""
    try:
        given = prior if isinstance(prior, Tensor) else torch.as_tensor(prior, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"prior must be a sequence or a tensor of numbers [K], got {prior!r}") from error
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"prior must be a sequence or a tensor of numbers [K], got {given.dtype}")
    if given.dim() != 1 or not len(given):
        raise ValueError(f"prior must be [K], one number a class, got {tuple(given.shape)}")
    shares = given.detach().cpu().double()
    if not bool((torch.isfinite(shares) & (shares > 0)).all()):
        raise ValueError(f"prior must be positive and finite, got {shares.tolist()}: count a class without a row as 1")
    return (shares / shares.sum()).log()
