"""Correlation of weights and losses over a stream larger than memory, in the style of torchmetrics."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from .correlation import co_moments, merge_co_moments, pearson_of
from .precision import KeepsPrecision
from .processes import place_of_process


class Correlation(NamedTuple):
    """``[M]`` each, float64."""

    samples: Tensor
    mean_weight: Tensor
    mean_loss: Tensor
    covariance: Tensor  # Divided by n
    pearson: Tensor  # 0 where weight or loss is constant


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

        Raises:
            ValueError: shapes that differ, or another number of modalities.
        """
        if weights.shape != losses.shape or len(weights) != len(self.moments):
            raise ValueError(
                f"weights and losses must both be [{len(self.moments)}, *], got {tuple(weights.shape)} and "
                f"{tuple(losses.shape)}"
            )
        c = torch.isfinite(weights) & torch.isfinite(losses)
        c = (c if counted is None else c & counted).flatten(1)
        w, v = (x.flatten(1).to(self.moments) for x in (weights, losses))
        self.moments.copy_(merge_co_moments(self.moments, co_moments(w, v, c)))

    def merge_state(self, other: "WeightLossCorrelation") -> None:
        """Count what another accumulator has seen."""
        self.moments.copy_(merge_co_moments(self.moments, other.moments.to(self.moments)))

    def compute(self) -> Correlation:
        """Over everything seen, in all processes where ``torch.distributed`` is initialised."""
        moments, (rank, size) = self.moments, place_of_process()
        if size > 1:
            every = [torch.empty_like(moments) for _ in range(size)]
            dist.all_gather(every, moments.contiguous())
            for other in every[:rank] + every[rank + 1 :]:
                moments = merge_co_moments(moments, other)
        n, mean_weight, mean_loss, *_, products = moments.unbind(1)
        return Correlation(n, mean_weight, mean_loss, products / n.clamp_min(1), pearson_of(moments))

    def reset(self) -> None:
        self.moments.zero_()

    def forward(self, *args: Any, **kwargs: Any) -> None:
        self.update(*args, **kwargs)
