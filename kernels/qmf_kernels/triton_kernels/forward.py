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
from .rows import Inputs, lay_out, put_back, read_tiles, row_offset, tile_columns, tile_offsets, zeros
from .weights import Coefficients, fuse_tile, make_coefficients, weigh_rows


class Outputs(NamedTuple):
    """Pointers to where the results go; ``[M, R]`` unless said otherwise, None where they are not wanted."""

    weights: Any
    energy: Any
    fused: Any = None  # [R, K], with strides after the M heads'
    losses: Any = None
    stats: Any = None  # [slots, R]
    past: Any = None  # [2, M, B], see ``history``
    counter: Any = None  # one int32, to become 0 for the bookkeeping, which counts its programs


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
def forward_kernel(
    inputs, coefficients, labels, trajectory, out, num_rows, num_classes, positions, CONFIG: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * CONFIG.ROWS + tl.arange(0, CONFIG.ROWS)
    forward_rows(row, inputs, coefficients, labels, trajectory, out, num_rows, num_classes, positions, CONFIG)
    if out.counter is not None:
        tl.store(out.counter, 0, tl.program_id(0) == 0)


@triton.jit
def forward_rows(
    row, inputs, coefficients, labels, trajectory, out, num_rows, num_classes, positions, CONFIG: tl.constexpr
):
    """Rows ``[ROWS]``. Without ``labels`` fusion alone."""
    M: tl.constexpr = CONFIG.M
    rows, tiles = weigh_rows(row, inputs, coefficients, None, num_rows, num_classes, CONFIG)
    for m in tl.static_range(M):
        place = m * rows.num_rows + row
        tl.store(out.energy + place, tl.where(rows.counted[m], rows.energies[m], float("inf")), rows.inside)
        tl.store(out.weights + place, rows.weights[m], rows.inside)
        if labels is not None:
            _keep(out, CONFIG.slots.top + m, rows, rows.tops[m])
            _keep(out, CONFIG.slots.log + m, rows, tl.where(rows.counted[m], rows.logs[m], float("nan")))
            if coefficients.temperature is not None:
                _keep(out, CONFIG.slots.tempered_top + m, rows, rows.tempered_tops[m])
                _keep(out, CONFIG.slots.tempered_log + m, rows, rows.tempered_logs[m])
    sums = _fuse_rows(rows, tiles, inputs, labels, out, CONFIG)
    if labels is not None:
        _write_losses(rows, sums, inputs, labels, out, CONFIG)
    if out.past is not None:
        # Before anybody records: a sample may stand in the batch twice.
        sample = row // positions
        first = rows.inside & (row % positions == 0)
        read_history(trajectory, out.past, sample, first, rows.num_rows // positions, CONFIG)


@triton.jit
def _fuse_rows(rows, tiles, inputs, labels, out, CONFIG: tl.constexpr):
    """The second pass: writes the fused row where asked, and returns its sums."""
    M: tl.constexpr = CONFIG.M
    zero = tl.where(rows.inside, 0.0, 0.0).to(CONFIG.ACC)
    none = zeros(zero, CONFIG)
    sums = Sums(top=zero - float("inf"), total=zero, products=none, fused=zero, ruled=none, logits=none, mass=zero)
    if out.fused is not None:
        fused_offset = row_offset(rows.row, inputs.sizes, inputs.strides[M], CONFIG)
    for tile in range(CONFIG.TILES):
        column, in_tile = tile_columns(tile, rows.inside, rows.num_classes, CONFIG)
        if CONFIG.TILES == 1:
            read = tiles
        else:
            read = read_tiles(rows.offsets, column, in_tile, inputs, CONFIG)
        f, finite = fuse_tile(read, rows, in_tile, CONFIG)
        if labels is not None:
            sums = _add_tile(sums, read, f, finite, column, in_tile, rows, labels, CONFIG)
        if out.fused is not None:
            tl.store(out.fused + tile_offsets(fused_offset, inputs.strides[M], column, CONFIG), f, in_tile)
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
        fused += tl.sum(tl.where(in_tile, share * f, 0.0), 1)
        mass += tl.sum(tl.where(in_tile, share, 0.0), 1)
        ruled, logits = (), ()
        for m in tl.static_range(M):
            ruled = ruled + (sums.ruled[m] + tl.sum(tl.where(f == -float("inf"), 0.0, share * finite[m]), 1),)
            there = in_tile & rows.counted[m][:, None]
            logits = logits + (sums.logits[m] + tl.sum(tl.where(there, share * tiles[m], 0.0), 1),)
    total = sums.total * rescale + tl.sum(exps, 1)
    return Sums(top=top, total=total, products=products, fused=fused, ruled=ruled, logits=logits, mass=mass)


@triton.jit
def _write_losses(rows, sums, inputs, labels, out, CONFIG: tl.constexpr):
    """Cross-entropies, and what of the fused row the backward needs."""
    M: tl.constexpr = CONFIG.M
    y, valid = read_labels(labels, rows)
    label, ruled = label_logits(y, valid, rows, inputs, CONFIG)
    nlls, fused_top, fused_log = cross_entropies(label, ruled, valid, rows, sums.top, sums.total, CONFIG)
    _keep(out, CONFIG.slots.fused_top, rows, fused_top)
    _keep(out, CONFIG.slots.fused_log, rows, fused_log)
    _keep(out, CONFIG.slots.fused_loss, rows, nlls[M])
    if labels.smoothing is not None:
        _keep(out, CONFIG.slots.mass, rows, sums.mass)
    total = tl.where(sums.total > 0, sums.total, 1.0)
    for m in tl.static_range(M):
        tl.store(out.losses + m * rows.num_rows + rows.row, nlls[m], rows.inside)
        product = tl.where(fused_log == fused_log, sums.products[m] / total, 0.0)
        _keep(out, CONFIG.slots.product + m, rows, product)
        if labels.smoothing is not None:
            _keep(out, CONFIG.slots.ruled + m, rows, sums.ruled[m])
    if labels.class_weight is not None or labels.smoothing is not None:
        for m in tl.static_range(M + 1):
            if m < M:
                lse, class_sum = rows.tops[m] + rows.logs[m], sums.logits[m]
            else:
                lse, class_sum = fused_top + fused_log, sums.fused
            numerator, denominator = share_in_mean(
                nlls[m], lse, class_sum, sums.mass, y, labels, rows.num_classes, CONFIG
            )
            _keep(out, CONFIG.slots.numerator + m, rows, numerator)
            _keep(out, CONFIG.slots.denominator + m, rows, denominator)


@triton.jit
def _keep(out, slot, rows, value):
    tl.store(out.stats + slot * rows.num_rows + rows.row, value, rows.inside)


def launch_forward(
    inputs: Inputs,
    coefficients: Coefficients,
    labels: Labels | None,
    trajectory: Trajectory | None,
    out: Outputs,
    batch: int,
    config: Config,
) -> None:
    tiles = tiling.tile(config.M, inputs.num_classes, inputs.num_rows, config.ACC == tl.float64)
    launch(
        forward_kernel,
        -(-inputs.num_rows // tiles.rows),
        tiles.warps,
        out.energy.device,
        *(inputs, coefficients, labels, trajectory, out),
        *(inputs.num_rows, inputs.num_classes, inputs.num_rows // batch),
        config=config.tiled(tiles, len(inputs.sizes)),
    )


def fuse(logits: Sequence[Tensor], present: Tensor | None, rule: WeightRule) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits ``[*, K]``, weights and energies ``[M, *]``: one launch."""
    num, dtype, first = len(logits), accumulate_dtype(logits), logits[0]
    fused = torch.empty_like(first, dtype=dtype)
    weights, energies = (first.new_empty((num, *first.shape[:-1]), dtype=dtype) for _ in range(2))
    inputs, written = lay_out(logits, present, [fused])
    out = Outputs(weights=weights, energy=energies, fused=written[0])
    config = make_config(num, dtype, rule)
    launch_forward(inputs, make_coefficients(rule), None, None, out, inputs.num_rows, config)
    put_back(written, [fused])
    return fused, weights, energies
