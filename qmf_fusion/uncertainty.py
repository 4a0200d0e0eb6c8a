"""How uncertain one modality is about each sample: energy (Eq. 13) and its rivals, each ``[*, K] -> [*]``.

Any of them is the ``u`` of Eq. 9, ``w = alpha * u + beta`` with ``alpha < 0``: the more uncertain, the less weight.
They take floating point ``[*, K]`` and return ``[*]`` in its dtype. To add one, write it, and name it at the end.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from qmf_kernels import energy

Uncertainty = Callable[[Tensor], Tensor]


def energy_score(logits: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Energy, ``E = -T * logsumexp(x / T)``: low where some logit is large (Eq. 13).

    Source: Liu et al., *Energy-based Out-of-distribution Detection*, NeurIPS 2020; Eq. 13 of the QMF paper.

    Args:
        logits: ``[*, K]``, floating point.
        temperature: positive; a number, or a tensor that broadcasts against ``[*]``.

    Returns:
        ``[*]``, in the logits' dtype, unbounded, in the logits' units.

    Raises:
        ValueError: a temperature, given as a number, that is not positive.

    Example:
        >>> energy_score(torch.zeros(2, 4))
        tensor([-1.3863, -1.3863])
    """
    if not isinstance(temperature, Tensor):
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature}")
        return energy(torch.logsumexp(logits / temperature, -1), temperature)
    return energy(torch.logsumexp(logits / temperature.unsqueeze(-1), -1), temperature)


def msp_uncertainty(logits: Tensor) -> Tensor:
    """One minus the maximum softmax probability, in [0, 1 - 1/K].

    Source: Hendrycks and Gimpel, *A Baseline for Detecting Misclassified and Out-of-Distribution Examples*, ICLR 2017.

    Example:
        >>> msp_uncertainty(torch.zeros(1, 4))
        tensor([0.7500])
    """
    return 1 - torch.softmax(logits, -1).amax(-1)


def entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax, ``H(p)`` in nats, in [0, log K].

    Example:
        >>> entropy(torch.zeros(1, 4))
        tensor([1.3863])
    """
    # Shifted to a maximum of 0: the two terms below would lose large logits' digits in their difference.
    logits = logits - logits.detach().amax(-1, keepdim=True)
    # H = logsumexp(x) - <p, x>, whose gradient stays finite where a probability is 0: what stands there, -inf or so
    # much that an incoming gradient times it overflows, is left out.
    probs = torch.softmax(logits, -1)
    mean = (probs * torch.where(probs > 0, logits, 0)).sum(-1)
    return torch.logsumexp(logits, -1) - mean


def entropy_uncertainty(logits: Tensor) -> Tensor:
    """Shannon entropy of the softmax over its maximum, ``H(p) / log K``, in [0, 1]; 0 where K is 1.

    Source: Shannon 1948; as a weight for modalities, Tian et al., *UNO*, ICRA 2020.

    Example:
        >>> entropy_uncertainty(torch.zeros(1, 4))
        tensor([1.])
    """
    if logits.shape[-1] == 1:
        return 0 * logits.squeeze(-1)
    return entropy(logits) / torch.logsumexp(torch.zeros_like(logits), -1)


def evidence_uncertainty(logits: Tensor) -> Tensor:
    """Vacuity of the Dirichlet with evidence ``softplus(x)``: ``K / sum(softplus(x) + 1)``, in (0, 1].

    Source: Sensoy et al., *Evidential Deep Learning*, NeurIPS 2018; as a weight for modalities, Han et al., *Trusted
    Multi-View Classification*, ICLR 2021.

    Example:
        >>> evidence_uncertainty(torch.full((1, 4), -100.0))
        tensor([1.])
    """
    # The threshold from which softplus is taken for the identity, at 20 by default, would show in float64.
    return logits.shape[-1] / (F.softplus(logits, threshold=40) + 1).sum(-1)


# Every place that takes a name looks it up here. The energy is what the operators compute on their own.
UNCERTAINTIES: dict[str, Uncertainty] = {
    "energy": energy_score,
    "msp": msp_uncertainty,
    "entropy": entropy_uncertainty,
    "evidence": evidence_uncertainty,
}
