"""Pearson's correlation (Eq. 6), from sums that batches and processes can merge, and Spearman's, that of ranks."""

import torch
from torch import Tensor


def co_moments(x: Tensor, y: Tensor, counted: Tensor | None = None) -> Tensor:
    """Of ``[*, n]`` and ``[*, n]`` where they count, ``[*, 6]``: how many, the means, the sums of squared deviations
    of either, and of the deviations' products.
    """
    if counted is None:
        n = x.new_full(x.shape[:-1], x.shape[-1])
        dx, dy = (v - v.mean(-1, keepdim=True) for v in (x, y))
        means = [x.mean(-1), y.mean(-1)]
    else:
        x, y = (torch.where(counted, v, 0) for v in (x, y))
        n = counted.sum(-1).to(x.dtype)
        means = [v.sum(-1) / n.clamp_min(1) for v in (x, y)]
        dx, dy = (torch.where(counted, v - mean.unsqueeze(-1), 0) for v, mean in zip((x, y), means, strict=True))
    return torch.stack([n, *means, (dx * dx).sum(-1), (dy * dy).sum(-1), (dx * dy).sum(-1)], -1)


def merge_co_moments(a: Tensor, b: Tensor) -> Tensor:
    """Two sets' ``[*, 6]`` into that of both together (Chan, Golub and LeVeque 1983)."""
    n = a[..., 0] + b[..., 0]
    share = b[..., 0] / n.clamp_min(1)
    dx, dy = b[..., 1] - a[..., 1], b[..., 2] - a[..., 2]
    cross = a[..., 0] * share
    sums = torch.stack([dx * dx * cross, dy * dy * cross, dx * dy * cross], -1) + a[..., 3:] + b[..., 3:]
    return torch.cat([torch.stack([n, a[..., 1] + dx * share, a[..., 2] + dy * share], -1), sums], -1)


def pearson_of(moments: Tensor) -> Tensor:
    """Pearson's r ``[*]`` from ``co_moments``; 0 where x or y is constant, to rounding."""
    n, mean_x, mean_y, xx, yy, xy = moments.unbind(-1)
    size = (xx * yy).sqrt()
    constant = (xx <= n * (1e-12 * mean_x).square()) | (yy <= n * (1e-12 * mean_y).square()) | (size == 0)
    return torch.where(constant, 0, xy / torch.where(constant, 1, size)).clamp(-1, 1)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's r of ``[*, n]`` and ``[*, n]``, ``[*]`` float64; 0 where either is constant.

    Example:
        >>> pearson(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([3.0, 2.0, 0.0]))
        tensor(-1., dtype=torch.float64)
    """
    return pearson_of(co_moments(x.detach().double(), y.detach().double()))


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks of ``[n]`` and ``[n]``, ties at their mean rank; 0 where either is constant.

    Example:
        >>> round(spearman(torch.tensor([1.0, 2.0, 4.0]), torch.tensor([1.0, 8.0, 9.0])), 6)
        1.0
    """
    return float(pearson(_ranks(x), _ranks(y)))


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks: Tensor = (last - (counts - 1) / 2)[inverse]
    return ranks.double()
