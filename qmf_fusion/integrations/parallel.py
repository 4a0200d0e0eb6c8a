"""Data parallel: keeping each process's loss history its own, where the criterion must be inside."""

from typing import TypeVar

from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..trajectory import LossTrajectory

M = TypeVar("M", bound=nn.Module)


def leave_history_out(module: M) -> M:
    """Let ``DistributedDataParallel(module)`` not copy the first process's loss history over the others'.

    To be called before it is wrapped; everything else is copied as ever.

    Example:
        >>> from qmf_fusion import QMFLoss, QualityAwareFusion
        >>> both = nn.ModuleDict({"fusion": QualityAwareFusion(2)})
        >>> both["criterion"] = QMFLoss(both["fusion"], num_samples=100)
        >>> parallel = leave_history_out(both)  # then DistributedDataParallel(both)
    """
    own = [
        f"{name}.{buffer}" if name else buffer
        for name, part in module.named_modules()
        if isinstance(part, LossTrajectory)
        for buffer, _ in part.named_buffers()
    ]
    before = getattr(module, "_ddp_params_and_buffers_to_ignore", [])
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(module, [*before, *own])
    return module
