"""Fusion (Eq. 13, 9, 11) of operations that PyTorch itself differentiates, vectorises and exports, and who needs that.

``torch.func``'s transforms do not reach into an operator of ours, and an exported program that calls one runs only
where this package is installed. Shape contract as in ``fusion``.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..rules import WeightRule
from .fusion import accumulate_dtype, affine_weights, clamp_weights, energy, keep_counted, per_modality

_KNOWS_OF_EXPORT = hasattr(torch.compiler, "is_exporting")  # PyTorch 2.6 does not


def is_exporting() -> bool:
    """Whether this call is traced by ``torch.export``; PyTorch 2.6 cannot tell with ``strict=True``."""
    if _KNOWS_OF_EXPORT:
        return bool(torch.compiler.is_exporting())
    return torch.compiler.is_compiling() and not torch.compiler.is_dynamo_compiling()


def is_transformed() -> bool:
    """Whether this call is inside of ``torch.func.vmap``, ``grad`` or another of them; False for all that compiles."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def fuse(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> tuple[Tensor, Tensor, Tensor]:
    """What ``fusion.fuse`` returns, ``[*, K]`` and ``[M, *]`` twice, without a look at any value."""
    dtype = accumulate_dtype(logits)
    x = torch.stack([x.to(dtype) for x in logits])
    counted = torch.isfinite(torch.logsumexp(x.detach(), -1))
    counted = counted if present is None else counted & present
    x = torch.where(counted.unsqueeze(-1), x, 0)
    ruled_out = x == -torch.inf
    finite = x.masked_fill(ruled_out, 0)
    if rule.temperature is None:
        e = energy(torch.logsumexp(x, -1))
    else:
        # -inf is put back after the division: 0 * inf would make the temperature's gradient NaN.
        scaled = (finite / per_modality(rule.temperature, x)).masked_fill(ruled_out, -torch.inf)
        e = torch.logsumexp(scaled, -1)
        e = energy(e, per_modality(rule.temperature, e))
    u = e if rule.uncertainty is None else keep_counted(rule.uncertainty.to(dtype), counted)
    raw = affine_weights(u, per_modality(rule.alpha, u), per_modality(rule.beta, u))
    weights = clamp_weights(raw, counted, rule.nonnegative, rule.normalize)
    if rule.fused is not None:
        fused = rule.fused.to(dtype)
    else:
        acting = weights.detach() if rule.detach else weights
        fused = (acting.unsqueeze(-1) * finite).sum(0).masked_fill(ruled_out.any(0), -torch.inf)
    return fused, weights, torch.where(counted, e, torch.inf)
