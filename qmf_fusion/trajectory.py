"""The loss trajectory ``kappa`` (Eq. 14): the mean of each sample's past unimodal losses, kept with the model."""

import torch
from torch import Tensor

from .checks import check_index
from .precision import KeepsPrecision


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
    visits: Tensor

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
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int64))

    @property
    def num_samples(self) -> int:
        return self.total.shape[1]

    @property
    def num_modalities(self) -> int:
        return self.total.shape[0]

    @torch.no_grad()
    def record(self, losses: Tensor, index: Tensor) -> None:
        """Add a batch of losses ``[M, B]`` at the dataset indices ``[B]``, repeated ones each counted.

        A loss that is not finite (an absent modality's is NaN) is left out.
        """
        index = check_index(index, losses.shape[1], self.num_samples)
        counted = torch.isfinite(losses)
        if self.start_epoch > 1:
            counted = counted & (self.visits[index] >= self.start_epoch - 1)
        self.total.index_add_(1, index, torch.where(counted, losses, 0).to(self.total.dtype))
        self.count.index_add_(1, index, counted.to(self.count.dtype))
        self.visits.index_add_(0, index, torch.ones_like(index))

    @torch.no_grad()
    def kappa(self, index: Tensor, rescale: str | None = "minmax") -> Tensor:
        """``kappa`` of the samples ``index`` ``[B]``: ``[M, B]``, NaN where nothing is recorded.

        With ``rescale="minmax"``, scaled per modality to [0, 1] over all samples that have a history (0 where they are
        all equal); with None, the mean losses themselves.
        """
        index = check_index(index, len(index), self.num_samples)
        if rescale is None:
            return self.total[:, index] / self.count[:, index]
        mean = self.total / self.count  # 0 / 0, NaN, where nothing is recorded
        low = torch.nan_to_num(mean, nan=torch.inf).amin(1, keepdim=True)
        high = torch.nan_to_num(mean, nan=-torch.inf).amax(1, keepdim=True)
        spread = high - low
        return (mean[:, index] - low) / torch.where(spread > 0, spread, 1)

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
            setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:-1], added)], -1))

    def extra_repr(self) -> str:
        return f"num_samples={self.num_samples}, num_modalities={self.num_modalities}, start_epoch={self.start_epoch}"
