"""LogitNorm in a kernel (``qmf_kernels.lognorm`` has the formula): what rows are multiplied by, and tiles so seen.

A row's factor is kept in two, the first a power of two, as one over the norm may be out of range.
"""

import triton
import triton.language as tl

from .rows import number, read_tile


@triton.jit
def row_factors(
    pointer, offset, strides, makers, in_row, num_classes,
    DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Both factors ``[RB]``; NaN where a row is not finite."""
    largest = tl.where(in_row, 0.0, 0.0).to(ACC)
    squares = largest
    for tile in range(TILES):
        column = tile * KB + tl.arange(0, KB)
        inside = in_row[:, None] & (column < num_classes)[None, :]
        x = tl.where(inside, read_tile(pointer, offset, strides, column, inside, DIMS, ACC), 0.0)
        new = tl.maximum(largest, tl.max(tl.abs(x), 1))
        base = tl.where(new == 0, 1.0, new)
        shrunk = largest / base
        x = x / base[:, None]
        largest, squares = new, squares * (shrunk * shrunk) + tl.sum(x * x, 1)
    up: tl.constexpr = 2.0**512 if ACC == tl.float64 else 2.0**64
    first = tl.where(largest > up, 1.0 / up, tl.where((largest > 0) & (largest < 1.0 / up), up, 1.0)).to(ACC)
    norm = tl.where(largest == 0, 1.0, (largest * first) * tl.sqrt(squares))
    return first, 1.0 / (norm * number(makers.norm, ACC))


@triton.jit
def normalize(x, factors):
    """A tile of logits as the rules see it."""
    return (x * factors[0][:, None]) * factors[1][:, None]


@triton.jit
def normalize_backward(grad, x, along, factors, makers, ACC: tl.constexpr):
    """From a tile's gradient to that of the logits as they came; ``along`` is <grad, x> over the row."""
    t = number(makers.norm, ACC)
    return ((grad - x * (along * (t * t))[:, None]) * factors[1][:, None]) * factors[0][:, None]
