"""Rows of logits ``[*, K]``: where they lie, and their log-sum-exps (Eq. 13's sum), a tile at a time.

A row is what has K logits: a sample, or a position of a sample in dense prediction. Nothing is copied: heads whose
class dimension stands before the positions keep it there. A program holds ROWS rows of M modalities, and a tuple
of M tensors ``[ROWS]`` for whatever is one number per row.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

# Row dimensions that a kernel can walk; what does not fold into so few is copied first.
MOST_DIMS = 3


class Inputs(NamedTuple):
    """M heads' logits and their mask, as they lie."""

    logits: Any  # M pointers
    sizes: Any  # the rows' shape, D dimensions that all tensors share
    strides: Any  # D row strides and the class stride of each head, then those of further tensors ``[*, K]``
    present: Any  # pointer, or None
    present_strides: Any  # the modalities', and D row strides

    @property
    def num_rows(self) -> int:
        return math.prod(self.sizes)

    @property
    def num_classes(self) -> int:
        classes: int = self.logits[0].shape[-1]
        return classes


def lay_out(
    logits: Sequence[Tensor], present: Tensor | None = None, others: Sequence[Tensor] = ()
) -> tuple[Inputs, tuple[Tensor, ...]]:
    """Heads ``[*, K]`` and a mask ``[M, *]`` for a kernel; and ``others`` of the logits' shape, as they are to be
    passed: as they lie or, where all take more than ``MOST_DIMS`` row dimensions, copied as everything then is.
    """
    num, tensors = len(logits), [*logits, *others]
    folded = _fold(tensors, present)
    if folded is None:
        tensors = [x.contiguous() for x in tensors]
        present = None if present is None else present.contiguous()
        folded = _fold(tensors, present)
        assert folded is not None
    sizes, strides = folded
    mask = None if present is None else (present.stride(0), strides[-1])
    strides = [(*s, x.stride(-1)) for s, x in zip(strides, tensors, strict=False)]
    inputs = Inputs(
        logits=tuple(tensors[:num]), sizes=sizes, strides=tuple(strides), present=present, present_strides=mask
    )
    return inputs, tuple(tensors[num:])


def _fold(tensors: Sequence[Tensor], present: Tensor | None) -> tuple[tuple[int, ...], list[tuple[int, ...]]] | None:
    """Sizes and each one's strides, dimensions that follow on each other in all of them made one; None: too many."""
    shape, strides = tensors[0].shape[:-1], [x.stride()[:-1] for x in tensors]
    if present is not None:
        strides.append(present.stride()[1:])
    if len(shape) == 1:
        return (shape[0],), strides
    sizes: list[int] = []
    kept: list[list[int]] = [[] for _ in strides]
    for dim, size in enumerate(shape):
        if size == 1:
            continue
        if sizes and all(k[-1] == size * s[dim] for k, s in zip(kept, strides, strict=True)):
            sizes[-1] *= size
            for k in kept:
                k.pop()
        else:
            sizes.append(size)
        for k, s in zip(kept, strides, strict=True):
            k.append(s[dim])
    if not sizes:
        return (1,), [(0,) for _ in strides]
    return None if len(sizes) > MOST_DIMS else (tuple(sizes), [tuple(k) for k in kept])


