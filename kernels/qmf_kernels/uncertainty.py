"""The uncertainties that are no energies, and their slopes, in plain PyTorch: what stands for ``u`` in Eq. 9.

With ``z = x / T`` and ``p = softmax(z)``, every slope is ``du/dx[k] = (a * p[k] + b * s[k]) / T``: two numbers per row,
and a shape that is neither negative nor more than 1.

========  ==========================  =====  ==========  =========================================
name      u                           a      b           s[k]
========  ==========================  =====  ==========  =========================================
msp       1 - max p                   max p  -max p      1 / n if p[k] is one of the n largest
entropy   H(p) / log K, 0 where K = 1 -u     1 / log K   -p[k] log p[k]
evidence  K / sum(softplus(z) + 1)    0      -u^2 / K    sigmoid(z[k])
========  ==========================  =====  ==========  =========================================

A class that is ruled out, -inf, has no slope. Shape contract: logits ``[G, *, K]`` without NaN and +inf, their softmax,
and T ``[G, *, 1]`` or None for 1; numbers per row are ``[G, *, 1]``.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

NAMES = ("msp", "entropy", "evidence")


class Measured(NamedTuple):
    """An uncertainty, and what its slope is made of: the largest probability for msp, itself for the others."""

    value: Tensor
    factor: Tensor


def measure(name: str, probs: Tensor, logits: Tensor, temperature: Tensor | None) -> Measured:
    if name == "msp":
        largest = probs.amax(-1, keepdim=True)
        return Measured(1 - largest, largest)
    if name == "entropy":
        value = torch.special.entr(probs).sum(-1, keepdim=True).div_(_log(probs.shape[-1]))
        return Measured(value, value)
    # The threshold from which softplus is taken for the identity, at 20 by default, would show in float64.
    value = probs.shape[-1] / F.softplus(_scale(logits, temperature), threshold=40).add_(1).sum(-1, keepdim=True)
    return Measured(value, value)


def slope(name: str, factor: Tensor, num_classes: int) -> tuple[Tensor | None, Tensor | float]:
    """``a`` (None for 0) and ``b``."""
    if name == "msp":
        return factor, -factor
    if name == "entropy":
        return -factor, 1 / _log(num_classes)
    return None, factor.square() / -num_classes


def shape(name: str, factor: Tensor, probs: Tensor, logits: Tensor, temperature: Tensor | None) -> Tensor:
    """``s``, ``[G, *, K]``."""
    if name == "msp":
        largest = (probs == factor).to(probs.dtype)
        return largest.div_(largest.sum(-1, keepdim=True))
    if name == "entropy":
        return torch.special.entr(probs)
    return torch.sigmoid(_scale(logits, temperature))


def _scale(logits: Tensor, temperature: Tensor | None) -> Tensor:
    return logits if temperature is None else logits / temperature


def _log(num_classes: int) -> float:
    """The logarithm of K, or 1 where that is 0: the entropy of one class is 0 as it stands."""
    return math.log(num_classes) or 1.0
