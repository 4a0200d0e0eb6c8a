"""The backward: one read of the logits, one write of their gradients; all else is recomputed from the stats."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .gradients import loss_coefficients, tile_gradients, weight_gradients
from .measures import moment, slope, value
from .passes import fuse_tile, label_logits, read_labels, scan, summarize, zeros
from .rows import clamp_weights, coefficient, narrow, number, raw_weight, read_tile, row_offset, widen


class Kept(NamedTuple):
    """Pointers to what forward and bookkeeping left: ``[slots, R]``, ``[M + 1]``, ``[M, B]``; for fusion alone the
    energies ``[M, R]``.
    """

    stats: Any
    inverse: Any
    ranking_grad: Any
    energy: Any


class MakerOut(NamedTuple):
    """Pointers to where gradients of what makes the weights go, or None: of ready weights ``[M, R]``, and per program
    the sums that are those of alpha, beta and T, ``[3 M, programs]``.
    """

    weights: Any
    sums: Any


@triton.jit
def _scalar(pointer, absent: tl.constexpr, ACC: tl.constexpr):
    if pointer is not None:
        return tl.load(pointer).to(ACC)
    else:
        return tl.full((), absent, ACC)


@triton.jit
def _log_sum_exps(
    kept, logits, offsets, strides, makers, row, in_row, num_rows, num_classes,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr,
    RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Which rows count, and their log-sum-exps in two parts; of x / T too where that is not x; and the measures of the
    uncertainty, for which fusion alone reads the row once more.
    """
    counts, tops, logs, tempered_tops, tempered_logs, measured = (), (), (), (), (), ()
    for m in tl.static_range(M):
        if kept.stats is None:
            energy = tl.load(kept.energy + m * num_rows + row, in_row, other=float("inf"))
            counted = energy < float("inf")
            if RULES.measured:
                found, _ = scan(
                    logits[m], offsets[m], strides[m], m, makers, in_row, num_classes, DIMS, KB, TILES, RULES, ACC
                )
                top, log, tempered_top, tempered_log, number = summarize(found, counted, num_classes, RULES, ACC)
            else:
                lse = tl.where(counted, -energy, 0.0)
                if RULES.tempered:
                    lse = lse / coefficient(makers.temperature, m, ACC)
                top, log, tempered_top, tempered_log = lse, tl.zeros_like(lse), lse, tl.zeros_like(lse)
                number = log
        else:
            place = kept.stats + m * num_rows + row
            top = tl.load(place + SLOTS.top * num_rows, in_row, other=0.0)
            log = tl.load(place + SLOTS.logs * num_rows, in_row, other=float("nan"))
            counted = log == log
            tempered_top, tempered_log, number = top, log, log
            if RULES.tempered:
                tempered_top = tl.load(place + SLOTS.tempered_top * num_rows, in_row, other=0.0)
                tempered_log = tl.load(place + SLOTS.tempered_logs * num_rows, in_row, other=0.0)
            if RULES.measured:
                number = tl.load(place + SLOTS.measure * num_rows, in_row, other=1.0)
        counts, tops, logs = counts + (counted,), tops + (top,), logs + (log,)
        tempered_tops, tempered_logs = tempered_tops + (tempered_top,), tempered_logs + (tempered_log,)
        measured = measured + (number,)
    return counts, (tops, logs, tempered_tops, tempered_logs), measured


