"""Logits as a Dirichlet's evidence (Sensoy et al., NeurIPS 2018): its mean, and the loss that it is trained with."""

import math

import torch
from torch import Tensor


def evidential(logits: Tensor) -> Tensor:
    """``z = log(1 + softplus(x))``, so that ``softmax(z) = (1 + softplus(x)) / S``, S the sum over the classes.

    The mean of the Dirichlet with evidence ``softplus(x)``, in place of ``softmax(x)``: it grows with the evidence, not
    exponentially, and so a head that was never this sure of anything in training is not very sure of noise either.
    Source: Sensoy et al., *Evidential Deep Learning*, NeurIPS 2018; for several modalities Han et al., *Trusted
    Multi-View Classification*, ICLR 2021.

    Args:
        logits: ``[*, K]``, floating point.

    Returns:
        ``[*, K]``, float32, or float64 if the logits are; at least 0, and so 0 of -inf.

    Example:
        >>> torch.softmax(evidential(torch.tensor([9.0, -9.0])), -1)
        tensor([0.9091, 0.0909])
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    # 1 is added to it anyway, so that log1p, in PyTorch several times slower on a CPU, would be of no use.
    return ((1 + x.clamp_max(80).exp()).log() + (x - 80).relu() + 1).log()


def evidential_loss(rows: Tensor, label: Tensor, annealing: float | Tensor) -> Tensor:
    """The Dirichlet's expected cross-entropy, plus ``annealing`` times how far misleading evidence is from none.

    ``sum_k y_k (digamma(S) - digamma(a_k)) + annealing * KL(Dir(y + (1 - y) a) || Dir(1))`` with ``a = e + 1`` and its
    sum S: the digamma loss of Sensoy et al. with their regularisation, as TMC and RCML train with it.

    Args:
        rows: ``[*, K]``, ``log(1 + e)`` of evidence e, as ``evidential`` returns it.
        label: probabilities ``[*, K]``, or of fewer leading dimensions.
        annealing: from 0 to 1; published as the epoch's number over 50.

    Returns:
        ``[*]``, in the dtype of ``rows``.

    Example:
        >>> rows = evidential(torch.tensor([[4.0, -4.0]]))
        >>> evidential_loss(rows, torch.tensor([[1.0, 0.0]]), 1.0), evidential_loss(rows, torch.tensor([[0.0, 1.0]]), 1)
        (tensor([0.2027]), tensor([3.0728]))
    """
    # In float64 where there is one, as the divergence sums up terms of which little remains for evidence near none.
    mps = rows.device.type == "mps"
    alpha = rows.clamp_max(80.0 if mps else 300.0).to(torch.float32 if mps else torch.float64).exp()
    label = label.to(alpha.dtype)
    expected = (label * (torch.digamma(alpha.sum(-1, keepdim=True)) - torch.digamma(alpha))).sum(-1)
    return (expected + annealing * divergence(label + (1 - label) * alpha)).to(rows.dtype)


def divergence(alpha: Tensor) -> Tensor:
    """``KL(Dir(a) || Dir(1))``, how far a Dirichlet is from the uniform one: ``[*]`` of ``[*, K]``, at least 1 each.

    ``lgamma(S) - sum_k lgamma(a_k) - lgamma(K) + sum_k (a_k - 1) (digamma(a_k) - digamma(S))`` of the sum S.

    Example:
        >>> divergence(torch.tensor([[1.0, 1.0], [1e30, 1e30]]))
        tensor([ 0.0000, 34.1596])
    """
    classes = alpha.shape[-1]
    of_each, of_sum = _without_growth(alpha, 1).sum(-1), _without_growth(alpha.sum(-1), classes)
    return of_sum - of_each - math.lgamma(classes)


def _without_growth(x: Tensor, n: int) -> Tensor:
    """``lgamma(x) - (x - n) digamma(x) + x``, which grows as ``(n - 1/2) log(x)``, and each of its terms as x or more.

    So of large x by Stirling's series, in which what they have in common is left out; the other branch sees no such x.
    """
    is_small = x < 10
    small, large = torch.where(is_small, x, 10), torch.where(is_small, 10, x)
    exact = torch.lgamma(small) - (small - n) * torch.digamma(small) + small
    r = 1 / large
    q = r * r
    # lgamma(x) = (x - 1/2) log(x) - x + log(2 pi) / 2 + rest, and digamma(x) = log(x) - r / 2 - r * slope.
    rest = r * (1 / 12 - q * (1 / 360 - q * (1 / 1260 - q * (1 / 1680 - q / 1188))))
    slope = r * (1 / 12 - q * (1 / 120 - q * (1 / 252 - q * (1 / 240 - q / 132))))
    series = (n - 0.5) * large.log() + (math.log(2 * math.pi) + 1) / 2 + rest + (1 - n * r) * slope - n * r / 2
    return torch.where(is_small, exact, series)
