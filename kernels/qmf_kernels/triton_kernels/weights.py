"""From log-sum-exps to weights and fused logits in a kernel (Eq. 13, 9, 11), and back."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import row_offset, split_log_sum_exps, sum_exponentials, temperature, widen


class Rows(NamedTuple):
    """A program's rows: ``[ROWS]`` each, or a tuple of M such."""

    row: Any  # int64
    inside: Any  # there is such a row
    num_rows: Any  # int64
    num_classes: Any
    offsets: Any  # where each head's stands
    counted: Any
    tops: Any  # the log-sum-exp in two parts, the largest logit and the rest; 0 and 0 where a row does not count
    logs: Any
    tempered_tops: Any  # the same of x / T, or of x again where T is 1
    tempered_logs: Any
    energies: Any
    uncertainties: Any
    raws: Any  # weights before they are clamped
    total: Any  # their sum after it
    weights: Any


@triton.jit
def energy(lse, m, rule, CONFIG: tl.constexpr):
    """Eq. 13: ``E = -T * logsumexp(x / T)``, from that log-sum-exp."""
    if rule.temperature is None:
        return -lse
    else:
        return -lse * temperature(m, rule, CONFIG)


@triton.jit
def affine_weight(u, m, rule, CONFIG: tl.constexpr):
    """Eq. 9: ``w = alpha * u + beta``, before it is clamped."""
    alpha, beta = tl.load(rule.alpha + m), tl.load(rule.beta + m)
    return alpha.to(CONFIG.ACC) * u + beta.to(CONFIG.ACC)


@triton.jit
def read_uncertainty(e, m, row, inside, num_rows, rule, CONFIG: tl.constexpr):
    """Eq. 9's u: the energy ``e``, or the one that is ready."""
    if rule.uncertainty is None:
        return e
    else:
        return tl.load(rule.uncertainty + m * num_rows + row, inside, other=0.0).to(CONFIG.ACC)


