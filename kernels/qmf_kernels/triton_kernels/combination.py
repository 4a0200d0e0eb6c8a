"""A tile of the fused row in a kernel: the weighted sum of Eq. 11, or what stands for it, and the modalities' votes.

``qmf_kernels.combination`` has the formulas. The vote of a modality whose logits are weighed is its logits, in which
the fused row's slope is what its weight gets; every other rule's is a share from 0 to 1.
"""

import triton
import triton.language as tl

from .rows import coefficient, keep_finite, number, widen


@triton.jit
def odds(m, makers, ACC: tl.constexpr):
    """A modality's rho, and its static weight, NaN where it has none."""
    least: tl.constexpr = 1e-6
    rho = number(makers.odds, ACC)
    fixed = tl.full((), float("nan"), ACC)
    if makers.static is not None:
        fixed = coefficient(makers.static, m, ACC)
        held = 1.0 / tl.minimum(tl.maximum(fixed, least), 1.0) - 1.0
        rho = tl.maximum(tl.where(fixed == fixed, held, rho), least)
    return rho, fixed


@triton.jit
def row_shares(weights, counts, M: tl.constexpr, RULES: tl.constexpr):
    """What a row's tiles are combined by: its weights, or the logarithms of its shares."""
    if RULES.combine == "probabilities":
        top = tl.where(counts[0], 0.0, 0.0).to(weights[0].dtype) - float("inf")
        logs = ()
        for m in tl.static_range(M):
            log = tl.where(counts[m], tl.log(tl.maximum(weights[m], 1e-12)), -float("inf"))
            top = tl.maximum(top, log)
            logs = logs + (log,)
        top = tl.where(top == -float("inf"), 0.0, top)
        total = tl.zeros_like(top)
        for m in tl.static_range(M):
            total += tl.exp(logs[m] - top)
        whole = top + tl.log(tl.where(total > 0, total, 1.0))
        shares = ()
        for m in tl.static_range(M):
            shares = shares + (logs[m] - whole,)
        return shares
    else:
        return weights


@triton.jit
def combine_tile(
    tiles, lses, shares, counts, in_tile, makers, num_classes, M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr
):
    """The fused tile, -inf where a class is ruled out or none; and the votes, 0 there."""
    if RULES.combine == "logits":
        return _weigh(tiles, shares, counts, in_tile, M)
    elif RULES.combine == "probabilities":
        return _pool(tiles, lses, shares, counts, in_tile, M)
    else:
        return _mix(tiles, lses, counts, in_tile, makers, num_classes, M, RULES, ACC)


@triton.jit
def _weigh(tiles, weights, counts, in_tile, M: tl.constexpr):
    fused = tl.zeros_like(tiles[0])
    ruled = in_tile == 0
    finite = ()
    for m in tl.static_range(M):
        x, out = keep_finite(tiles[m], counts[m])
        fused += weights[m][:, None] * x
        ruled = ruled | out
        finite = finite + (x,)
    return tl.where(ruled, -float("inf"), fused), finite


@triton.jit
def _pool(tiles, lses, shares, counts, in_tile, M: tl.constexpr):
    top = tl.zeros_like(tiles[0]) - float("inf")
    terms = ()
    some = counts[0]
    for m in tl.static_range(M):
        some = some | counts[m]
        term = (tiles[m] - lses[0][m][:, None]) - lses[1][m][:, None] + shares[m][:, None]
        term = tl.where(counts[m][:, None] & in_tile, term, -float("inf"))
        top = tl.maximum(top, term)
        terms = terms + (term,)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = tl.zeros_like(base)
    exps = ()
    for m in tl.static_range(M):
        part = tl.exp(terms[m] - base)
        total += part
        exps = exps + (part,)
    whole = tl.where(total > 0, total, 1.0)
    votes = ()
    for m in tl.static_range(M):
        votes = votes + (exps[m] / whole,)
    fused = tl.where(total > 0, base + tl.log(whole), -float("inf"))
    return tl.where(in_tile & (some == 0)[:, None], 0.0, fused), votes


