"""Where a new score stands among all before it: conformal p-values, exactly uniform if all are exchangeable.

Scores are rounded to bfloat16, of which there are 65,536: how often each came says all that ranks need, in a memory
that does not grow. Rounding makes ties; they are broken at random, by numbers that follow from a seed and a row's
number.
"""

import torch
from torch import Tensor

GRID = 2**16  # bfloat16's numbers
_GAMMA, _FIRST, _SECOND = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
_APART = 0xD6E8FEB86659FD93 - 2**64  # odd, of bits at random


def grid_index(scores: Tensor) -> Tensor:
    """Which number of bfloat16 each is nearest to, int64 from 0 to ``GRID - 1``, in their order; NaN has none.

    Example:
        >>> grid_index(torch.tensor([-torch.inf, -1.0, -0.0, 0.0, 1.0])).diff() > 0
        tensor([ True,  True, False,  True])
    """
    bits = scores.to(torch.bfloat16).view(torch.int16).long()
    return torch.where(bits < 0, -(bits + 2**15), bits) + 2**15


def uniforms(stream: int, first: int, num: int, device: torch.device, seed: int = 0) -> Tensor:
    """Numbers ``first`` to ``first + num - 1`` of a random sequence in (0, 1), float64 ``[num]``.

    Counted, not drawn (splitmix64; Steele, Lea and Flood, OOPSLA 2014): the same ones however a stream is cut. Each
    seed's streams lie elsewhere in one long sequence.
    """
    z = torch.arange(first, first + num, device=device) + (stream << 40)
    z = z + torch.tensor(seed, device=device) * _APART
    z = (z + 1) * _GAMMA
    for shift, factor in ((30, _FIRST), (27, _SECOND)):
        z = (z ^ _shifted(z, shift)) * factor
    z = z ^ _shifted(z, 31)
    return (_shifted(z, 11).to(torch.float64) + 0.5) / 2**53


def _shifted(z: Tensor, by: int) -> Tensor:
    """To the right, zeros coming in."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def p_values(counts: Tensor, values: Tensor, draws: Tensor) -> Tensor:
    """Of n values that come one after the other, each among all before it and itself; small where it is large.

    ``p = (number of larger ones + draw * number of equal ones) / number of all``. Where the values and those counted
    are exchangeable, these are independent and uniform (Vovk, Gammerman and Shafer, 2005, ch. 2), because a value joins
    the bag before the next is looked at. Against a bag that stays as it is they would not be independent, and a test
    that multiplies evidence up would take the bag's chance composition for a shift, sooner or later.

    Args:
        counts: how often each value came so far, int64 ``[V]``.
        values: int64 ``[n]``, 0 to V - 1.
        draws: ``[n]`` in (0, 1).

    Example:
        >>> p_values(torch.tensor([9, 0]), torch.tensor([1, 1]), torch.tensor([0.5, 0.5])) * torch.tensor([10, 11])
        tensor([0.5000, 1.0000])
    """
    upto = counts.cumsum(0)
    n = torch.arange(len(values), device=values.device)
    earlier = n.unsqueeze(1) > n
    larger = upto[-1] - upto[values] + (earlier & (values > values.unsqueeze(1))).sum(1)
    equal = counts[values] + 1 + (earlier & (values == values.unsqueeze(1))).sum(1)
    return (larger + draws * equal) / (upto[-1] + n + 1)
