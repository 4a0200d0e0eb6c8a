"""What happened over time, in a memory that does not grow: a point every so many rows, ever fewer as there are more."""

import torch
from torch import Tensor

from ..precision import KeepsPrecision

POINTS = 512


class History(KeepsPrecision):
    """Up to ``POINTS`` points, one every ``stride`` rows; when full, every second one goes and the stride doubles.

    Args:
        shape: of what is kept of each point.
    """

    values: Tensor
    rows: Tensor
    filled: Tensor
    stride: Tensor

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.register_buffer("values", torch.zeros(POINTS, *shape, dtype=torch.float64, device="cpu"))
        self.register_buffer("rows", torch.zeros(POINTS, dtype=torch.int64, device="cpu"))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("stride", torch.ones((), dtype=torch.int64, device="cpu"))

    def clear(self) -> None:
        """Forget everything."""
        self.filled.zero_()
        self.stride.fill_(1)

    def points(self) -> tuple[Tensor, Tensor]:
        """The rows' numbers ``[P]``, and what was kept of them ``[P, *shape]``."""
        filled = int(self.filled)
        return self.rows[:filled], self.values[:filled]

    def add(self, rows: Tensor, values: Tensor) -> None:
        """Rows' numbers, int64 ``[B]``, ascending, and values ``[B, *shape]``."""
        while True:
            filled, stride = int(self.filled), int(self.stride)
            place = (rows % stride == 0).nonzero().flatten()
            now = place[: POINTS - filled]
            self.rows[filled : filled + len(now)] = rows[now]
            self.values[filled : filled + len(now)] = values[now]
            self.filled += len(now)
            if len(now) == len(place):
                return
            rows, values = rows[place[len(now) :]], values[place[len(now) :]]
            keep = (self.rows % (2 * stride) == 0).nonzero().flatten()
            self.rows[: len(keep)], self.values[: len(keep)] = self.rows[keep], self.values[keep]
            self.filled.fill_(len(keep))
            self.stride.fill_(2 * stride)
