"""Where the operators are registered, and which implementation a call takes.

PyTorch's dispatcher picks it from the tensors' device: Triton's kernels on CUDA and ROCm, plain PyTorch elsewhere and
where Triton is missing or too old. ``backend`` forces one. Loaded twice in one process (from two paths), the second
copy registers under a name of its own.
"""

import functools
import hashlib
import importlib
import importlib.util
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

BACKENDS = (None, "torch", "triton")

_OPERATORS = ("fuse", "fuse_backward", "objective", "objective_backward", "ranking", "record")


def _free_namespace() -> str:
    if not any(hasattr(torch.ops.qmf, operator) for operator in _OPERATORS):
        return "qmf"
    return "qmf_" + hashlib.sha256(__file__.encode()).hexdigest()[:12]


NAMESPACE = _free_namespace()
ops: Any = getattr(torch.ops, NAMESPACE)
_registry: Any = torch.library
_library = _registry.Library(NAMESPACE, "FRAGMENT")


def define(schema: str, in_torch: Callable[..., Any], in_triton: Callable[..., Any] | None, fake: Any) -> None:
    """Register an operator whose implementations take the schema's arguments."""
    name = schema[: schema.index("(")]
    _library.define(schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(name, below_autograd(in_torch), "CompositeExplicitAutograd")
    if in_triton is not None:
        _library.impl(name, below_autograd(in_triton), "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_library)


def below_autograd(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """What torch.library.custom_op does too: a quarter of a small batch's time would go into autograd's bookkeeping."""

    @functools.wraps(implementation)
    def inner(*inputs: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            return implementation(*inputs)

    return inner


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
def fused() -> Any:
    """The launchers of the Triton kernels, imported when they are first needed."""
    return importlib.import_module(".fused.operators", __package__)


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
