"""Where the rows of tensors ``[*, K]`` lie: as few row dimensions as all of them share, and each one's own strides.

A row is what has K logits: a sample, or a position of a sample in dense prediction. Nothing is copied: heads whose
class dimension stands before the positions keep it there.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

# Row dimensions that a kernel can walk; what does not fold into so few is copied first.
MOST_DIMS = 3


class Layout(NamedTuple):
    """The rows' shape, D dimensions; D row strides and the class stride of each tensor; the mask's, if there is one."""

    sizes: tuple[int, ...]
    strides: tuple[tuple[int, ...], ...]
    present_strides: tuple[int, tuple[int, ...]] | None  # of the modalities, and of the D row dimensions


def lay_out(tensors: Sequence[Tensor], present: Tensor | None) -> Layout | None:
    """The layout of tensors of one shape ``[*, K]`` and a mask ``[M, *]``, or None where it takes more than
    ``MOST_DIMS`` row dimensions.
    """
    rows = [x.stride()[:-1] for x in tensors]
    if present is not None:
        rows.append(present.stride()[1:])
    folded = _fold(tensors[0].shape[:-1], rows)
    if folded is None:
        return None
    sizes, strides = folded
    mask = None if present is None else (present.stride(0), strides[-1])
    return Layout(sizes, tuple((*s, x.stride(-1)) for s, x in zip(strides, tensors, strict=False)), mask)


def _fold(
    shape: Sequence[int], strides: Sequence[tuple[int, ...]]
) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """Dimensions that follow on each other in every tensor made one."""
    if len(shape) == 1:
        return (shape[0],), list(strides)
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(k[-1] == size * s[dim] for k, s in zip(kept, strides, strict=True)):
            sizes[-1] *= size
            for k, s in zip(kept, strides, strict=True):
                k[-1] = s[dim]
        else:
            sizes.append(size)
            for k, s in zip(kept, strides, strict=True):
                k.append(s[dim])
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return None if len(sizes) > MOST_DIMS else (tuple(sizes), [tuple(k) for k in kept])
