"""What heads are given: rows that are absent or broken are filled before they reach a head's arithmetic.

No gradient comes to such a row, yet 0 times NaN is NaN: one NaN in an input would make every parameter of its head NaN
in the head's own backward, and the modality absent for ever.
"""

import math
from typing import Any

import torch
from torch import Tensor

from qmf_kernels.eager.plain import is_exporting

from .checks import can_look


def fill_rows(given: Any, present: Tensor | None) -> tuple[Any, Tensor | None]:
    """A head's input with whole rows in place of those that are not, and which are, ``[B]`` bool; None for all.

    Each row that is absent, or holds a value that is not finite, is filled with a copy of one that is whole, in turn:
    a batch normalisation sees the statistics of the whole ones. Without any whole row they are filled with zeros.

    Args:
        given: a tensor ``[B, ...]``, and whatever else: that is returned as it is, since which of its parts hold a row
            for each sample, and where values may be infinite (a mask for attention), is not known here.
        present: bool ``[B]``, or one for all; False where a row is absent. Of another length it is not looked at.
    """
    if not isinstance(given, Tensor) or given.dim() == 0 or given.layout != torch.strided or given.is_nested:
        return given, None
    whole = None
    if present is not None and present.device == given.device and present.shape in ((), given.shape[:1]):
        whole = present.expand(given.shape[0])
    if given.is_floating_point() and given.numel() > 0 and not _all_finite(given):
        finite = _finite_samples(given.detach())
        whole = finite if whole is None else finite & whole
    if whole is None or (can_look(whole) and bool(whole.all())):
        return given, None
    filled = given[_stand_ins(whole)]  # which keeps the memory format, as index_select does not
    if given.is_floating_point():
        filled = torch.where(whole.any(), filled, 0)
    return filled, whole


def break_rows(logits: Tensor, whole: Tensor) -> Tensor:
    """``logits`` ``[B, ...]``, NaN where a row of the input was filled; all of them where it has no row per sample."""
    if logits.shape[0] != whole.shape[0]:
        whole = whole.all().expand(logits.shape[0])
    return torch.where(whole.view(-1, *(1,) * (logits.dim() - 1)), logits, torch.nan)


def _all_finite(x: Tensor) -> bool:
    """Whether every value is known to be finite; False on a device, whose answer would have to be waited for."""
    return can_look(x) and math.isfinite(x.detach().sum().item())


def _finite_samples(x: Tensor) -> Tensor:
    """Which of the samples of ``x`` ``[B, ...]`` are finite throughout, ``[B]``."""
    if x.dim() == 1:
        return torch.isfinite(x)
    if is_exporting():  # for ONNX Runtime, whose maximum leaves NaN out
        return torch.isfinite(x).flatten(1).all(1)
    return torch.linalg.vector_norm(x, torch.inf, dim=tuple(range(1, x.dim()))) < torch.inf


def _stand_ins(whole: Tensor) -> Tensor:
    """For each row, itself where it is ``whole`` ``[B]``, else one that is, in turn: int64 ``[B]``."""
    place = torch.arange(whole.shape[0], device=whole.device)
    # The whole rows' places, in order, and the others' behind them; not by sorting, which ONNX cannot keep stable.
    rank = torch.where(whole, whole.cumsum(0), whole.sum() + (~whole).cumsum(0)) - 1
    in_order = torch.zeros_like(place).scatter(0, rank, place)
    turn = ((~whole).cumsum(0) - 1) % whole.sum().clamp_min(1)
    return torch.where(whole, place, in_order[turn])


def rows_present(present: Any, modality: int, num: int) -> Tensor | None:
    """Which samples have the modality anywhere, bool ``[B]`` or one for all; None of what is no mask of M modalities,
    which the fusion refuses.
    """
    if not isinstance(present, Tensor) or present.dtype != torch.bool or present.dim() == 0 or len(present) != num:
        return None
    own = present[modality]
    return own if own.dim() < 2 else own.flatten(1).any(1)
