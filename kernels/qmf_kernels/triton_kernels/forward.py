"""The forward: energies, weights, fused logits and cross-entropies of all rows (Eq. 13, 9, 11), one read of the logits.

Two passes over a row: the first finds each modality's log-sum-exp, hence its weight; the second the fused row's, and
the products of softmax(f) with the logits that make the backward one pass. Rows of one tile stay in registers between
the two. Nothing of size ``[R, K]`` is written but fused logits, where asked for.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eager.fusion import accumulate_dtype
from ..rules import WeightRule
from . import tiling
from .config import Config, make_config
from .cross_entropy import Labels, class_weights, cross_entropies, label_logits, read_labels, share_in_mean
from .history import Trajectory, read_history
from .launch import launch
from .memory import Memory, contiguous
from .rows import Inputs, lay_out, put_back, read_tiles, row_offset, tile_columns, tile_offsets
from .weights import fuse_tile, stat, weigh_rows


class Sums(NamedTuple):
    """Over the classes of fused rows; ``[ROWS]``, or a tuple of M such. The last four are with smoothing alone: of the
    classes' weights, times something.
    """

    top: Any  # the largest fused logit
    total: Any  # of exp(f - top)
    products: Any  # of that times each modality's logits
    fused: Any  # times the fused logits
    ruled: Any  # times each modality's logits, over the classes that are not ruled out
    logits: Any  # times each modality's logits
    mass: Any  # times 1


@triton.jit(debug=True, do_not_specialize=["num_rows"])
def forward_kernel(inputs, rule, labels, trajectory, memory, num_rows, num_classes, positions, CONFIG: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * CONFIG.tile.rows + tl.arange(0, CONFIG.tile.rows)
    forward_rows(row, inputs, rule, labels, trajectory, memory, num_rows, num_classes, positions, CONFIG)
    if memory.counter is not None:
        tl.store(memory.counter, 0, tl.program_id(0) == 0)


@triton.jit
def forward_rows(row, inputs, rule, labels, trajectory, memory, num_rows, num_classes, positions, CONFIG: tl.constexpr):
    M: tl.constexpr = CONFIG.M
    rows, tiles = weigh_rows(row, inputs, rule, memory, num_rows, num_classes, False, CONFIG)
    for m in tl.static_range(M):
        place = m * rows.num_rows + row
        tl.store(memory.energy + place, tl.where(rows.counted[m], rows.energies[m], float("inf")), rows.inside)
        tl.store(memory.weights + place, rows.weights[m], rows.inside)
        if CONFIG.losses:
            _keep(memory, CONFIG.slots.top, m, rows, rows.tops[m])
            log = tl.where(rows.counted[m], rows.logs[m], float("nan"))
            _keep(memory, CONFIG.slots.log, m, rows, log)
            if rule.temperature is not None:
                _keep(memory, CONFIG.slots.tempered_top, m, rows, rows.tempered_tops[m])
                _keep(memory, CONFIG.slots.tempered_log, m, rows, rows.tempered_logs[m])
    sums = _fuse_rows(rows, tiles, inputs, labels, memory, CONFIG)
    if CONFIG.losses:
        _write_losses(rows, sums, inputs, labels, memory, CONFIG)
    if CONFIG.reads:
        # Before anybody records: a sample may stand in the batch twice.
        sample = row // positions
        first = rows.inside & (row % positions == 0)
        read_history(trajectory, memory, sample, first, rows.num_rows // positions, CONFIG)


@triton.jit
def _fuse_rows(rows, tiles, inputs, labels, memory, CONFIG: tl.constexpr):
    """The second pass: writes the fused row where asked, and returns its sums."""
    M: tl.constexpr = CONFIG.M
    zero = tl.where(rows.inside, 0.0, 0.0).to(CONFIG.ACC)
    none = (zero,) * M
    sums = Sums(top=zero - float("inf"), total=zero, products=none, fused=zero, ruled=none, logits=none, mass=zero)
    if memory.fused is not None:
        fused_offset = row_offset(rows.row, inputs.sizes, inputs.strides[M], CONFIG)
    for tile in range(CONFIG.tile.tiles):
        column, in_tile = tile_columns(tile, rows.inside, rows.num_classes, CONFIG)
        if CONFIG.tile.tiles == 1:
            read = tiles
        else:
            read = read_tiles(rows.offsets, column, in_tile, inputs, CONFIG)
        f, finite = fuse_tile(read, rows, in_tile, CONFIG)
        if CONFIG.losses:
            sums = _add_tile(sums, read, f, finite, column, in_tile, rows, labels, CONFIG)
        if memory.fused is not None:
            tl.store(memory.fused + tile_offsets(fused_offset, inputs.strides[M], column, CONFIG), f, in_tile)
    return sums


@triton.jit
def _add_tile(sums, tiles, f, finite, column, in_tile, rows, labels, CONFIG: tl.constexpr):
    M: tl.constexpr = CONFIG.M
    top = tl.maximum(sums.top, tl.max(f, 1))
    base = tl.where(top == -float("inf"), 0.0, top)
    rescale = tl.exp(sums.top - base)
    exps = tl.exp(f - base[:, None])
    fused, ruled, logits, mass = sums.fused, sums.ruled, sums.logits, sums.mass
    products = ()
    for m in tl.static_range(M):
        products = products + (sums.products[m] * rescale + tl.sum(exps * finite[m], 1),)
    if labels.smoothing is not None:
        share = class_weights(column, labels, rows.num_classes, CONFIG)[None, :]
        weighs = in_tile & (share > 0)  # 0 times -inf would be NaN
        fused += tl.sum(tl.where(weighs, share * f, 0.0), 1)
        mass += tl.sum(tl.where(in_tile, share, 0.0), 1)
        ruled, logits = (), ()
        for m in tl.static_range(M):
            ruled = ruled + (sums.ruled[m] + tl.sum(tl.where(f == -float("inf"), 0.0, share * finite[m]), 1),)
            there = weighs & rows.counted[m][:, None]
            logits = logits + (sums.logits[m] + tl.sum(tl.where(there, share * tiles[m], 0.0), 1),)
    total = sums.total * rescale + tl.sum(exps, 1)
    return Sums(top=top, total=total, products=products, fused=fused, ruled=ruled, logits=logits, mass=mass)


@triton.jit
def _write_losses(rows, sums, inputs, labels, memory, CONFIG: tl.constexpr):
    """Cross-entropies, and what of the fused row the backward needs."""
    M: tl.constexpr = CONFIG.M
    y, valid = read_labels(labels, rows)
    label, ruled = label_logits(y, valid, rows, inputs, CONFIG)
    nlls, fused_top, fused_log = cross_entropies(label, ruled, valid, rows, sums.top, sums.total, CONFIG)
    _keep(memory, CONFIG.slots.top, M, rows, fused_top)
    _keep(memory, CONFIG.slots.log, M, rows, fused_log)
    if labels.smoothing is not None:
        _keep(memory, CONFIG.slots.mass, 0, rows, sums.mass)
    total = tl.where(sums.total > 0, sums.total, 1.0)
    for m in tl.static_range(M):
        product = tl.where(fused_log == fused_log, sums.products[m] / total, 0.0)
        _keep(memory, CONFIG.slots.product, m, rows, product)
        if labels.smoothing is not None:
            _keep(memory, CONFIG.slots.ruled, m, rows, sums.ruled[m])
    for m in tl.static_range(M + 1):
        if m < M:
            lse, class_sum = rows.tops[m] + rows.logs[m], sums.logits[m]
        else:
            lse, class_sum = fused_top + fused_log, sums.fused
        share = share_in_mean(nlls[m], lse, class_sum, sums.mass, y, labels, rows.num_classes, CONFIG)
        place = m * rows.num_rows + rows.row
        tl.store(memory.losses + place, nlls[m], rows.inside)
        tl.store(memory.numerator + place, share[0], rows.inside)
        tl.store(memory.denominator + place, share[1], rows.inside)


@triton.jit
def _keep(memory, slot, m, rows, value):
    tl.store(stat(memory, slot, m, rows.row, rows.num_rows), value, rows.inside)


def launch_forward(
    inputs: Inputs,
    rule: WeightRule,
    labels: Labels | None,
    trajectory: Trajectory | None,
    memory: Memory,
    batch: int,
    config: Config,
) -> None:
    num_rows, num_classes = inputs.num_rows, inputs.num_classes
    tile = tiling.tile(config.M, num_classes, num_rows, config.ACC == tl.float64)
    programs, device = -(-num_rows // tile.rows), memory.energy.device
    arguments = (inputs, rule, labels, trajectory, memory, num_rows, num_classes, num_rows // batch)
    config = config._replace(DIMS=len(inputs.sizes), tile=tile)
    launch(forward_kernel, programs, tile.warps, device, *arguments, config=config)


def fuse(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits ``[*, K]``, weights and energies ``[M, *]``: one launch."""
    num, dtype, first = len(logits), accumulate_dtype(logits), logits[0]
    fused = torch.empty_like(first, dtype=dtype)
    weights, energies = (first.new_empty((num, *first.shape[:-1]), dtype=dtype) for _ in range(2))
    inputs, written = lay_out(logits, present, [fused])
    memory = Memory(weights=weights, energy=energies, fused=written[0])
    launch_forward(inputs, contiguous(rule), None, None, memory, inputs.num_rows, make_config(num, dtype, rule))
    put_back(written, [fused])
    return fused, weights, energies
