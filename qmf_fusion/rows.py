"""Rows, one modality of one sample each, in one tensor, and which of them count."""

from collections.abc import Sequence

import torch
from torch import Tensor

Features = Sequence[Tensor | None]  # ``[*, D]`` for each modality that has any


def wide_dtype(rows: Sequence[Tensor]) -> torch.dtype:
    """What is computed in: float32, or float64 if any row is."""
    return torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32


def per_modality(values: Tensor, like: Tensor) -> Tensor:
    """``[M]`` shaped to broadcast with ``like``, ``[M, ...]``, in its dtype."""
    return values.to(like.dtype).view(-1, *(1,) * (like.dim() - 1))


def stack_rows(rows: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows as one ``[M, *, K]``, 0 where they do not count, and where they do, ``[M, *]``: present and all finite."""
    dtype = wide_dtype(rows)
    x = torch.stack([x.to(dtype) for x in rows])
    counted = x.detach().abs().amax(-1) < torch.inf  # NaN is not; several times as fast as isfinite
    counted = counted if present is None else counted & present
    return torch.where(counted.unsqueeze(-1), x, 0), counted
