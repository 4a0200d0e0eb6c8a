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
    # The divergence is a difference of log-gammas, of which float32 keeps no digits where evidence is large.
    alpha = rows.clamp_max(300.0).to(torch.float32 if rows.device.type == "mps" else torch.float64).exp()
    label = label.to(alpha.dtype)
    total = alpha.sum(-1, keepdim=True)
    expected = (label * (torch.digamma(total) - torch.digamma(alpha))).sum(-1)
    wrong = label + (1 - label) * alpha
    total = wrong.sum(-1, keepdim=True)
    known = torch.lgamma(total).squeeze(-1) - torch.lgamma(wrong).sum(-1) - math.lgamma(rows.shape[-1])
    divergence = known + ((wrong - 1) * (torch.digamma(wrong) - torch.digamma(total))).sum(-1)
    return (expected + annealing * divergence).to(rows.dtype)
