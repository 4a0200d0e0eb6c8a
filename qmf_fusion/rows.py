"""Rows, one modality of one sample each, in one tensor, and which of them count."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmf_kernels.eager.fusion import accumulate_dtype
from qmf_kernels.eager.plain import is_exporting

Features = Sequence[Tensor | None]  # ``[*, D]`` for each modality that has any


def finite_rows(x: Tensor) -> Tensor:
    """Which rows ``[*, K]`` are finite throughout, ``[*]``."""
    if is_exporting():  # for ONNX Runtime, whose maximum leaves NaN out
        return torch.isfinite(x).all(-1)
    return x.abs().amax(-1) < torch.inf  # several times as fast


def stack_rows(rows: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows as one ``[M, *, K]``, 0 where they do not count, and where they do, ``[M, *]``: present and all finite."""
    dtype = accumulate_dtype(rows)
    x = torch.stack([x.to(dtype) for x in rows])
    counted = finite_rows(x.detach())
    counted = counted if present is None else counted & present
    return torch.where(counted.unsqueeze(-1), x, 0), counted


def stack_weighable(rows: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same, but a row with -inf counts if its log-sum-exp is finite, and keeps it: Eq. 11 rules that class out."""
    dtype = accumulate_dtype(rows)
    x = torch.stack([x.to(dtype) for x in rows])
    counted = torch.isfinite(torch.logsumexp(x.detach(), -1))
    counted = counted if present is None else counted & present
    return torch.where(counted.unsqueeze(-1), x, 0), counted
