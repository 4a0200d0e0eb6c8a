"""Triton's kernels, a file per direction, each with its launcher. Imported at the first launch, so that Triton may be
absent.

``forward`` and ``backward`` walk rows of logits (``rows``, ``weights``, ``cross_entropy``); ``bookkeeping`` stands
between them, with ``ranking`` and ``history``; ``single`` is all of it in one launch. ``step`` launches what a training
step takes. ``config`` is what a kernel is compiled for, ``tiling``
how much of the logits one program takes.
"""

from .backward import fuse_backward, objective_backward
from .forward import fuse
from .memory import new_kept
from .single import scale_gradients
from .step import is_small, objective

__all__ = [
    "fuse",
    "fuse_backward",
    "is_small",
    "new_kept",
    "objective",
    "objective_backward",
    "scale_gradients",
]
