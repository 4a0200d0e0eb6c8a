"""LogitNorm (Wei et al., ICML 2022): rows of logits divided by their Euclidean norm times a temperature.

With ``x' = x / (t |x|)`` a gradient g of x' makes ``(g - t^2 <x', g> x') / (t |x|)`` of x. The norm is that of a row
whose largest value is 1, as its own squares may be out of range.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Norms(NamedTuple):
    """What rows were divided by, in two parts, ``[G, *, 1]`` each: their largest size, and the rest."""

    largest: Tensor
    rest: Tensor


def normalize(x: Tensor, temperature: float) -> tuple[Tensor, Norms]:
    """``[G, *, K]``; NaN somewhere in rows that are not finite. A row of zeros stays one."""
    largest = x.detach().abs().amax(-1, keepdim=True)
    largest = torch.where(largest == 0, 1, largest.clamp_min(torch.finfo(x.dtype).tiny))
    x = x / largest
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    rest = temperature * torch.where(norm > 0, norm, 1)
    return x / rest, Norms(largest, rest)


def normalize_backward(grad: Tensor, normalized: Tensor, norms: Norms, temperature: float) -> Tensor:
    """From the gradient of what ``normalize`` returns to that of what it was given."""
    along = (normalized * grad).sum(-1, keepdim=True) * temperature**2
    return torch.addcmul(grad, normalized, along, value=-1) / norms.rest / norms.largest
