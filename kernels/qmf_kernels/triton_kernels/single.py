"""A small batch's whole objective in one launch: losses, ranking, history, and the gradients of the loss.

One program does what the three launches do, in turn, walking the batch; what one step leaves for the next goes through
memory, between barriers. The logits are read twice, the second time from the cache.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..rules import LossGrads, WeightRule
from . import tiling
from .backward import Written, backward_rows
from .bookkeeping import book_samples, finish_sums
from .config import TYPES, Config
from .cross_entropy import Labels
from .forward import forward_rows
from .history import Trajectory
from .launch import launch
from .memory import Memory
from .rows import Inputs, narrow


@triton.jit(debug=True, do_not_specialize=["batch"])
def single_kernel(inputs, rule, labels, trajectory, memory, grads, out, batch, num_classes, CONFIG: tl.constexpr):
    """Some rows at a time, then all samples at once, then the rows again."""
    first = tl.zeros((), tl.int64)
    while first < batch:
        row = first + tl.arange(0, CONFIG.tile.rows)
        forward_rows(row, inputs, rule, labels, trajectory, memory, batch, num_classes, 1, CONFIG)
        first += CONFIG.tile.rows
    tl.debug_barrier()
    book_samples(0, 1, memory, trajectory, batch, CONFIG)
    tl.debug_barrier()
    finish_sums(memory, trajectory, 1, batch, CONFIG)
    tl.debug_barrier()
    first = tl.zeros((), tl.int64)
    while first < batch:
        row = first + tl.arange(0, CONFIG.tile.rows)
        backward_rows(row, 0, inputs, rule, labels, grads, memory, out, batch, num_classes, 1, CONFIG)
        first += CONFIG.tile.rows


def launch_single(
    inputs: Inputs,
    rule: WeightRule,
    labels: Labels,
    trajectory: Trajectory | None,
    memory: Memory,
    d_logits: Sequence[Tensor],
    config: Config,
) -> None:
    batch, num_classes = inputs.num_rows, inputs.num_classes
    everything = rule.temperature is not None and labels.smoothing is not None
    tile = tiling.tile(config.M, num_classes, batch, everything or config.ACC == tl.float64, alone=True)
    out = Written(logits=tuple(d_logits), strides=tuple(d.stride() for d in d_logits))
    arguments = (inputs, rule, labels, trajectory, memory, LossGrads(), out, batch, num_classes)
    config = config._replace(tile=tile, unit=True)
    launch(single_kernel, 1, tile.warps, memory.energy.device, *arguments, config=config)


@triton.jit
def scale_kernel(grads, scale, out, size, in_place: tl.constexpr, CONFIG: tl.constexpr):
    """M dense gradients of ``size`` elements times a scalar; in place, nothing is done where that is 1."""
    M: tl.constexpr = CONFIG.M
    factor = tl.load(scale)
    place = tl.program_id(0).to(tl.int64) * CONFIG.tile.classes + tl.arange(0, CONFIG.tile.classes)
    if (not in_place) or factor != 1:
        for m in tl.static_range(M):
            grad = tl.load(grads[m] + place, place < size) * factor
            tl.store(out[m] + place, narrow(grad, out[m]), place < size)


def scale_gradients(d_logits: Sequence[Tensor], scale: Tensor, logits: Sequence[Tensor]) -> list[Tensor]:
    """``d_logits`` times the scalar ``scale``, in the logits' dtypes; in place where those are theirs: one launch."""
    in_place = all(d.dtype == x.dtype for d, x in zip(d_logits, logits, strict=True))
    # Dense tensors of one shape and the same strides: what follows in memory is all that counts.
    out = d_logits if in_place else [torch.empty_like(d, dtype=x.dtype) for d, x in zip(d_logits, logits, strict=True)]
    size, tile = d_logits[0].numel(), tiling.Tiling(rows=1, classes=1024, tiles=1, warps=4)
    arguments = (tuple(d_logits), scale, tuple(out), size, in_place)
    config = Config(M=len(logits), ACC=TYPES[d_logits[0].dtype], tile=tile)
    launch(scale_kernel, -(-size // tile.classes), tile.warps, logits[0].device, *arguments, config=config)
    return list(out)
