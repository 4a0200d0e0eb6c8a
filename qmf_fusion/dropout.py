"""Modality dropout: leave modalities out at random in training, so that the heads and the fusion expect it."""

import torch
from torch import Tensor, nn

from .processes import place_of_process

_MASK = 0xFFFFFFFF


class ModalityDropout(nn.Module):
    """Which modalities of each sample stay, drawn anew at every call in training; all of them in evaluation.

    Each modality is dropped with probability ``p``, but of a sample's last one the luckiest stays. Draws come from a
    counter (a buffer, so that a resumed run goes on where it stopped) through a hash: the same on every device,
    compiled or not, and free of global random state. Of the processes of ``torch.distributed``, each draws for the
    batches of all, put side by side in the order of ranks, and takes its own part: what one process would draw.

    Args:
        p: from 0 up to, not including, 1.
        seed: an integer.

    Example:
        >>> dropout = ModalityDropout(0.5)
        >>> dropout(torch.ones(2, 4, dtype=torch.bool)).any(0)  # no sample loses both
        tensor([True, True, True, True])
    """

    calls: Tensor

    def __init__(self, p: float, seed: int = 0) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"modality_dropout must be from 0 to below 1, got {p}")
        self.p, self.seed = p, seed
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, available: Tensor) -> Tensor:
        """Bool ``[M, B]``, which are there, to bool ``[M, B]``, which stay."""
        if not self.training or self.p == 0:
            return available
        rank, size = place_of_process()
        num, batch = available.shape
        place = torch.arange(num * size * batch, device=available.device).view(num, size, batch)[:, rank]
        # A call must not change the draw that its own backward, or a checkpointed forward, may look at again.
        calls = self.calls.clone()
        self.calls += 1
        uniform = _hash(place ^ _hash(calls ^ _hash(torch.full_like(calls, self.seed & _MASK))))
        uniform = torch.where(available, uniform, -1)
        return available & ((uniform >= self.p * (_MASK + 1)) | (uniform == uniform.amax(0)))

    def extra_repr(self) -> str:
        return f"p={self.p}, seed={self.seed}"


def _hash(x: Tensor) -> Tensor:
    """A 32-bit integer hash (the constants of Chris Wellons' lowbias32), in int64 that never overflows."""
    x = x & _MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = x ^ (x >> 15)
    x = (((x * 0x846C) << 16) + x * 0xA68B) & _MASK  # the factor in halves: its product would not fit
    return x ^ (x >> 16)