@triton.jit
def divide(x, y):
    """Correctly rounded, so that x / x is 1: without asking, a GPU's float32 quotient is not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def clamp_weights(raws, counted, CONFIG: tl.constexpr):
    """Weights, 0 where a row does not count; and the sum that they were divided by, 0 where there is none."""
    M: tl.constexpr = CONFIG.M
    weights = ()
    total, share = tl.zeros_like(raws[0]), tl.zeros_like(raws[0])
    for m in tl.static_range(M):
        w = raws[m]
        if CONFIG.nonnegative:
            w = tl.where(w < 0, 0.0, w)
        w = tl.where(counted[m], w, 0.0)
        weights = weights + (w,)
        total += w
        share += tl.where(counted[m], 1.0, 0.0)
    if CONFIG.normalize:
        # Where every weight is 0, the modalities that count share equally.
        some = total > 0
        whole = tl.where(some, total, tl.where(share > 0, share, 1.0))
        normalized = ()
        for m in tl.static_range(M):
            part = tl.where(some, weights[m], tl.where(counted[m], 1.0, 0.0))
            normalized = normalized + (divide(part, whole),)
        weights = normalized
    return weights, total


@triton.jit
def weigh_rows(row, inputs, rule, memory, num_rows, num_classes, AGAIN: tl.constexpr, CONFIG: tl.constexpr):
    """Eq. 13 and 9 of rows, and their tiles where each is but one: in the forward a first pass over the logits;
    ``AGAIN``, in the backward, from the stats.

    Fusion alone has no stats, and passes over the logits again: its energies, rounded to one number each, would not do
    where logits are large.
    """
    M: tl.constexpr = CONFIG.M
    num_rows = widen(num_rows)
    inside = row < num_rows
    tiles, offsets, counted, energies, uncertainties, raws = (), (), (), (), (), ()
    tops, logs, tempered_tops, tempered_logs = (), (), (), ()
    for m in tl.static_range(M):
        offset = row_offset(row, inputs.sizes, inputs.strides[m], CONFIG)
        if AGAIN and CONFIG.losses:
            lse = _read_log_sum_exps(m, row, inside, rule, memory, num_rows, CONFIG)
            counts = lse[1] == lse[1]
        else:
            found, x = sum_exponentials(m, offset, inside, inputs, rule, num_classes, CONFIG)
            if AGAIN:
                counts = tl.load(memory.energy + m * num_rows + row, inside, other=float("inf")) < float("inf")
            else:
                counts = inside & (found[1] > 0) & (found[1] < float("inf"))
                if inputs.present is not None:
                    place = row_offset(row, inputs.sizes, inputs.present_strides[1], CONFIG)
                    place += m * widen(inputs.present_strides[0])
                    counts = counts & (tl.load(inputs.present + place, inside, other=0) != 0)
            lse = split_log_sum_exps(found, counts, rule)
            if CONFIG.tile.tiles == 1:
                tiles = tiles + (x,)
        e = energy(lse[2] + lse[3], m, rule, CONFIG)
        u = read_uncertainty(e, m, row, inside, num_rows, rule, CONFIG)
        offsets, counted, energies = offsets + (offset,), counted + (counts,), energies + (e,)
        uncertainties = uncertainties + (tl.where(counts, u, 0.0),)
        raws = raws + (affine_weight(u, m, rule, CONFIG),)
        tops, logs = tops + (lse[0],), logs + (lse[1],)
        tempered_tops, tempered_logs = tempered_tops + (lse[2],), tempered_logs + (lse[3],)
    weights, total = clamp_weights(raws, counted, CONFIG)
    rows = Rows(
        row=row,
        inside=inside,
        num_rows=num_rows,
        num_classes=num_classes,
        offsets=offsets,
        counted=counted,
        tops=tops,
        logs=logs,
        tempered_tops=tempered_tops,
        tempered_logs=tempered_logs,
        energies=energies,
        uncertainties=uncertainties,
        raws=raws,
        total=total,
        weights=weights,
    )
    return rows, tiles


@triton.jit
def _read_log_sum_exps(m, row, inside, rule, memory, num_rows, CONFIG: tl.constexpr):
    top = tl.load(stat(memory, CONFIG.slots.top, m, row, num_rows), inside, other=0.0)
    log = tl.load(stat(memory, CONFIG.slots.log, m, row, num_rows), inside, other=float("nan"))
    tempered_top, tempered_log = top, log
    if rule.temperature is not None:
        tempered_top = tl.load(stat(memory, CONFIG.slots.tempered_top, m, row, num_rows), inside, other=0.0)
        tempered_log = tl.load(stat(memory, CONFIG.slots.tempered_log, m, row, num_rows), inside, other=0.0)
    return top, log, tempered_top, tempered_log


@triton.jit
def stat(memory, slot, m, row, num_rows):
    """Where a statistic of modality m, or of the fused row (M), stands."""
    return memory.stats + (slot + m) * num_rows + row


@triton.jit
def clamp_backward(grads, rows, CONFIG: tl.constexpr):
    """From the gradients of the weights to those of the weights before clamping and normalising."""
    M: tl.constexpr = CONFIG.M
    out = ()
    inner = tl.zeros_like(rows.total)
    for m in tl.static_range(M):
        inner += tl.where(rows.counted[m], grads[m] * rows.weights[m], 0.0)
    for m in tl.static_range(M):
        grad = tl.where(rows.counted[m], grads[m], 0.0)
        if CONFIG.normalize:
            some = rows.total > 0
            grad = tl.where(some, (grad - inner) / tl.where(some, rows.total, 1.0), 0.0)
        if CONFIG.nonnegative:
            grad = tl.where(rows.raws[m] > 0, grad, 0.0)
        out = out + (tl.where(rows.counted[m], grad, 0.0),)
    return out


@triton.jit
def fuse_tile(tiles, rows, in_tile, CONFIG: tl.constexpr):
    """Eq. 11: a tile of ``f = sum_m w[m] * x[m]``, -inf where a class is ruled out or none; and the logits, 0 for -inf
    and in rows that do not count.
    """
    M: tl.constexpr = CONFIG.M
    fused = tl.zeros_like(tiles[0])
    ruled = in_tile == 0
    finite = ()
    for m in tl.static_range(M):
        counts = rows.counted[m][:, None]
        out = (tiles[m] == -float("inf")) & counts
        x = tl.where(out | (counts == 0), 0.0, tiles[m])
        fused += rows.weights[m][:, None] * x
        ruled = ruled | out
        finite = finite + (x,)
    return tl.where(ruled, -float("inf"), fused), finite
