"""A small batch's whole objective in one launch: losses, ranking, history, and the gradients of the loss.

One program does what the three launches do, in turn, walking the batch; what one step leaves for the next goes through
memory, between barriers. The logits are read twice, the second time from the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules import LossGrads
from . import tiling
from .backward import Kept, Written, backward_rows
from .bookkeeping import Results, Samples, book_samples, finish_sums
from .config import Config, accumulator
from .cross_entropy import Labels
from .forward import Outputs, forward_rows
from .history import Trajectory
from .launch import launch
from .rows import Inputs, narrow
from .weights import Coefficients


@triton.jit(debug=True, do_not_specialize=["batch"])
def single_kernel(
    inputs, coefficients, labels, trajectory, out, samples, results, grads, kept, written, batch, num_classes,
    CONFIG: tl.constexpr,
):  # fmt: skip
    """ROWS rows at a time, then all samples at once, then the rows again."""
    first = tl.zeros((), tl.int64)
    while first < batch:
        row = first + tl.arange(0, CONFIG.ROWS)
        forward_rows(row, inputs, coefficients, labels, trajectory, out, batch, num_classes, 1, CONFIG)
        first += CONFIG.ROWS
    tl.debug_barrier()
    book_samples(0, 1, samples, results, trajectory, batch, CONFIG)
    tl.debug_barrier()
    finish_sums(results, trajectory, 1, batch, CONFIG)
    tl.debug_barrier()
    first = tl.zeros((), tl.int64)
    while first < batch:
        row = first + tl.arange(0, CONFIG.ROWS)
        backward_rows(row, 0, inputs, coefficients, labels, grads, kept, written, batch, num_classes, 1, CONFIG)
        first += CONFIG.ROWS


def launch_single(
    inputs: Inputs,
    coefficients: Coefficients,
    labels: Labels,
    trajectory: Trajectory | None,
    out: Outputs,
    samples: Samples,
    results: Results,
    kept: Kept,
    d_logits: Sequence[Tensor],
    block: tiling.Block,
    config: Config,
) -> None:
    batch, num_classes = inputs.num_rows, inputs.num_classes
    everything = coefficients.temperature is not None and labels.smoothing is not None
    tiles = tiling.tile(config.M, num_classes, batch, everything or config.ACC == tl.float64, alone=True)
    written = Written(logits=tuple(d_logits), strides=tuple(d.stride() for d in d_logits))
    launch(
        single_kernel,
        1,
        tiles.warps,
        out.energy.device,
        *(inputs, coefficients, labels, trajectory, out, samples, results, LossGrads(), kept, written),
        *(batch, num_classes),
        config=config.tiled(tiles, 1).blocked(block)._replace(unit=True, SUMS=1),
    )


@triton.jit
def scale_kernel(grads, scale, out, size, in_place: tl.constexpr, CONFIG: tl.constexpr):
    """M dense gradients of ``size`` elements times a scalar; in place, nothing is done where that is 1."""
    M: tl.constexpr = CONFIG.M
    factor = tl.load(scale)
    place = tl.program_id(0).to(tl.int64) * CONFIG.CLASSES + tl.arange(0, CONFIG.CLASSES)
    if (not in_place) or factor != 1:
        for m in tl.static_range(M):
            grad = tl.load(grads[m] + place, place < size) * factor
            tl.store(out[m] + place, narrow(grad, out[m]), place < size)


def scale_gradients(d_logits: Sequence[Tensor], scale: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
    """``d_logits`` times the scalar ``scale``, in the logits' dtypes; in place where those are theirs: one launch."""
    in_place = all(d.dtype == x.dtype for d, x in zip(d_logits, logits, strict=True))
    # Dense tensors of one shape and the same strides: what follows in memory is all that counts.
    out = d_logits if in_place else [torch.empty_like(d, dtype=x.dtype) for d, x in zip(d_logits, logits, strict=True)]
    size = d_logits[0].numel()
    config = Config(M=len(logits), ACC=accumulator(d_logits[0].dtype), CLASSES=1024)
    arguments = (tuple(d_logits), scale, tuple(out), size, in_place)
    launch(scale_kernel, -(-size // config.CLASSES), 4, logits[0].device, *arguments, config=config)
    return list(out)