@triton.jit(debug=True, do_not_specialize=["num_rows"])
def backward_kernel(
    logits, sizes, strides, makers, labels, grads, kept, ranking_weight, d_logits, d_strides, maker_out,
    num_rows, num_classes, positions,
    M: tl.constexpr, DIMS: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr,
    RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """RB rows per program."""
    program = tl.program_id(0)
    backward_rows(
        program.to(tl.int64) * RB + tl.arange(0, RB), program, tl.num_programs(0),
        logits, sizes, strides, makers, labels, grads, kept, ranking_weight, d_logits, d_strides, maker_out,
        num_rows, num_classes, positions, M, DIMS, KB, TILES, RULES, SLOTS, ACC,
    )  # fmt: skip


@triton.jit
def backward_rows(
    row, program, programs, logits, sizes, strides, makers, labels, grads, kept, ranking_weight,
    d_logits, d_strides, maker_out, num_rows, num_classes, positions,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr,
    RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows ``[RB]``. ``grads.fused``, if there, has its strides after the M heads'."""
    num_rows = widen(num_rows)
    in_row = row < num_rows
    zero = tl.where(in_row, 0.0, 0.0).to(ACC)
    offsets, raws, uncertainties = (), (), ()
    for m in tl.static_range(M):
        offsets = offsets + (row_offset(row, sizes, strides[m], DIMS),)
    counts, lses, measured = _log_sum_exps(
        kept, logits, offsets, strides, makers, row, in_row, num_rows, num_classes,
        M, DIMS, KB, TILES, RULES, SLOTS, ACC,
    )  # fmt: skip
    for m in tl.static_range(M):
        u = value(measured[m], lses[3][m], RULES)
        raw, _, u = raw_weight(m, lses[2][m] + lses[3][m], u, makers, row, in_row, num_rows, RULES, ACC)
        raws, uncertainties = raws + (raw,), uncertainties + (tl.where(counts[m], u, 0.0),)
    weights, weight_total = clamp_weights(raws, counts, M, RULES)
    grad_offset, grad_stride = row, 0
    if grads.fused is not None:
        grad_offset, grad_stride = row_offset(row, sizes, strides[M], DIMS), strides[M][DIMS]

    # What flows into the weights from outside, and from the ranking.
    incoming = ()
    UNIT: tl.constexpr = 1.0 if RULES.unit else 0.0
    for m in tl.static_range(M):
        grad = zero
        if grads.weights is not None:
            grad += tl.load(grads.weights + m * num_rows + row, in_row, other=0.0)
        if kept.ranking_grad is not None:
            scale = _scalar(grads.loss, UNIT, ACC) * number(ranking_weight, ACC) + _scalar(grads.ranking, 0.0, ACC)
            place = m * (num_rows // positions) + row // positions
            grad += scale * tl.load(kept.ranking_grad + place, in_row, other=0.0)
        incoming = incoming + (grad,)
    if grads.fused is not None and not RULES.detach:
        incoming = _add_products(
            incoming, logits, offsets, strides, weights, counts, grads.fused, grad_offset, grad_stride, in_row,
            num_classes, M, DIMS, KB, TILES, ACC,
        )  # fmt: skip

    products, ruleds, label, coefficients = zeros(zero, M), zeros(zero, M), zeros(zero, M), ()
    fused_lse, ruled, y = (zero, zero), in_row == 0, row * 0 - 1
    if RULES.losses:
        y, valid = read_labels(labels, row, in_row, num_classes)
        label, ruled = label_logits(logits, offsets, strides, y, counts, valid, M, DIMS, ACC)
        fused_top = tl.load(kept.stats + SLOTS.fused_top * num_rows + row, in_row, other=0.0)
        fused_log = tl.load(kept.stats + SLOTS.fused_logs * num_rows + row, in_row, other=float("nan"))
        fused_lse = (fused_top, fused_log)
        mass = zero
        products, ruleds = (), ()
        if RULES.smoothing:
            mass = tl.load(kept.stats + SLOTS.mass * num_rows + row, in_row, other=0.0)
        for m in tl.static_range(M):
            place = kept.stats + m * num_rows + row
            products = products + (tl.load(place + SLOTS.product * num_rows, in_row, other=0.0),)
            if RULES.smoothing:
                ruleds = ruleds + (tl.load(place + SLOTS.ruled * num_rows, in_row, other=0.0),)
        for m in tl.static_range(M + 1):
            scale = _scalar(grads.loss, UNIT, ACC)
            if m < M:
                wanted = counts[m] & valid
                if grads.unimodal_losses is not None:
                    scale += tl.load(grads.unimodal_losses + m)
            else:
                wanted = (fused_log == fused_log) & valid
                scale += _scalar(grads.fused_loss, 0.0, ACC)
            inverse = tl.load(kept.inverse + m)
            coefficients = coefficients + (
                loss_coefficients(y, wanted, scale, inverse, mass, labels, num_classes, RULES, ACC),
            )
        y = tl.where(valid, y, -1)
        weight_grads = weight_gradients(
            incoming, products, ruleds, label, ruled, coefficients[M], mass, raws, weights, counts, weight_total,
            M, RULES,
        )  # fmt: skip
    else:
        weight_grads = weight_gradients(
            incoming, products, ruleds, label, ruled, (zero, zero, zero), zero, raws, weights, counts, weight_total,
            M, RULES,
        )  # fmt: skip

    energy_grads, measure_grads = (), ()
    for m in tl.static_range(M):
        grad, measure_grad = zero, zero
        if RULES.uncertainty == "energy":
            grad = weight_grads[m] * coefficient(makers.alpha, m, ACC)
        if RULES.measured:
            measure_grad = weight_grads[m] * coefficient(makers.alpha, m, ACC)
        if grads.energy is not None:
            outside = tl.load(grads.energy + m * num_rows + row, in_row, other=0.0)
            grad += tl.where(counts[m], outside, 0.0)
        energy_grads, measure_grads = energy_grads + (grad,), measure_grads + (measure_grad,)
        if maker_out.weights is not None:
            tl.store(maker_out.weights + m * num_rows + row, weight_grads[m], in_row)

    sums = (zeros(zero, M), zeros(zero, M))
    for tile in range(TILES):
        sums = _write_tile(
            sums, tile * KB + tl.arange(0, KB), logits, row, offsets, sizes, strides, y, fused_lse, coefficients, lses,
            measured, weights, energy_grads, measure_grads, counts, labels, makers, grads.fused, grad_offset,
            grad_stride, d_logits, d_strides,
            in_row, num_classes, maker_out, M, DIMS, RULES, ACC,
        )  # fmt: skip

    if maker_out.sums is not None:
        for m in tl.static_range(M):
            grad = weight_grads[m]
            tl.store(maker_out.sums + m * programs + program, tl.sum(grad * uncertainties[m], 0))
            tl.store(maker_out.sums + (M + m) * programs + program, tl.sum(grad, 0))
            if RULES.tempered:
                # With E = -T lse(x / T) and p = softmax(x / T), dE/dT = <p, log p>.
                change = energy_grads[m] * sums[0][m]
                if RULES.measured:
                    # With u a function of x / T, du/dT = -<du/dx, x> / T.
                    change -= measure_grads[m] * sums[1][m] / coefficient(makers.temperature, m, ACC)
                tl.store(maker_out.sums + (2 * M + m) * programs + program, tl.sum(change, 0))


@triton.jit
def _write_tile(
    sums, column, logits, row, offsets, sizes, strides, y, fused_lse, coefficients, lses,
    measured, weights, energy_grads, measure_grads, counts, labels, makers, grad_fused, grad_offset, grad_stride,
    d_logits, d_strides,
    in_row, num_classes, maker_out, M: tl.constexpr, DIMS: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile's gradients; returns ``sums`` with its parts of <p, log p>, p = softmax(x / T), and of the product of
    the uncertainty's slope with x added where T has a gradient.
    """
    in_tile = in_row[:, None] & (column < num_classes)[None, :]
    tiles = ()
    for m in tl.static_range(M):
        tiles = tiles + (read_tile(logits[m], offsets[m], strides[m], column, in_tile, DIMS, ACC),)
    outside = None
    if grad_fused is not None:
        place = grad_offset[:, None] + column.to(tl.int64)[None, :] * grad_stride
        outside = tl.load(grad_fused + place, in_tile, other=0.0).to(ACC)
    out = tile_gradients(
        tiles, column, y, fused_lse, coefficients, lses, measured, weights, energy_grads, measure_grads, counts,
        labels, makers, outside, in_tile, num_classes, M, RULES, ACC,
    )  # fmt: skip
    means, moments = (), ()
    for m in tl.static_range(M):
        place = row_offset(row, sizes, d_strides[m], DIMS)[:, None]
        place += column.to(tl.int64)[None, :] * d_strides[m][DIMS]
        tl.store(d_logits[m] + place, narrow(out[m], d_logits[m]), in_tile)
        mean, product = sums[0][m], sums[1][m]
        if RULES.tempered and maker_out.sums is not None:
            scaled = tiles[m] / coefficient(makers.temperature, m, ACC)
            log_probs = (scaled - lses[2][m][:, None]) - lses[3][m][:, None]
            probs = tl.exp(log_probs)
            mean += tl.sum(tl.where(counts[m][:, None] & (probs > 0), probs * log_probs, 0.0), 1)
            if RULES.measured:
                slopes = slope(m, tiles[m], lses, measured[m], counts[m], makers, num_classes, RULES, ACC)
                product += moment(slopes, tiles[m], lses[0][m], RULES)
        means, moments = means + (mean,), moments + (product,)
    return means, moments


@triton.jit
def _add_products(
    incoming, logits, offsets, strides, weights, counts, grad_fused, grad_offset, grad_stride, in_row, num_classes,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add <grad f, x[m]> over the classes that are not ruled out: one more pass over the row, for such a gradient."""
    for tile in range(TILES):
        column = tile * KB + tl.arange(0, KB)
        in_tile = in_row[:, None] & (column < num_classes)[None, :]
        tiles = ()
        for m in tl.static_range(M):
            tiles = tiles + (read_tile(logits[m], offsets[m], strides[m], column, in_tile, DIMS, ACC),)
        f, finite = fuse_tile(tiles, weights, counts, in_tile, M)
        place = grad_offset[:, None] + column.to(tl.int64)[None, :] * grad_stride
        grad = tl.load(grad_fused + place, in_tile & (f > -float("inf")), other=0.0).to(ACC)
        updated = ()
        for m in tl.static_range(M):
            updated = updated + (incoming[m] + tl.sum(grad * finite[m], 1),)
        incoming = updated
    return incoming
