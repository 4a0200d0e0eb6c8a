"""Data-parallel processes, as ``torch.distributed`` knows them: which this one is, and sums and rows of all of them."""

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


def gather_columns(x: Tensor) -> Tensor:
    """All processes' ``[*, B]`` beside each other, in the order of their ranks: ``[*, sum of B]``, the same in each.

    Every process of the default group calls it, with one dtype and the same leading shape; each B may be another.
    Alone, it returns the tensor as it is.
    """
    if place_of_process()[1] == 1:
        return x
    size = torch.tensor([x.shape[-1]], device=x.device)
    sizes = [torch.empty_like(size) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, size)
    widths = [int(each) for each in sizes]
    padded = x.new_zeros(*x.shape[:-1], max(widths))
    padded[..., : x.shape[-1]] = x
    parts = [torch.empty_like(padded) for _ in widths]
    dist.all_gather(parts, padded)
    return torch.cat([part[..., :width] for part, width in zip(parts, widths, strict=True)], -1)
