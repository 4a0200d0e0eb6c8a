"""The backward: one read of the logits, one write of their gradients; all else is recomputed from the stats.

Mixtures and LogitNorm need sums over the row of what is to be written; rows that are walked are read twice for them.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .combination import combine_label, combine_tile, free_weights, row_shares
from .gradients import OfRows, loss_coefficients, reduce_tile, tile_gradients, vote_sums, weight_gradients
from .measures import moment, slope, value
from .passes import keep_factors, label_logits, read_labels, read_tiles, scan, second_pass, summarize, zeros
from .rows import clamp_weights, coefficient, narrow, number, raw_weight, row_offset, widen


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
    """Which rows count, and their log-sum-exps in two parts; of x / T too where that is not x; the measures of the
    uncertainty, and LogitNorm's factors. Fusion alone reads the rows for them: its energies, rounded to one number
    each, would not do where logits are large.
    """
    counts, tops, logs, tempered_tops, tempered_logs, measured, factors = (), (), (), (), (), (), ()
    for m in tl.static_range(M):
        factor = (tl.zeros((row.shape[0],), ACC), tl.zeros((row.shape[0],), ACC))
        if kept.stats is None:
            energy = tl.load(kept.energy + m * num_rows + row, in_row, other=float("inf"))
            counted = energy < float("inf")
            found, _, factor = scan(
                logits[m], offsets[m], strides[m], m, makers, in_row, num_classes, DIMS, KB, TILES, RULES, ACC
            )
            top, log, tempered_top, tempered_log, number = summarize(found, counted, num_classes, RULES, ACC)
            factor = keep_factors(factor, counted, RULES)
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
            if RULES.normed:
                place = kept.stats + (SLOTS.factors + 2 * m) * num_rows + row
                factor = (tl.load(place, in_row, other=1.0), tl.load(place + num_rows, in_row, other=1.0))
        counts, tops, logs = counts + (counted,), tops + (top,), logs + (log,)
        tempered_tops, tempered_logs = tempered_tops + (tempered_top,), tempered_logs + (tempered_log,)
        measured, factors = measured + (number,), factors + (factor,)
    return counts, (tops, logs, tempered_tops, tempered_logs), measured, factors


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
    counts, lses, measured, factors = _log_sum_exps(
        kept, logits, offsets, strides, makers, row, in_row, num_rows, num_classes,
        M, DIMS, KB, TILES, RULES, SLOTS, ACC,
    )  # fmt: skip
    for m in tl.static_range(M):
        u = value(measured[m], lses[3][m], RULES)
        raw, _, u = raw_weight(m, lses[2][m] + lses[3][m], u, makers, row, in_row, num_rows, RULES, ACC)
        raws, uncertainties = raws + (raw,), uncertainties + (tl.where(counts[m], u, 0.0),)
    weights, weight_total = clamp_weights(raws, counts, M, RULES)
    shares = row_shares(weights, counts, M, RULES)
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
    sums, grad_sum = zeros(zero, M), zero
    if grads.fused is not None:
        sums, grad_sum = _fused_sums(
            sums, grad_sum, logits, offsets, strides, factors, lses, shares, counts, makers, grads.fused, grad_offset,
            grad_stride, in_row, num_classes, M, DIMS, KB, TILES, RULES, ACC,
        )  # fmt: skip

    means, coefficients = zeros(zero, M), ()
    fused_lse, y = (zero, zero), row * 0 - 1
    if RULES.losses:
        y, valid = read_labels(labels, row, in_row, num_classes)
        fused_top = tl.load(kept.stats + SLOTS.fused_top * num_rows + row, in_row, other=0.0)
        fused_log = tl.load(kept.stats + SLOTS.fused_logs * num_rows + row, in_row, other=float("nan"))
        fused_lse = (fused_top, fused_log)
        mass = zero
        means, ruleds = (), zeros(zero, M)
        if RULES.smoothing:
            mass = tl.load(kept.stats + SLOTS.mass * num_rows + row, in_row, other=0.0)
            ruleds = ()
        for m in tl.static_range(M):
            place = kept.stats + m * num_rows + row
            means = means + (tl.load(place + SLOTS.product * num_rows, in_row, other=0.0),)
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
        if not RULES.mixed:
            label, ruled = label_logits(logits, offsets, strides, factors, y, counts, valid, M, DIMS, RULES, ACC)
            _, votes = combine_label(label, lses, shares, counts, valid, makers, num_classes, M, RULES, ACC)
            sums = vote_sums(sums, means, ruleds, votes, ruled, coefficients[M], mass, M, RULES)
        y = tl.where(valid, y, -1)
    elif RULES.mixed:
        top, total, means = _fused_row(
            logits, offsets, strides, factors, lses, shares, counts, makers, in_row, num_classes,
            M, DIMS, KB, TILES, RULES, ACC,
        )  # fmt: skip
        fused_lse = (top, tl.log(total))
    weight_grads = weight_gradients(incoming, sums, raws, weights, shares, counts, weight_total, M, RULES)
    weight_pulls = incoming
    if RULES.mixed:
        weight_pulls = free_weights(incoming, counts, makers, M, ACC)

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

    of_rows = OfRows(
        y, fused_lse, coefficients, lses, measured, shares, counts, factors, energy_grads, measure_grads, sums,
        means, weight_pulls, grad_sum,
    )  # fmt: skip
    reduced = (zeros(zero, M), zeros(zero, M), zeros(zero, M))
    changes = (zeros(zero, M), zeros(zero, M))
    if TILES == 1:
        column = tl.arange(0, KB)
        in_tile = in_row[:, None] & (column < num_classes)[None, :]
        tiles = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
        if RULES.mixed or RULES.normed:
            reduced = _reduce_tile(
                reduced, tiles, column, of_rows, labels, makers, grads.fused, grad_offset, grad_stride,
                in_tile, num_classes, M, RULES, ACC,
            )  # fmt: skip
        changes = _write_tile(
            changes, tiles, column, of_rows, reduced, row, sizes, labels, makers, grads.fused, grad_offset,
            grad_stride, d_logits, d_strides, in_tile, num_classes, maker_out, M, DIMS, RULES, ACC,
        )  # fmt: skip
    else:
        if RULES.mixed or RULES.normed:
            for tile in range(TILES):
                column = tile * KB + tl.arange(0, KB)
                in_tile = in_row[:, None] & (column < num_classes)[None, :]
                tiles = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
                reduced = _reduce_tile(
                    reduced, tiles, column, of_rows, labels, makers, grads.fused, grad_offset, grad_stride,
                    in_tile, num_classes, M, RULES, ACC,
                )  # fmt: skip
        for tile in range(TILES):
            column = tile * KB + tl.arange(0, KB)
            in_tile = in_row[:, None] & (column < num_classes)[None, :]
            tiles = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
            changes = _write_tile(
                changes, tiles, column, of_rows, reduced, row, sizes, labels, makers, grads.fused, grad_offset,
                grad_stride, d_logits, d_strides, in_tile, num_classes, maker_out, M, DIMS, RULES, ACC,
            )  # fmt: skip

    if maker_out.sums is not None:
        for m in tl.static_range(M):
            grad = weight_grads[m]
            tl.store(maker_out.sums + m * programs + program, tl.sum(grad * uncertainties[m], 0))
            tl.store(maker_out.sums + (M + m) * programs + program, tl.sum(grad, 0))
            if RULES.tempered:
                # With E = -T lse(x / T) and p = softmax(x / T), dE/dT = <p, log p>.
                change = energy_grads[m] * changes[0][m]
                if RULES.measured:
                    # With u a function of x / T, du/dT = -<du/dx, x> / T.
                    change -= measure_grads[m] * changes[1][m] / coefficient(makers.temperature, m, ACC)
                tl.store(maker_out.sums + (2 * M + m) * programs + program, tl.sum(change, 0))


@triton.jit
def _read_fused(grad_fused, offset, stride, column, in_tile, ACC: tl.constexpr):
    """A tile of the fused logits' incoming gradient."""
    place = offset[:, None] + column.to(tl.int64)[None, :] * stride
    return tl.load(grad_fused + place, in_tile, other=0.0).to(ACC)


