"""How kernels are put into a device's queue."""

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from triton import knobs

from .config import Config

INTERPRETED = knobs.runtime.interpret


def launch(kernel: Any, programs: int, warps: int, device: torch.device, *arguments: Any, config: Config) -> None:
    """Put ``programs`` programs of ``warps`` warps into the queue."""
    if INTERPRETED:
        with _asserting():
            kernel[(programs,)](*arguments, CONFIG=config)
        return
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        kernel[(programs,)](*arguments, CONFIG=config, num_warps=warps, sanitize_overflow=False, enable_fp_fusion=True)


@contextlib.contextmanager
def _asserting() -> Iterator[None]:
    """The interpreter skips device-side assertions, which the compiled kernels make, unless told to debug; and it looks
    for overflow at every sum, which they do not.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    options = builder.options
    if not options.debug:
        builder.options = dataclasses.replace(options, debug=True, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options
