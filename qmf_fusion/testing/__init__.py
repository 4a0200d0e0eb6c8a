"""Property tests of a fusion, for your own suite: Hypothesis strategies for logits, and checks of what must hold.

A check takes a ``QualityAwareFusion``, a ``FusionModel`` whose heads pass logits through (``nn.Identity()``), or any
callable from a list of M logits ``[*, K]`` (and, for ``check_absent``, ``present=`` a bool ``[M, *]``) to an object
with ``.logits`` ``[*, K]`` and ``.weights`` ``[M, *]``. It draws examples, and raises AssertionError with the first
that breaks the property, made small. Examples are the same in every run unless ``settings`` says otherwise.

Nothing else in the package needs Hypothesis.

Example:
    >>> from qmf_fusion import QualityAwareFusion
    >>> check_all(QualityAwareFusion(2, normalize=True), exclude=["repeatable"])
    ['weight_monotonicity', 'permutation', 'absent', 'equations', 'single_modality']
"""

import inspect
from collections.abc import Callable, Collection
from typing import Any

from torch import nn

from .properties import (
    check_absent,
    check_equations,
    check_permutation,
    check_repeatable,
    check_single_modality,
    check_weight_monotonicity,
)
from .strategies import floating_dtypes, logits, present_masks
from .subject import DEFAULTS, Subject

__all__ = [
    "DEFAULTS",
    "check_absent",
    "check_all",
    "check_equations",
    "check_permutation",
    "check_repeatable",
    "check_single_modality",
    "check_weight_monotonicity",
    "floating_dtypes",
    "logits",
    "present_masks",
]

_IN_ORDER: tuple[Callable[..., None], ...] = (
    *(check_weight_monotonicity, check_permutation, check_absent),
    *(check_equations, check_single_modality, check_repeatable),
)
_CHECKS = {check.__name__.removeprefix("check_"): check for check in _IN_ORDER}


def check_all(fusion: Any, *, exclude: Collection[str] = (), **options: Any) -> list[str]:
    """Run every check that applies: ``absent`` where calls take ``present``, ``single_modality`` where M may be 1.

    Args:
        fusion: see the module's docstring.
        exclude: names of checks to leave out, such as ``"permutation"`` for a callable that treats modalities
            differently.
        options: of all checks, as in ``check_weight_monotonicity``.

    Returns:
        The names of the checks that ran.

    Raises:
        AssertionError: the first that fails.
        ValueError: ``exclude`` holds an unknown name.
    """
    unknown = set(exclude) - set(_CHECKS)
    if unknown:
        raise ValueError(f"exclude must hold names among {list(_CHECKS)}, got {sorted(unknown)}")
    subject = Subject(fusion, options.get("num_modalities"))
    left_out = set(exclude)
    called = fusion.forward if isinstance(fusion, nn.Module) else fusion
    if "present" not in inspect.signature(called).parameters:
        left_out.add("absent")
    fixed = options.get("num_modalities") or getattr(fusion, "num_modalities", 1)
    if subject.layer is None and fixed != 1:
        left_out.add("single_modality")
    names = [name for name in _CHECKS if name not in left_out]
    for name in names:
        taken = inspect.signature(_CHECKS[name]).parameters
        _CHECKS[name](fusion, **{key: value for key, value in options.items() if key in taken})
    return names