@triton.jit
def _reduce_tile(
    reduced, tiles, column, of_rows, labels, makers, grad_fused, grad_offset, grad_stride, in_tile, num_classes,
    M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    outside = None
    if grad_fused is not None:
        outside = _read_fused(grad_fused, grad_offset, grad_stride, column, in_tile, ACC)
    return reduce_tile(reduced, tiles, column, of_rows, labels, makers, outside, in_tile, num_classes, M, RULES, ACC)


@triton.jit
def _write_tile(
    changes, tiles, column, of_rows, reduced, row, sizes, labels, makers, grad_fused, grad_offset, grad_stride,
    d_logits, d_strides, in_tile, num_classes, maker_out,
    M: tl.constexpr, DIMS: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A tile's gradients; returns ``changes`` with its parts of <p, log p>, p = softmax(x / T), and of the product of
    the uncertainty's slope with x added where T has a gradient.
    """
    outside = None
    if grad_fused is not None:
        outside = _read_fused(grad_fused, grad_offset, grad_stride, column, in_tile, ACC)
    out = tile_gradients(tiles, column, of_rows, reduced, labels, makers, outside, in_tile, num_classes, M, RULES, ACC)
    lses, measured, counts = of_rows.lses, of_rows.measured, of_rows.counts
    means, moments = (), ()
    for m in tl.static_range(M):
        place = row_offset(row, sizes, d_strides[m], DIMS)[:, None]
        place += column.to(tl.int64)[None, :] * d_strides[m][DIMS]
        tl.store(d_logits[m] + place, narrow(out[m], d_logits[m]), in_tile)
        mean, product = changes[0][m], changes[1][m]
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
def _fused_sums(
    sums, grad_sum, logits, offsets, strides, factors, lses, shares, counts, makers, grad_fused, grad_offset,
    grad_stride, in_row, num_classes,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add <grad f, votes> over the classes that are not ruled out, or for a mixture the sum of grad f: one more pass
    over the row, for such a gradient.
    """
    if RULES.mixed:
        for tile in range(TILES):
            column = tile * KB + tl.arange(0, KB)
            in_tile = in_row[:, None] & (column < num_classes)[None, :]
            grad_sum += tl.sum(_read_fused(grad_fused, grad_offset, grad_stride, column, in_tile, ACC), 1)
    elif (not RULES.detach) or RULES.strict:
        for tile in range(TILES):
            column = tile * KB + tl.arange(0, KB)
            in_tile = in_row[:, None] & (column < num_classes)[None, :]
            tiles = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
            f, votes = combine_tile(tiles, lses, shares, counts, in_tile, makers, num_classes, M, RULES, ACC)
            grad = _read_fused(grad_fused, grad_offset, grad_stride, column, in_tile & (f > -float("inf")), ACC)
            updated = ()
            for m in tl.static_range(M):
                updated = updated + (sums[m] + tl.sum(grad * votes[m], 1),)
            sums = updated
    return sums, grad_sum


@triton.jit
def _fused_row(
    logits, offsets, strides, factors, lses, shares, counts, makers, in_row, num_classes,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """A mixture's largest value and sum of exponentials, and its means of the votes: one more pass, where no forward
    has left them.
    """
    column = tl.arange(0, KB)
    in_tile = in_row[:, None] & (column < num_classes)[None, :]
    tiles = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
    top, total, products, _ = second_pass(
        logits, offsets, strides, factors, tiles, lses, shares, counts, makers, None, None, offsets[0], 0,
        in_row, num_classes, M, DIMS, KB, TILES, RULES, ACC,
    )  # fmt: skip
    total = tl.where(total > 0, total, 1.0)
    means = ()
    for m in tl.static_range(M):
        means = means + (products[m] / total,)
    return top, total, means