def put_back(written: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Copy what was written to where it was wanted, where ``lay_out`` had to copy it."""
    for source, place in zip(written, wanted, strict=True):
        if source is not place:
            place.copy_(source)


# In kernels


@triton.jit
def widen(number):
    """An integer as int64, so that what it multiplies may exceed 2^31; of one that is compiled in too."""
    return tl.full((), number, tl.int64)


@triton.jit
def narrow(value, pointer):
    """``value`` in what ``pointer`` points to; from float64 to half precision by way of float32, as PyTorch does."""
    if pointer.dtype.element_ty == tl.float64:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit
def row_offset(row, sizes, strides, CONFIG: tl.constexpr):
    """Elements from a tensor's start to the given rows, int64."""
    if CONFIG.DIMS == 1:
        return row * strides[0]
    elif CONFIG.DIMS == 2:
        return (row // sizes[1]) * strides[0] + (row % sizes[1]) * strides[1]
    else:
        inner = widen(sizes[1]) * sizes[2]
        rest = row % inner
        return (row // inner) * strides[0] + (rest // sizes[2]) * strides[1] + (rest % sizes[2]) * strides[2]


@triton.jit
def tile_columns(tile, inside, num_classes, CONFIG: tl.constexpr):
    """The classes of a tile, ``[CLASSES]``, and which of its logits there are, ``[ROWS, CLASSES]``."""
    column = tile * CONFIG.tile.classes + tl.arange(0, CONFIG.tile.classes)
    return column, inside[:, None] & (column < num_classes)[None, :]


@triton.jit
def tile_offsets(offset, strides, column, CONFIG: tl.constexpr):
    """From the rows' offsets to those of a tile's logits."""
    DIMS: tl.constexpr = CONFIG.DIMS
    return offset[:, None] + column.to(tl.int64)[None, :] * strides[DIMS]


@triton.jit
def read_tile(m, offset, column, in_tile, inputs, CONFIG: tl.constexpr):
    """Logits ``[ROWS, CLASSES]`` of a modality; -inf outside."""
    place = tile_offsets(offset, inputs.strides[m], column, CONFIG)
    return tl.load(inputs.logits[m] + place, in_tile, other=-float("inf")).to(CONFIG.ACC)


@triton.jit
def read_tiles(offsets, column, in_tile, inputs, CONFIG: tl.constexpr):
    M: tl.constexpr = CONFIG.M
    tiles = ()
    for m in tl.static_range(M):
        tiles = tiles + (read_tile(m, offsets[m], column, in_tile, inputs, CONFIG),)
    return tiles


@triton.jit
def temperature(m, rule, CONFIG: tl.constexpr):
    return tl.load(rule.temperature + m).to(CONFIG.ACC)


@triton.jit
def sum_exponentials(m, offset, inside, inputs, rule, num_classes, CONFIG: tl.constexpr):
    """A modality's largest value and sum of exponentials, of x and, where T is not 1, of x / T; the last tile read."""
    zero = tl.where(inside, 0.0, 0.0).to(CONFIG.ACC)
    found = (zero - float("inf"), zero, zero - float("inf"), zero)
    column, in_tile = tile_columns(0, inside, num_classes, CONFIG)
    x = read_tile(m, offset, column, in_tile, inputs, CONFIG)
    found = _add_tile(found, x, m, rule, CONFIG)
    for tile in range(1, CONFIG.tile.tiles):
        column, in_tile = tile_columns(tile, inside, num_classes, CONFIG)
        following = read_tile(m, offset, column, in_tile, inputs, CONFIG)
        found = _add_tile(found, following, m, rule, CONFIG)
    return found, x


@triton.jit
def _add_tile(found, x, m, rule, CONFIG: tl.constexpr):
    top, total = accumulate(found[0], found[1], x)
    tempered_top, tempered_total = found[2], found[3]
    if rule.temperature is not None:
        scaled = x / temperature(m, rule, CONFIG)
        tempered_top, tempered_total = accumulate(tempered_top, tempered_total, scaled)
    return top, total, tempered_top, tempered_total


@triton.jit
def accumulate(top, total, x):
    """Online log-sum-exp over the classes: ``top`` the largest so far, ``total`` the sum of exp(x - top)."""
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)


@triton.jit
def split_log_sum_exps(found, counted, rule):
    """From the results of ``sum_exponentials`` to log-sum-exps in two parts, of x and of x / T."""
    top, total, tempered_top, tempered_total = found
    if rule.temperature is None:
        tempered_top, tempered_total = top, total
    log, tempered_log = tl.log(tl.where(counted, total, 1.0)), tl.log(tl.where(counted, tempered_total, 1.0))
    return tl.where(counted, top, 0.0), log, tl.where(counted, tempered_top, 0.0), tempered_log
