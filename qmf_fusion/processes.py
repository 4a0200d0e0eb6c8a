"""Data-parallel processes, as ``torch.distributed`` knows them: which this one is, and sums over all of them."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def place_of_process(group: dist.ProcessGroup | None = None) -> tuple[int, int]:
    """This process's rank, and how many there are; ``(0, 1)`` without an initialised process group."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(group), dist.get_world_size(group)


def sum_over_processes(values: Sequence[Tensor]) -> list[Tensor]:
    """Each tensor's sum over the default group, the same bits in every process; one collective for all of them.

    Every process calls it, with the same shapes and one dtype. Alone, it returns the tensors as they are.
    """
    if place_of_process()[1] == 1:
        return list(values)
    together = torch.cat([x.reshape(-1) for x in values])
    dist.all_reduce(together)
    parts = torch.split(together, [x.numel() for x in values])
    return [part.view(x.shape) for part, x in zip(parts, values, strict=True)]
