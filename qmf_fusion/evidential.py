"""The evidential likelihood (Sensoy et al., NeurIPS 2018): logits as a Dirichlet's evidence, for its mean."""

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
