"""The two passes of the forward over rows of logits, and the cross-entropies they leave (Eq. 13, 9, 11).

The first finds each modality's log-sum-exp, hence its weight; the second the fused row's, and the products of
softmax(f) with the votes (``combination``) that make the backward one pass. Rows of one tile (``TILES`` 1) stay in
registers between the two.
"""

import triton
import triton.language as tl

from .combination import combine_tile
from .lognorm import normalize, row_factors
from .measures import gather, measure, value
from .rows import accumulate, clamp_weights, coefficient, number, raw_weight, read_tile, row_offset, widen


@triton.jit
def first_pass(
    logits, sizes, strides, present, present_strides, makers, row, in_row, num_rows, num_classes,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Per modality: the tile if there is but one, where its rows stand, which count, log-sum-exps in two parts,
    measures of the uncertainty, energies, LogitNorm's factors; and the weights.
    """
    tiles, offsets, counts, tops, logs, measured, raws, energies, factors = (), (), (), (), (), (), (), (), ()
    tempered_tops, tempered_logs = (), ()
    for m in tl.static_range(M):
        offset = row_offset(row, sizes, strides[m], DIMS)
        found, x, factor = scan(
            logits[m], offset, strides[m], m, makers, in_row, num_classes, DIMS, KB, TILES, RULES, ACC
        )
        counted = in_row & (found[1] > 0) & (found[1] < float("inf"))
        if RULES.strict:
            counted = counted & (found[5] > -float("inf"))
        if present is not None:
            place = m * widen(present_strides[0]) + row_offset(row, sizes, present_strides[1], DIMS)
            counted = counted & (tl.load(present + place, in_row, other=0) != 0)
        top, log, tempered_top, tempered_log, number = summarize(found, counted, num_classes, RULES, ACC)
        lse = tempered_top + tempered_log
        u = value(number, tempered_log, RULES)
        raw, energy, _ = raw_weight(m, lse, u, makers, row, in_row, num_rows, RULES, ACC)
        if TILES == 1:
            tiles = tiles + (x,)
        offsets, counts, tops, logs = offsets + (offset,), counts + (counted,), tops + (top,), logs + (log,)
        tempered_tops, tempered_logs = tempered_tops + (tempered_top,), tempered_logs + (tempered_log,)
        measured, raws, energies = measured + (number,), raws + (raw,), energies + (energy,)
        factors = factors + (keep_factors(factor, counted, RULES),)
    weights, _ = clamp_weights(raws, counts, M, RULES)
    return tiles, offsets, counts, (tops, logs, tempered_tops, tempered_logs), measured, energies, factors, weights


@triton.jit
def scan(
    pointer, offset, strides, m, makers, in_row, num_classes,
    DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Largest value and sum of exponentials of x and, where T is not 1, of x / T, what the uncertainty gathers, and the
    smallest value; the last tile read; and LogitNorm's factors.
    """
    zero = tl.where(in_row, 0.0, 0.0).to(ACC)
    found = (zero - float("inf"), zero, zero - float("inf"), zero, zero, zero)
    factors = (zero, zero)
    if RULES.normed:
        factors = row_factors(pointer, offset, strides, makers, in_row, num_classes, DIMS, KB, TILES, ACC)
    inside = in_row[:, None] & (tl.arange(0, KB) < num_classes)[None, :]
    x = see_tile(pointer, offset, strides, tl.arange(0, KB), inside, factors, DIMS, RULES, ACC)
    found = _scan_tile(found, x, inside, m, makers, RULES, ACC)
    for tile in range(1, TILES):
        column = tile * KB + tl.arange(0, KB)
        inside = in_row[:, None] & (column < num_classes)[None, :]
        following = see_tile(pointer, offset, strides, column, inside, factors, DIMS, RULES, ACC)
        found = _scan_tile(found, following, inside, m, makers, RULES, ACC)
    return found, x, factors


@triton.jit
def see_tile(
    pointer, offset, strides, column, inside, factors, DIMS: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr
):
    """A tile as the rules see it."""
    x = read_tile(pointer, offset, strides, column, inside, DIMS, ACC)
    if RULES.normed:
        return normalize(x, factors)
    else:
        return x


@triton.jit
def keep_factors(factors, counted, RULES: tl.constexpr):
    """LogitNorm's factors, 1 where a row does not count."""
    if RULES.normed:
        return tl.where(counted, factors[0], 1.0), tl.where(counted, factors[1], 1.0)
    else:
        return factors


@triton.jit
def _scan_tile(found, x, inside, m, makers, RULES: tl.constexpr, ACC: tl.constexpr):
    old_top, old_total, tempered_top, tempered_total, gathered, least = found
    if RULES.strict:
        least = tl.minimum(least, tl.min(tl.where(inside, x, 0.0), 1))
    top, total = accumulate(old_top, old_total, x)
    if RULES.tempered:
        z = x / coefficient(makers.temperature, m, ACC)
        new, new_total = accumulate(tempered_top, tempered_total, z)
        gathered = gather(gathered, x, z, old_top, top, tempered_top, tempered_total, new, RULES)
        tempered_top, tempered_total = new, new_total
    else:
        gathered = gather(gathered, x, x, old_top, top, old_top, old_total, top, RULES)
    return top, total, tempered_top, tempered_total, gathered, least


@triton.jit
def summarize(found, counted, num_classes, RULES: tl.constexpr, ACC: tl.constexpr):
    """Log-sum-exps in two parts, of x and of x / T (of x again where T is 1), and the measure of the uncertainty."""
    top, total, tempered_top, tempered_total, gathered, _ = found
    if not RULES.tempered:
        tempered_top, tempered_total = top, total
    log = tl.log(tl.where(counted, total, 1.0))
    tempered_log = tl.log(tl.where(counted, tempered_total, 1.0))
    number = measure(gathered, tempered_total, tempered_log, counted, num_classes, RULES, ACC)
    return tl.where(counted, top, 0.0), log, tl.where(counted, tempered_top, 0.0), tempered_log, number


@triton.jit
def second_pass(
    logits, offsets, strides, factors, tiles, lses, shares, counts, makers, labels, fused, fused_offset, fused_stride,
    in_row, num_classes,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Writes the fused row where asked, and returns its largest value and sum of exponentials, the products, and with
    smoothing the sums over the classes, each times its weight: of the fused logits, of each modality's votes over the
    classes that are not ruled out, of each modality's logits, and of 1.
    """
    zero = tl.where(in_row, 0.0, 0.0).to(ACC)
    state = (zero - float("inf"), zero, zeros(zero, M), (zero, zeros(zero, M), zeros(zero, M), zero))
    if TILES == 1:
        column = tl.arange(0, KB)
        in_tile = in_row[:, None] & (column < num_classes)[None, :]
        f, votes = combine_tile(tiles, lses, shares, counts, in_tile, makers, num_classes, M, RULES, ACC)
        state = _second_tile(state, tiles, f, votes, column, counts, labels, in_tile, num_classes, M, RULES, ACC)
        if fused is not None:
            _write_fused(fused, fused_offset, fused_stride, f, state, counts, column, in_tile, M, RULES)
    else:
        for tile in range(TILES):
            column = tile * KB + tl.arange(0, KB)
            in_tile = in_row[:, None] & (column < num_classes)[None, :]
            read = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
            f, votes = combine_tile(read, lses, shares, counts, in_tile, makers, num_classes, M, RULES, ACC)
            state = _second_tile(state, read, f, votes, column, counts, labels, in_tile, num_classes, M, RULES, ACC)
            if fused is not None and not RULES.mixed:
                _write_fused(fused, fused_offset, fused_stride, f, state, counts, column, in_tile, M, RULES)
        if fused is not None and RULES.mixed:
            # Normalised by a sum that the whole row makes.
            for tile in range(TILES):
                column = tile * KB + tl.arange(0, KB)
                in_tile = in_row[:, None] & (column < num_classes)[None, :]
                read = read_tiles(logits, offsets, strides, factors, column, in_tile, M, DIMS, RULES, ACC)
                f, votes = combine_tile(read, lses, shares, counts, in_tile, makers, num_classes, M, RULES, ACC)
                _write_fused(fused, fused_offset, fused_stride, f, state, counts, column, in_tile, M, RULES)
    return state


@triton.jit
def _write_fused(fused, offset, stride, f, state, counts, column, in_tile, M: tl.constexpr, RULES: tl.constexpr):
    if RULES.mixed:
        some = counts[0]
        for m in tl.static_range(M):
            some = some | counts[m]
        f = (f - state[0][:, None]) - tl.log(tl.where(state[1] > 0, state[1], 1.0))[:, None]
        f = tl.where(some[:, None], f, 0.0)
    tl.store(fused + offset[:, None] + column.to(tl.int64)[None, :] * stride, f, in_tile)


@triton.jit
def zeros(zero, M: tl.constexpr):
    out = ()
    for _ in tl.static_range(M):
        out = out + (zero,)
    return out


@triton.jit
def read_tiles(
    logits, offsets, strides, factors, column, in_tile,
    M: tl.constexpr, DIMS: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    tiles = ()
    for m in tl.static_range(M):
        tiles = tiles + (see_tile(logits[m], offsets[m], strides[m], column, in_tile, factors[m], DIMS, RULES, ACC),)
    return tiles


@triton.jit
def _second_tile(
    state, tiles, f, votes, column, counts, labels, in_tile, num_classes,
    M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    top, total, products, smooth = state
    if RULES.losses or RULES.mixed:
        new = tl.maximum(top, tl.max(f, 1))
        base = tl.where(new == -float("inf"), 0.0, new)
        rescale = tl.exp(top - base)
        exps = tl.exp(f - base[:, None])
        top, total = new, total * rescale + tl.sum(exps, 1)
        updated = ()
        for m in tl.static_range(M):
            updated = updated + (products[m] * rescale + tl.sum(exps * votes[m], 1),)
        products = updated
        if RULES.smoothing:
            smooth = _smooth_tile(smooth, tiles, votes, f, column, counts, in_tile, labels, num_classes, M, RULES, ACC)
    return top, total, products, smooth


@triton.jit
def _smooth_tile(
    smooth, tiles, votes, f, column, counts, in_tile, labels, num_classes,
    M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    fused_sum, ruleds, sums, mass = smooth
    share = class_weights(labels, column, num_classes, RULES, ACC)[None, :]
    fused_sum += tl.sum(tl.where(in_tile, share * f, 0.0), 1)
    mass += tl.sum(tl.where(in_tile, share, 0.0), 1)
    next_ruleds, next_sums = (), ()
    for m in tl.static_range(M):
        next_ruleds = next_ruleds + (ruleds[m] + tl.sum(tl.where(f == -float("inf"), 0.0, share * votes[m]), 1),)
        counted = in_tile & counts[m][:, None]
        next_sums = next_sums + (sums[m] + tl.sum(tl.where(counted, share * tiles[m], 0.0), 1),)
    return fused_sum, next_ruleds, next_sums, mass


@triton.jit
def class_weights(labels, column, num_classes, RULES: tl.constexpr, ACC: tl.constexpr):
    """The classes' weights ``[KB]``, 0 past the last class."""
    inside = column < num_classes
    if RULES.weighted:
        return tl.load(labels.class_weight + column, inside, other=0.0).to(ACC)
    else:
        return tl.where(inside, 1.0, 0.0).to(ACC)


@triton.jit
def read_labels(labels, row, in_row, num_classes):
    """Each row's class, 0 where it has none, and whether it has one."""
    y = tl.load(labels.target + row, in_row, other=0)
    valid = in_row & (y != labels.ignore_index)
    within = (y >= 0) & (y < num_classes)
    tl.device_assert((valid == 0) | within, "target must hold classes 0 to K - 1 (or ignore_index)")
    valid = valid & within
    return tl.where(valid, y, 0), valid


@triton.jit
def label_logits(
    logits, offsets, strides, factors, y, counts, valid,
    M: tl.constexpr, DIMS: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Each modality's logit of the row's class, 0 where the row has none; and whether that class is ruled out."""
    out = ()
    ruled = valid & (valid == 0)
    for m in tl.static_range(M):
        place = logits[m] + offsets[m] + y.to(tl.int64) * strides[m][DIMS]
        x = tl.load(place, counts[m] & valid, other=0.0).to(ACC)
        if RULES.normed:
            x = (x * factors[m][0]) * factors[m][1]
        ruled = ruled | (x == -float("inf"))
        out = out + (x,)
    return out, ruled


@triton.jit
def cross_entropies(label, fused_label, ruled, lses, counts, valid, fused_top, fused_total, M: tl.constexpr):
    """Plain cross-entropies of the M modalities and of the fused row, NaN where a row has none; and the fused row's
    log-sum-exp in two parts, the second NaN where a sample has no modality, or none that leaves it a class.
    """
    out = ()
    some = valid & (valid == 0)
    for m in tl.static_range(M):
        nll = (lses[0][m] - label[m]) + lses[1][m]
        out = out + (tl.where(counts[m] & valid, nll, float("nan")),)
        some = some | counts[m]
    fused_counts = some & (fused_total > 0) & (fused_total < float("inf"))
    fused_top = tl.where(fused_counts, fused_top, 0.0)
    fused_log = tl.log(tl.where(fused_counts, fused_total, 1.0))
    nll = (fused_top - tl.where(ruled, -float("inf"), fused_label)) + fused_log
    out = out + (tl.where(fused_counts & valid, nll, float("nan")),)
    return out, fused_top, tl.where(fused_counts, fused_log, float("nan"))


@triton.jit
def share_in_mean(nll, lse, total, mass, y, labels, num_classes, RULES: tl.constexpr, ACC: tl.constexpr):
    """A row's share in its mean, numerator and denominator; ``nll`` is NaN where it has none."""
    wanted = nll == nll
    weight = tl.where(wanted, 1.0, 0.0).to(ACC)
    if RULES.weighted:
        weight = tl.load(labels.class_weight + y, wanted, other=0.0).to(ACC)
    hard = weight
    if RULES.smoothing:
        hard = weight * (1 - number(labels.smoothing, ACC))
    loss = tl.where(hard > 0, hard * nll, 0.0)
    if RULES.smoothing:
        loss += (mass * lse - total) * (number(labels.smoothing, ACC) / num_classes)
    return tl.where(wanted, loss, 0.0), weight
