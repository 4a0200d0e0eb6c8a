"""Trusted multi-view classification: evidence and Dempster's rule (Han et al., ICLR 2021 and TPAMI 2022)."""

import torch.nn.functional as F
from torch import Tensor


def evidence(logits: Tensor) -> Tensor:
    """``softplus``: evidence ``[*, K]`` that is never negative; the Dirichlet's parameters are evidence + 1."""
    return F.softplus(logits)


def opinion(given: Tensor) -> tuple[Tensor, Tensor]:
    """Beliefs ``[*, K]`` and uncertainty ``[*]`` that evidence ``[*, K]`` stands for; they add up to 1 (Eq. 3).

    Example:
        >>> import torch
        >>> opinion(torch.tensor([2.0, 0.0]))
        (tensor([0.5000, 0.0000]), tensor(0.5000))
    """
    num = given.shape[-1]
    strength = given.sum(-1) + num
    return given / strength.unsqueeze(-1), num / strength


def combine(first: Tensor, second: Tensor) -> Tensor:
    """Evidence ``[*, K]`` of two sources as one's, by Dempster's rule (definition 4 of the ICLR paper).

    It commutes; no evidence at all changes nothing; the uncertainty is at most the smaller of the two.

    With ``b = e / S`` and ``u = K / S``, the combined evidence ``K * b / u`` is ``e1 * e2 / K + e1 + e2``: the conflict
    cancels, and nothing is divided by what may vanish, as in ``baselines.dempster``, which also gives the beliefs.

    Example:
        >>> import torch
        >>> combine(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 1.0]))
        tensor([10.,  1.])
    """
    return first * second / first.shape[-1] + (first + second)
