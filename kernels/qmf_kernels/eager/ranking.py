"""The ranking hinge (Eq. 15 to 17): its value and its gradient with respect to the weights, in plain PyTorch.

All three published forms are one hinge, ``sum over pairs with o_i > o_j of relu(s_i - s_j)``; they differ only in what
orders a pair (``o``) and what is compared (``s``). Since ``s`` always holds the weight with coefficient +1, the
gradient with respect to the weight is the gradient with respect to ``s``, and ``o`` needs none.

Shape contract: ``weights`` and ``kappa`` are ``[M, B]``, float32 or float64; a sample whose kappa or weight is not
finite takes part in no pair. The loss is the mean over pairs, summed over modalities.
"""

import torch
from torch import Tensor

_BLOCK = 32
_COUNT_SHIFT = 32


def ranking(weights: Tensor, kappa: Tensor, form: str, pairs: str) -> tuple[Tensor, Tensor]:
    """Return the ranking loss, a scalar, and its gradient with respect to ``weights``, ``[M, B]``."""
    order = weights if form == "paper" else kappa
    score = weights - kappa if form == "released" else weights + kappa
    batch = score.shape[1]
    total, grad = _adjacent(order, score) if pairs == "adjacent" else _all_pairs(order, score)
    num_pairs = batch if pairs == "adjacent" else max(1, batch * (batch - 1) // 2)
    return total / num_pairs, grad / num_pairs


def _adjacent(order: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Pairs (i, i + 1) around the batch."""
    # A sample without a history makes its gaps NaN, here 0; so must one whose score is infinite.
    both = torch.stack([order, torch.where(score.abs() < torch.inf, score, torch.nan)])
    order_gap, score_gap = torch.nan_to_num_(both - both.roll(-1, 2)).unbind(0)
    sign = order_gap.sign()
    hinge = (score_gap * sign).relu_()
    slope = hinge.sign().mul_(sign)
    return hinge.sum(), slope - slope.roll(1, 1)


def _all_pairs(order: Tensor, score: Tensor) -> tuple[Tensor, Tensor]:
    """Every unordered pair, exactly, in O(B log B) operations and O(B) memory.

    With ``net_i`` = #{j: o_j < o_i, s_j < s_i} - #{j: o_j > o_i, s_j > s_i}, the loss is ``sum_i s_i * net_i`` and its
    gradient is ``net``. ``_net_counts`` finds both counts from the scores' ranks in the order of ``o``.
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
    net.scatter_(1, perm, _net_counts(rank).gather(1, rank).to(score.dtype))
    net = torch.where(valid, net, 0)
    # Up to B^2 terms cancel in this sum, hence float64 (and a shift that keeps it well conditioned).
    shifted = torch.where(valid, score, 0).double()
    shifted = shifted - shifted.mean(1, keepdim=True)
    return (shifted * net.double()).sum().to(score.dtype), net


def _net_counts(rank: Tensor) -> Tensor:
    """For a permutation of 0 to B - 1 in each row of ``rank`` ``[M, B]``: by rank, how many lower ranks stand before it
    less how many higher ones stand after it, ``[M, B]``.

    A descent through the bits of the ranks, highest first: at each, the elements stand in blocks that share the higher
    bits, one whose bit is 1 counts the zeros before it in its block, one whose bit is 0 the ones after it, and then the
    zeros move before the ones. Blocks of ``_BLOCK`` count every pair.
    """
    num_modalities, batch = rank.shape
    # Padded to full blocks by ranks that stand behind and above all others: each counts them all, undone below.
    padded = max(_BLOCK, 1 << (batch - 1).bit_length())
    more = torch.arange(batch, padded, device=rank.device).expand(num_modalities, -1)
    # The count so far stands in the bits above the rank's, so that one scatter moves both.
    packed = torch.cat([rank, more], 1)
    size = padded
    while size > _BLOCK:
        half = size // 2
        blocks = packed.view(num_modalities, -1, size)
        bit = (blocks & half).ne(0)
        ones_before = bit.cumsum(2).sub_(bit.long())
        zeros_before = torch.arange(size, device=rank.device) - ones_before
        ones_before -= half  # less those after
        blocks = torch.where(bit, zeros_before, ones_before).bitwise_left_shift_(_COUNT_SHIFT).add_(blocks)
        place = torch.where(bit, ones_before.add_(size), zeros_before)
        packed = torch.empty_like(blocks).scatter_(2, place, blocks)
        size = half
    blocks = packed.view(-1, _BLOCK)
    rank = (blocks & ((1 << _COUNT_SHIFT) - 1)).to(torch.int32)
    earlier = torch.ones(_BLOCK, _BLOCK, dtype=torch.bool, device=rank.device).tril(-1)
    above = ((rank.unsqueeze(2) > rank.unsqueeze(1)) & earlier).float()
    count = (blocks >> _COUNT_SHIFT) + (above.sum(2) - above.sum(1)).long()
    count = torch.empty_like(count).scatter_(1, (rank & (_BLOCK - 1)).long(), count)  # each block's ranks are its own
    return count.view(num_modalities, padded)[:, :batch] + (padded - batch)
