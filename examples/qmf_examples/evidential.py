"""Trusted multi-view classification: evidence, Dempster's rule, and the loss (Han et al., ICLR 2021 and TPAMI 2022)."""

import torch
import torch.nn.functional as F
from torch import Tensor


def evidence(logits: Tensor) -> Tensor:
    """``softplus``: evidence ``[*, K]`` that is never negative; the Dirichlet's parameters are evidence + 1."""
    return F.softplus(logits)


def opinion(given: Tensor) -> tuple[Tensor, Tensor]:
    """Beliefs ``[*, K]`` and uncertainty ``[*]`` that evidence ``[*, K]`` stands for; they add up to 1 (Eq. 3).

    Example:
        >>> opinion(torch.tensor([2.0, 0.0]))
        (tensor([0.5000, 0.0000]), tensor(0.5000))
    """
    num = given.shape[-1]
    strength = given.sum(-1) + num
    return given / strength.unsqueeze(-1), num / strength


def combine(first: Tensor, second: Tensor) -> Tensor:
    """Evidence ``[*, K]`` of two sources as one's, by Dempster's rule (definition 4 of the ICLR paper).

    It commutes; no evidence at all changes nothing; the uncertainty is at most the smaller of the two.

    With ``b = e / S`` and ``u = K / S``, the combined evidence ``K * b / u`` is
    ``e1 * e2 / K + e1 + e2``: the conflict cancels, and nothing is divided by what may vanish.

    Example:
        >>> combine(torch.tensor([2.0, 0.0]), torch.tensor([4.0, 1.0]))
        tensor([10.,  1.])
    """
    return first * second / first.shape[-1] + (first + second)


def evidential_loss(given: Tensor, target: Tensor, annealing: float) -> Tensor:
    """The expected cross-entropy under the Dirichlet, and the divergence of the wrong classes' evidence from none.

    Eq. 7 to 9 of the ICLR paper. (The released code takes the divergence of all the evidence, the right class's too.)

    Args:
        given: evidence ``[B, K]``.
        target: int ``[B]``.
        annealing: from 0 to 1, what the divergence counts.
    """
    given = given.float()
    alpha = given + 1
    strength = alpha.sum(-1)
    right = F.one_hot(target, alpha.shape[-1]).to(alpha)
    expected = torch.digamma(strength) - (right * torch.digamma(alpha)).sum(-1)
    wrong = given * (1 - right) + 1
    return (expected + annealing * divergence_from_uniform(wrong)).mean()


def divergence_from_uniform(alpha: Tensor) -> Tensor:
    """``KL(Dir(alpha) || Dir(1, ..., 1))``, ``[*]`` for ``[*, K]``.

    Example:
        >>> divergence_from_uniform(torch.ones(3))
        tensor(0.)
    """
    total = alpha.sum(-1)
    log_ratio = torch.lgamma(total) - torch.lgamma(alpha).sum(-1) - torch.lgamma(torch.ones_like(alpha).sum(-1))
    shifts = torch.digamma(alpha) - torch.digamma(total).unsqueeze(-1)
    return log_ratio + ((alpha - 1) * shifts).sum(-1)
