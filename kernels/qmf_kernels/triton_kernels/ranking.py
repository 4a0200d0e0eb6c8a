"""The ranking hinge (Eq. 15 to 17) in a kernel: ``sum over pairs with o_i > o_j of relu(s_i - s_j)``.

For each sample of a block its partners are read from memory, so that its gradient is a sum that one program makes in
one order. A kappa or a weight that is not finite, or a NaN as the sample's loss, takes a sample out of every pair.
"""

import triton
import triton.language as tl


@triton.jit
def count_pairs(batch, CONFIG: tl.constexpr):
    """The pairs that the mean is over, float64."""
    pairs = tl.full((), batch, tl.float64)
    if CONFIG.pairs == "all":
        pairs = tl.maximum(pairs * (pairs - 1) * 0.5, 1.0)
    return pairs


@triton.jit
def rank_samples(memory, m, sample, batch, CONFIG: tl.constexpr):
    """A modality's hinges over the pairs of the samples ``[SAMPLES]``, each pair of the batch once over all programs:
    their sum, float64, and its gradient ``[SAMPLES]``.
    """
    if CONFIG.pairs == "adjacent":
        return _rank_adjacent(memory, m, sample, batch, CONFIG)
    else:
        return _rank_all(memory, m, sample, batch, CONFIG)


@triton.jit
def _rank_adjacent(memory, m, sample, batch, CONFIG: tl.constexpr):
    """The pairs (i, i + 1) around the batch."""
    inside = sample < batch
    order, score = _order_and_score(memory, m, sample, inside, batch, CONFIG)
    after = tl.where(sample + 1 == batch, 0, sample + 1)
    before = tl.where(sample == 0, batch - 1, sample - 1)
    other_order, other_score = _order_and_score(memory, m, after, inside, batch, CONFIG)
    loss, grad = _hinge(order, score, other_order, other_score)
    other_order, other_score = _order_and_score(memory, m, before, inside, batch, CONFIG)
    _, slope = _hinge(order, score, other_order, other_score)
    return tl.sum(tl.where(inside, loss, 0.0).to(tl.float64), 0), grad + slope


@triton.jit
def _rank_all(memory, m, sample, batch, CONFIG: tl.constexpr):
    """Every unordered pair; each is met from both of its samples, hence half the sum."""
    inside = sample < batch
    order, score = _order_and_score(memory, m, sample, inside, batch, CONFIG)
    total = tl.zeros((), tl.float64)
    grad = tl.zeros_like(score)
    start = tl.zeros((), tl.int64)
    while start < batch:
        other = start + tl.arange(0, CONFIG.block.partners)
        other_order, other_score = _order_and_score(memory, m, other, other < batch, batch, CONFIG)
        loss, slope = _hinge(order[:, None], score[:, None], other_order[None, :], other_score[None, :])
        loss = tl.sum(tl.where(inside[:, None], loss, 0.0), 1)
        total += tl.sum(loss.to(tl.float64), 0)
        grad += tl.sum(slope, 1)
        start += CONFIG.block.partners
    return total * 0.5, grad


@triton.jit
def _order_and_score(memory, m, sample, inside, batch, CONFIG: tl.constexpr):
    """What orders a pair and what is compared, NaN where a sample takes part in none."""
    place = m * batch + sample
    weight = tl.load(memory.weights + place, inside, other=float("nan")).to(CONFIG.ACC)
    kappa = tl.load(memory.past + place, inside, other=float("nan")).to(CONFIG.ACC)
    loss = tl.load(memory.losses + place, inside, other=float("nan"))
    kappa = tl.where(loss == loss, kappa, float("nan"))
    score = weight - kappa if CONFIG.form == "released" else weight + kappa
    finite = tl.abs(score) < float("inf")
    order = tl.where(finite, weight if CONFIG.form == "paper" else kappa, float("nan"))
    return order, tl.where(finite, score, float("nan"))


@triton.jit
def _hinge(order, score, other_order, other_score):
    """The hinge of pairs, and its slope in the first one's score."""
    # Comparisons with NaN fail.
    sign = tl.where(order > other_order, 1.0, tl.where(order < other_order, -1.0, 0.0)).to(score.dtype)
    gap = sign * (score - other_score)
    positive = (gap > 0) & (sign != 0)
    return tl.where(positive, gap, 0.0), tl.where(positive, sign, 0.0)
