"""Pearson's correlation (Eq. 6), at once or over a stream larger than memory, and Spearman's, that of ranks."""

from functools import reduce
from typing import Any, NamedTuple, Self

import torch
import torch.distributed as dist
from torch import Tensor

from .precision import KeepsPrecision
from .processes import place_of_process


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


def constant(moments: Tensor) -> Tensor:
    """Whether x or y of ``co_moments`` ``[*, 6]`` is constant, to rounding: bool ``[*]``."""
    n, mean_x, mean_y, xx, yy, _ = moments.unbind(-1)
    either = (xx <= n * (1e-12 * mean_x).square()) | (yy <= n * (1e-12 * mean_y).square())
    return either | ((xx * yy).sqrt() == 0)


class Correlation(NamedTuple):
    """Of M modalities' weights and losses, ``[M]`` each, float64."""

    samples: Tensor
    mean_weight: Tensor
    mean_loss: Tensor
    covariance: Tensor  # divided by n
    pearson: Tensor  # 0 where weight or loss is constant, to rounding

    @classmethod
    def of(cls, moments: Tensor) -> Self:
        """From the ``co_moments`` of weights and losses."""
        n, mean_x, mean_y, xx, yy, xy = moments.unbind(-1)
        size = (xx * yy).sqrt()
        still = constant(moments)
        r = torch.where(still, 0, xy / torch.where(still, 1, size)).clamp(-1, 1)
        return cls(n, mean_x, mean_y, xy / n.clamp_min(1), r)


def pearson(x: Tensor, y: Tensor) -> Tensor:
    """Pearson's r of ``[*, n]`` and ``[*, n]``, ``[*]`` float64; 0 where either is constant.

    Example:
        >>> pearson(torch.tensor([0.1, 0.2, 0.4]), torch.tensor([3.0, 2.0, 0.0]))
        tensor(-1., dtype=torch.float64)
    """
    return Correlation.of(co_moments(x.detach().double(), y.detach().double())).pearson


def spearman(x: Tensor, y: Tensor) -> float:
    """The correlation of the ranks of ``[n]`` and ``[n]``, ties at their mean rank; 0 where either is constant."""
    return float(pearson(_ranks(x), _ranks(y)))


def _ranks(x: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0)
    ranks: Tensor = (last - (counts - 1) / 2)[inverse]
    return ranks.double()


class WeightLossCorrelation(KeepsPrecision):
    """Accumulate Pearson's r of weight and loss, per modality, batch by batch and across processes.

    ``update`` / ``compute`` / ``reset`` / ``merge_state`` as in torchmetrics (which is not needed). Counts, means and
    co-moments are merged by Chan et al.'s pairwise update, in float64, so that neither the order nor the size of the
    batches matters.

    Args:
        num_modalities: M.

    Example:
        >>> metric = WeightLossCorrelation(num_modalities=1)
        >>> metric.update(torch.tensor([[0.1, 0.2]]), torch.tensor([[3.0, 2.0]]))
        >>> metric.update(torch.tensor([[0.3, 0.4]]), torch.tensor([[1.0, 0.0]]))
        >>> metric.compute().pearson.round(decimals=6)
        tensor([-1.], dtype=torch.float64)
    """

    moments: Tensor

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        if num_modalities < 1:
            raise ValueError(f"num_modalities must be at least 1, got {num_modalities}")
        # ``co_moments``: no sum over processes, so kept apart until ``compute``.
        self.register_buffer("moments", torch.zeros(num_modalities, 6, dtype=torch.float64))

    @torch.no_grad()
    def update(self, weights: Tensor, losses: Tensor, counted: Tensor | None = None) -> None:
        """Weights and losses ``[M, *]``, and where they count, bool ``[M, *]``; what is not finite never does.

        Shapes that differ, or another number of modalities, are a ValueError.
        """
        if weights.shape != losses.shape or len(weights) != len(self.moments):
            got = f"{tuple(weights.shape)} and {tuple(losses.shape)}"
            raise ValueError(f"weights and losses must both be [{len(self.moments)}, *], got {got}")
        c = torch.isfinite(weights) & torch.isfinite(losses)
        c = (c if counted is None else c & counted).flatten(1).to(self.moments.device)
        w, v = (x.flatten(1).to(self.moments) for x in (weights, losses))
        self.moments.copy_(merge_co_moments(self.moments, co_moments(w, v, c)))

    def merge_state(self, other: "WeightLossCorrelation") -> None:
        """Count what another accumulator has seen."""
        self.moments.copy_(merge_co_moments(self.moments, other.moments.to(self.moments)))

    def compute(self) -> Correlation:
        """Over everything seen, in all processes where ``torch.distributed`` is initialised."""
        every = [torch.empty_like(self.moments) for _ in range(place_of_process()[1])]
        if len(every) == 1:
            return Correlation.of(self.moments)
        dist.all_gather(every, self.moments)
        # In the order of ranks everywhere, so that all processes get the same bits.
        return Correlation.of(reduce(merge_co_moments, every))

    def reset(self) -> None:
        self.moments.zero_()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)
