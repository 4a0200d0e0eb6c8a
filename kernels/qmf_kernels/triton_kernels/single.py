"""A small batch's whole objective in one launch: losses, ranking, history, and the gradients of the loss.

One program does what the three launches do, in turn, walking the batch; what one step leaves for the next goes through
memory, between barriers. The logits are read twice, the second time from the cache.
"""

import triton
import triton.language as tl

from .backward import backward_rows
from .bookkeeping import book_samples, finish_sums
from .forward import forward_rows
from .rows import narrow


@triton.jit(debug=True, do_not_specialize=["batch"])
def single_kernel(
    logits, sizes, strides, present, present_strides, makers, labels, trajectory, samples, results, partial,
    ranking_weight, stats, fused, weights_out, energy_out, losses_out, grads, kept, d_logits, d_strides, maker_out,
    batch, num_classes,
    M: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr, SB: tl.constexpr, JB: tl.constexpr, TILES: tl.constexpr,
    RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """RB rows at a time, then all of the SB samples at once, then the rows again."""
    first = tl.zeros((), tl.int64)
    while first < batch:
        forward_rows(
            first + tl.arange(0, RB), logits, sizes, strides, present, present_strides, makers, labels, trajectory,
            stats, fused, weights_out, energy_out, losses_out, samples.past, batch, num_classes, 1,
            M, 1, KB, TILES, RULES, SLOTS, ACC,
        )  # fmt: skip
        first += RB
    tl.debug_barrier()
    book_samples(0, 1, samples, results, trajectory, partial, batch, M, SB, JB, RULES, ACC)
    tl.debug_barrier()
    finish_sums(results, trajectory, partial, 1, batch, ranking_weight, M, 1, RULES, ACC)
    tl.debug_barrier()
    first = tl.zeros((), tl.int64)
    while first < batch:
        backward_rows(
            first + tl.arange(0, RB), 0, 1, logits, sizes, strides, makers, labels, grads, kept, ranking_weight,
            d_logits, d_strides, maker_out, batch, num_classes, 1, M, 1, KB, TILES, RULES, SLOTS, ACC,
        )  # fmt: skip
        first += RB


@triton.jit
def scale_kernel(grads, scale, out, size, M: tl.constexpr, BLOCK: tl.constexpr, IN_PLACE: tl.constexpr):
    """M dense gradients of ``size`` elements times a scalar; in place, nothing is done where that is 1."""
    factor = tl.load(scale)
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if (not IN_PLACE) or factor != 1:
        for m in tl.static_range(M):
            grad = tl.load(grads[m] + place, place < size) * factor
            tl.store(out[m] + place, narrow(grad, out[m]), place < size)