@triton.jit
def _mix(tiles, lses, counts, in_tile, makers, num_classes, M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr):
    least: tl.constexpr = -27.631021115928547  # log(1e-12)
    log_classes = tl.log(widen(num_classes).to(ACC))
    fused = tl.zeros_like(tiles[0])
    votes = ()
    for m in tl.static_range(M):
        rho, _ = odds(m, makers, ACC)
        counted = counts[m][:, None] & in_tile
        log_ratio = (tiles[m] - lses[0][m][:, None]) - lses[1][m][:, None] + log_classes
        if RULES.combine == "mixture":
            ratio = tl.exp(log_ratio)
            vote = ratio / (ratio + rho)
            term = tl.log(1.0 + ratio / rho)
        else:
            share = 1.0 / (1.0 + rho)
            vote = tl.where(log_ratio >= least, share, 0.0)
            term = tl.maximum(log_ratio, least) * share
        fused += tl.where(counted, term, 0.0)
        votes = votes + (tl.where(counted, vote, 0.0),)
    return tl.where(in_tile, fused, -float("inf")), votes


@triton.jit
def combine_label(
    label, lses, shares, counts, valid, makers, num_classes, M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr
):
    """The fused row's value at each row's class, and the votes there; ``label`` holds the modalities' logits of it."""
    if RULES.combine == "logits":
        fused = tl.zeros_like(label[0])
        for m in tl.static_range(M):
            fused += shares[m] * tl.where(label[m] == -float("inf"), 0.0, label[m])
        return fused, label
    else:
        columns = ()
        for m in tl.static_range(M):
            columns = columns + (label[m][:, None],)
        fused, votes = combine_tile(columns, lses, shares, counts, valid[:, None], makers, num_classes, M, RULES, ACC)
        out = ()
        for m in tl.static_range(M):
            out = out + (tl.sum(votes[m], 1),)
        return tl.sum(fused, 1), out


@triton.jit
def made_weights(weights, products, total, counts, makers, M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr):
    """The weights that a mixture makes of its votes; any other rule's as they are."""
    if RULES.mixed:
        out = ()
        number_there = tl.zeros_like(total)
        for m in tl.static_range(M):
            number_there += tl.where(counts[m], 1.0, 0.0)
        for m in tl.static_range(M):
            rho, fixed = odds(m, makers, ACC)
            weight = tl.zeros_like(products[m]) + 1.0 / (1.0 + rho)
            if RULES.combine == "mixture":
                # That of a modality alone, too, whose mean would have roundings for the ranking to put in an order.
                weight = tl.where(number_there > 1, products[m] / tl.where(total > 0, total, 1.0), weight)
            weight = tl.where(fixed == fixed, fixed, weight)
            out = out + (tl.where(counts[m], weight, 0.0),)
        return out
    else:
        return weights


@triton.jit
def free_weights(incoming, counts, makers, M: tl.constexpr, ACC: tl.constexpr):
    """The gradients that come to weights that a mixture makes: none to a static one."""
    out = ()
    for m in tl.static_range(M):
        _, fixed = odds(m, makers, ACC)
        out = out + (tl.where(counts[m], tl.where(fixed == fixed, 0.0, incoming[m]), 0.0),)
    return out


@triton.jit
def share_gradients(sums, weights, shares, counts, M: tl.constexpr, RULES: tl.constexpr):
    """From each modality's sum of votes times the fused row's gradient to its weight's gradient, before clamping."""
    if RULES.combine == "probabilities":
        whole = tl.zeros_like(sums[0])
        for m in tl.static_range(M):
            whole += sums[m]
        out = ()
        for m in tl.static_range(M):
            free = counts[m] & (weights[m] > 1e-12)
            grad = (sums[m] - tl.exp(shares[m]) * whole) / tl.where(free, weights[m], 1.0)
            out = out + (tl.where(free, grad, 0.0),)
        return out
    else:
        return sums
