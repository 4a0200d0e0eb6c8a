"""The loss trajectory ``kappa`` (Eq. 14): the mean of each sample's past unimodal losses, kept with the model."""

import math

import torch
from torch import Tensor
from torch.compiler import is_compiling as compiling

from .checks import check_index
from .precision import KeepsPrecision

# Entries, M * N, up to which looking at all of them is cheaper than finding out whether that is needed.
_SCAN_BELOW = 16_384


class LossTrajectory(KeepsPrecision):
    """Per modality and sample, the sum and the count of the losses recorded so far.

    Sums are float64, so that float32 losses add up exactly, in whatever order. They live in ``state_dict`` and move
    with ``.to()``.

    Args:
        num_samples: N, the size of the training set, at least 1.
        num_modalities: M, at least 1.
        start_epoch: ``T_s`` of Eq. 14, counted from 1. A sample's own visits stand for epochs: the losses of its first
            ``start_epoch - 1`` visits are not recorded.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> trajectory = LossTrajectory(num_samples=3, num_modalities=1)
        >>> trajectory.record(torch.tensor([[2.0, 4.0]]), torch.tensor([0, 2]))
        >>> trajectory.kappa(torch.tensor([0, 1, 2]))
        tensor([[0., nan, 1.]], dtype=torch.float64)
    """

    total: Tensor
    count: Tensor
    visits: Tensor | None
    extremes: Tensor
    extreme_samples: Tensor

    def __init__(self, num_samples: int, num_modalities: int, start_epoch: int = 1) -> None:
        super().__init__()
        for name, value in (
            ("num_samples", num_samples),
            ("num_modalities", num_modalities),
            ("start_epoch", start_epoch),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
        self.start_epoch = start_epoch
        self.register_buffer("total", torch.zeros(num_modalities, num_samples, dtype=torch.float64))
        self.register_buffer("count", torch.zeros(num_modalities, num_samples, dtype=torch.int64))
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int64) if start_epoch > 1 else None)
        # The smallest mean loss per modality and the largest, over the samples that have one, and whose: [2, M].
        self.register_buffer("extremes", torch.zeros(2, num_modalities, dtype=torch.float64))
        self.register_buffer("extreme_samples", torch.zeros(2, num_modalities, dtype=torch.int64))

    @property
    def num_samples(self) -> int:
        return self.total.shape[1]

    @property
    def num_modalities(self) -> int:
        return self.total.shape[0]

    def record(self, losses: Tensor, index: Tensor) -> None:
        """Add a batch of losses ``[M, B]`` at the dataset indices ``[B]``, repeated ones each counted.

        A loss that is not finite (an absent modality's is NaN) is left out.

        Raises:
            TypeError, ValueError, IndexError: an index of the wrong kind, shape or range.
        """
        self.record_checked(losses.detach(), check_index(index, losses.shape[1], self.num_samples))

    def record_checked(self, losses: Tensor, index: Tensor) -> None:
        """``record`` without its checks."""
        dtype = self.total.dtype
        if self.visits is None and losses.is_cpu and not compiling() and math.isfinite(losses.sum().item()):
            self.total.index_add_(1, index, losses.to(dtype))
            self.count.index_add_(1, index, index.new_ones(losses.shape))
        else:
            counted = torch.isfinite(losses)
            if self.visits is not None:
                counted = counted & (self.visits[index] >= self.start_epoch - 1)
                self.visits.index_add_(0, index, torch.ones_like(index))
            self.total.index_add_(1, index, torch.where(counted, losses, 0).to(dtype))
            self.count.index_add_(1, index, counted.to(self.count.dtype))
        if not self._extremes_hold(index):
            self._find_extremes()

    def _find_extremes(self) -> None:
        mean = self.total / self.count  # 0 / 0, NaN, where nothing is recorded
        low, where_low = torch.nan_to_num(mean, nan=torch.inf).min(1)
        high, where_high = torch.nan_to_num(mean, nan=-torch.inf).max(1)
        self.extremes.copy_(torch.stack([low, high]))
        self.extreme_samples.copy_(torch.stack([where_low, where_high]))

    def _extremes_hold(self, index: Tensor) -> bool:
        """Whether the samples just updated are known to leave the extremes as they were: a batch rarely moves them,
        and a pass over all N samples would cost more than the rest of a small batch's step.
        """
        if not index.is_cpu or compiling() or self.total.numel() < _SCAN_BELOW:
            return False
        if (index.view(-1, 1, 1) == self.extreme_samples).any().item():
            return False
        mean = self.total.index_select(1, index) / self.count.index_select(1, index)
        low, high = torch.nan_to_num(mean, nan=torch.inf).amin(1), torch.nan_to_num(mean, nan=-torch.inf).amax(1)
        return not ((low < self.extremes[0]) | (high > self.extremes[1])).any().item()

    def kappa(self, index: Tensor, rescale: str | None = "minmax") -> Tensor:
        """``kappa`` of the samples ``index`` ``[B]``: ``[M, B]``, NaN where nothing is recorded.

        With ``rescale="minmax"``, scaled per modality to [0, 1] over all samples that have a history (0 where they are
        all equal); with None, the mean losses themselves.

        Raises:
            TypeError, ValueError, IndexError: an index of the wrong kind, shape or range.
        """
        return self.kappa_checked(check_index(index, len(index), self.num_samples), rescale)

    def kappa_checked(self, index: Tensor, rescale: str | None) -> Tensor:
        """``kappa`` without its checks."""
        mean = self.total.index_select(1, index) / self.count.index_select(1, index)
        if rescale is None:
            return mean
        low, high = self.extremes.unsqueeze(2).unbind(0)
        # Where all means are equal, or there are none, 0 / 0 would follow: their distance to the smallest is 0 or NaN.
        return (mean - low) / (high - low).clamp(min=torch.finfo(mean.dtype).tiny)

    def resize(self, num_samples: int) -> None:
        """Grow to ``num_samples``, with no history for the new ones.

        Raises:
            ValueError: fewer samples than there are.
        """
        added = num_samples - self.num_samples
        if added < 0:
            raise ValueError(f"num_samples must be at least the present {self.num_samples}, got {num_samples}")
        for name in ("total", "count", "visits"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:-1], added)], -1))

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, num_modalities={self.num_modalities}, start_epoch={self.start_epoch}"
