"""The ranking hinge (Eq. 15 to 17) in a kernel: ``sum over pairs with o_i > o_j of relu(s_i - s_j)``.

For each sample of a block its partners are read from memory, so that its gradient is a sum that one program makes in
one order. A NaN in kappa or in the sample's loss, or a weight that is not finite, takes a sample out of every pair.
"""

import triton
import triton.language as tl

from .rows import widen


@triton.jit(do_not_specialize=["batch"])
def ranking_kernel(
    weights, kappas, grad_out, partial, batch,
    M: tl.constexpr, SB: tl.constexpr, JB: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The ranking alone: SB samples per program, whose share of the loss goes into ``partial`` ``[programs]``."""
    batch = widen(batch)
    sample = widen(tl.program_id(0)) * SB + tl.arange(0, SB)
    inside = sample < batch
    pairs = count_pairs(batch, RULES)
    hinges = tl.zeros((), tl.float64)
    for m in range(M):
        if RULES.pairs == "adjacent":
            total, grad = rank_adjacent(weights, kappas, None, m, sample, inside, batch, RULES, ACC)
        else:
            total, grad = rank_all(weights, kappas, None, m, sample, inside, batch, JB, RULES, ACC)
        hinges += total
        tl.store(grad_out + m * batch + sample, grad / pairs.to(ACC), inside)
    tl.store(partial + tl.program_id(0), hinges / pairs)


@triton.jit
def count_pairs(batch, RULES: tl.constexpr):
    """The pairs that the mean is over, float64."""
    pairs = tl.full((), batch, tl.float64)
    if RULES.pairs == "all":
        pairs = tl.maximum(pairs * (pairs - 1) * 0.5, 1.0)
    return pairs


@triton.jit
def order_and_score(weight, kappa, RULES: tl.constexpr):
    """What orders a pair and what is compared, NaN where a sample takes part in none."""
    score = weight - kappa if RULES.form == "released" else weight + kappa
    finite = tl.abs(score) < float("inf")
    score = tl.where(finite, score, float("nan"))
    order = tl.where(finite, weight if RULES.form == "paper" else kappa, float("nan"))
    return order, score


@triton.jit
def hinge(order, score, other_order, other_score):
    """The hinge of pairs, and its slope in the first one's score."""
    # Comparisons with NaN fail.
    sign = tl.where(order > other_order, 1.0, tl.where(order < other_order, -1.0, 0.0)).to(score.dtype)
    gap = sign * (score - other_score)
    positive = (gap > 0) & (sign != 0)
    return tl.where(positive, gap, 0.0), tl.where(positive, sign, 0.0)


@triton.jit
def rank_adjacent(weights, kappas, losses, m, sample, inside, batch, RULES: tl.constexpr, ACC: tl.constexpr):
    """The pairs (i, i + 1) around the batch: their hinges' sum over the block, and the gradient ``[SB]``."""
    order, score = _read(weights, kappas, losses, m, sample, inside, batch, RULES, ACC)
    after = tl.where(sample + 1 == batch, 0, sample + 1)
    before = tl.where(sample == 0, batch - 1, sample - 1)
    other_order, other_score = _read(weights, kappas, losses, m, after, inside, batch, RULES, ACC)
    loss, grad = hinge(order, score, other_order, other_score)
    other_order, other_score = _read(weights, kappas, losses, m, before, inside, batch, RULES, ACC)
    _, slope = hinge(order, score, other_order, other_score)
    return tl.sum(tl.where(inside, loss, 0.0).to(tl.float64), 0), grad + slope


@triton.jit
def rank_all(
    weights, kappas, losses, m, sample, inside, batch, JB: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr
):
    """Every unordered pair with a sample of the block: half their hinges' sum, and the gradient ``[SB]``."""
    order, score = _read(weights, kappas, losses, m, sample, inside, batch, RULES, ACC)
    total = tl.zeros((), tl.float64)
    grad = tl.zeros_like(score)
    start = tl.zeros((), tl.int64)
    while start < batch:
        other = start + tl.arange(0, JB)
        other_order, other_score = _read(weights, kappas, losses, m, other, other < batch, batch, RULES, ACC)
        loss, slope = hinge(order[:, None], score[:, None], other_order[None, :], other_score[None, :])
        loss = tl.sum(tl.where(inside[:, None], loss, 0.0), 1)
        total += tl.sum(loss.to(tl.float64), 0)
        grad += tl.sum(slope, 1)
        start += JB
    return total * 0.5, grad


@triton.jit
def _read(weights, kappas, losses, m, sample, inside, batch, RULES: tl.constexpr, ACC: tl.constexpr):
    place = m * batch + sample
    weight = tl.load(weights + place, inside, other=float("nan")).to(ACC)
    kappa = tl.load(kappas + place, inside, other=float("nan")).to(ACC)
    if losses is not None:
        loss = tl.load(losses + place, inside, other=float("nan"))
        kappa = tl.where(loss == loss, kappa, float("nan"))
    return order_and_score(weight, kappa, RULES)
