"""Arithmetic that nobody lowers: buffers that stay float64 while their module is cast, and no autocast."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Self

import torch
from torch import Tensor, nn

from qmf_kernels.eager.plain import is_exporting


def without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Computing as if there were no autocast, on every device but meta, which has none."""
    # Not by torch.amp.is_autocast_available, which torch.compile of PyTorch 2.6 does not take.
    if device.type == "meta":
        return nullcontext()
    # PyTorch 2.6 does not load a program with a region of its own for this.
    if is_exporting() and not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def widened(x: Tensor) -> Tensor:
    """A copy of its own, in float64, on the same device; in float32 where that has no more (MPS)."""
    return x.detach().to(torch.float32 if x.device.type == "mps" else torch.float64, copy=True)


class KeepsPrecision(nn.Module):
    """Moves with ``.to(device)`` but leaves its own float64 buffers alone under ``.half()``, ``.to(dtype)`` and kin.

    A history summed in float16 would stop growing, and -0.1 in bfloat16 is -0.1001. Devices without float64 (MPS)
    hold these buffers in float32.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = {name: x for name, x in self._buffers.items() if x is not None and x.dtype == torch.float64}
        for name in kept:
            self._buffers[name] = None
        super()._apply(fn, recurse)
        for name, buffer in kept.items():
            # What a cast does to a float32 stand-in says which device it moves to.
            stand_in = fn(torch.empty(0, device=buffer.device))
            device, dtype = stand_in.device, torch.float32 if stand_in.device.type == "mps" else torch.float64
            if buffer.is_meta and device.type != "meta":
                moved = torch.empty_like(buffer, device=device, dtype=dtype)
            else:
                moved = buffer.to(device=device, dtype=dtype)
            # A stand-in in shared memory was put there by Module.share_memory.
            self._buffers[name] = moved.share_memory_() if stand_in.is_cpu and stand_in.is_shared() else moved
        return self
