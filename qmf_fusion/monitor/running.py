"""Running means that forget: what a stream has been like of late, beside what the reference is like."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..precision import KeepsPrecision


class RunningMeans(KeepsPrecision):
    """Exponential means of several quantities of M modalities.

    Args:
        memories: Q numbers; a value of so many values ago weighs 1 / e of the newest.
        num_modalities: M.
    """

    now: Tensor
    """``[Q, M]``."""
    usual: Tensor
    """``[Q, M]``: the reference's, from which ``now`` starts."""

    def __init__(self, memories: Sequence[float], num_modalities: int) -> None:
        super().__init__()
        self.memories = tuple(memories)
        for name in ("now", "usual"):
            shape = len(self.memories), num_modalities
            self.register_buffer(name, torch.zeros(shape, dtype=torch.float64, device="cpu"))

    def fit(self, usual: Tensor) -> None:
        """Start from ``[Q, M]``."""
        self.usual.copy_(usual)
        self.now.copy_(usual)

    def restart(self, modality: int) -> None:
        """Start a modality from what is usual."""
        self.now[:, modality] = self.usual[:, modality]

    def add(self, values: Tensor) -> Tensor:
        """The means after each of B values ``[Q, M, B]``, of which NaN change nothing: ``[Q, M, B]``."""
        known, rate = ~values.isnan(), -1 / values.new_tensor(self.memories).reshape(-1, 1, 1)
        left = (known * rate).cumsum(-1)  # log of what is left of the former mean after each
        # The weight of each value (the last dimension) after each (the one before), before it was counted as 1 - keep.
        weight = (left.unsqueeze(-1) - left.unsqueeze(-2)).tril().exp().tril()
        gained = (weight * values.nan_to_num().unsqueeze(-2)).sum(-1)
        along = left.exp() * self.now.unsqueeze(-1) - torch.expm1(rate) * gained
        self.now.copy_(along[..., -1])
        return along
