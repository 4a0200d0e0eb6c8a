"""The ranking hinge (Eq. 15 to 17): its value and its gradient with respect to the weights, in plain PyTorch.

All three published forms are one hinge, ``sum over pairs with o_i > o_j of relu(s_i - s_j)``; they differ only in what
orders a pair (``o``) and what is compared (``s``). Since ``s`` always holds the weight with coefficient +1, the
gradient with respect to the weight is the gradient with respect to ``s``, and ``o`` needs none.

Shape contract: ``weights`` and ``kappa`` are ``[M, B]``, float32 or float64; a NaN in ``kappa`` marks a sample that
takes part in no pair. The result is the mean over pairs, summed over modalities, and its gradient ``[M, B]``.
"""

import torch
from torch import Tensor

FORMS = ("paper", "margin", "released")
PAIRS = ("adjacent", "all")


def ranking(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    """Return the ranking loss, a scalar, and its gradient with respect to ``weights``, ``[M, B]``."""
    order = weights if form == "paper" else kappa
    score = weights - kappa if form == "released" else weights + kappa
    if pairs == "adjacent":
        return _adjacent(order, score)
    return _all_pairs(order, score)


def _adjacent(order: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (i, i + 1) around the batch."""
    both = torch.stack([order, score])
    # A sample without a history makes its gaps NaN, here 0.
    order_gap, score_gap = torch.nan_to_num_(both - both.roll(-1, 2)).unbind(0)
    sign = order_gap.sign() / score.shape[1]
    gap = (sign * score_gap).relu_()
    slope = gap.sign() * sign
    return gap.sum(), slope - slope.roll(1, 1)


def _all_pairs(order: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Every unordered pair, exactly, in O(B log B) operations and O(B) memory.

    With ``net_i`` = #{j: o_j < o_i, s_j < s_i} - #{j: o_j > o_i, s_j > s_i}, the loss is ``sum_i s_i * net_i`` and its
    gradient is ``net``. Both counts come from one descent through the bits of each score's rank, highest first: the
    elements stand in the order of ``o``, split into blocks that share the higher bits, and at each bit an element
    whose bit is 1 counts the zeros before it in its block, one whose bit is 0 the ones after it.
    """
    num_modalities, batch = score.shape
    net = torch.zeros_like(score)
    if batch < 2:
        return score.new_zeros(()), net
    valid = torch.isfinite(score) & torch.isfinite(order)
    # Samples without a history stand last in the order and lowest in the score: no other sample counts them.
    order = torch.where(valid, order, torch.inf)
    low = torch.where(valid, score, -torch.inf)

    # Position: by o, and among equal o by descending score. Rank: by score, and among equal scores by descending
    # position. Then "earlier with a lower rank" means strictly smaller in both, and ties contribute nothing.
    by_score = low.argsort(dim=1, descending=True, stable=True)
    perm = by_score.gather(1, order.gather(1, by_score).argsort(dim=1, stable=True))
    backwards = low.gather(1, perm).flip(1).argsort(dim=1, stable=True)
    place = torch.arange(batch, device=score.device).expand(num_modalities, batch)
    rank = torch.empty_like(perm).scatter_(1, batch - 1 - backwards, place)

    sequence, count = rank, torch.zeros_like(rank)
    for level in range((batch - 1).bit_length() - 1, -1, -1):
        # The ranks are a permutation of 0 .. B - 1, so the blocks are aligned and only the last may be short.
        start = (place >> (level + 1)) << (level + 1)
        size = (batch - start).clamp(max=2 << level)
        zeros = size.clamp(max=1 << level)
        bit = (sequence >> level) & 1
        running = bit.cumsum(1) - bit
        ones_before = running - running.gather(1, start)
        zeros_before = place - start - ones_before
        count = count + torch.where(bit == 1, zeros_before, ones_before + zeros - size)
        if level == 0:
            target = start + torch.where(bit == 1, zeros, 0)
        else:
            target = start + torch.where(bit == 1, zeros + ones_before, zeros_before)
        sequence = torch.empty_like(sequence).scatter_(1, target, sequence)
        count = torch.empty_like(count).scatter_(1, target, count)

    net.scatter_(1, perm, count.gather(1, rank).to(score.dtype))
    net = torch.where(valid, net, 0)
    # Up to B^2 terms cancel in this sum, hence float64 (and a shift that keeps it well conditioned).
    shifted = torch.where(valid, score, 0).double()
    shifted = shifted - shifted.mean(1, keepdim=True)
    num_pairs = batch * (batch - 1) / 2
    loss = (shifted * net.double()).sum() / num_pairs
    return loss.to(score.dtype), net / num_pairs
