"""Warnings that point at the user's line, however many of PyTorch's and our own calls lie between."""

import sys
import warnings

_INSIDE = {"qmf_fusion", "qmf_kernels", "torch", "contextlib"}


def warn_user(text: str) -> None:
    """A UserWarning of the nearest caller that is neither this package's nor PyTorch's."""
    level, frame = 2, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in _INSIDE:
        level, frame = level + 1, frame.f_back
    warnings.warn(text, UserWarning, stacklevel=level)


def warn_once(told: set[str], text: str) -> None:
    """The same, unless it is among what was ``told``, where it then is."""
    if text not in told:
        told.add(text)
        warn_user(text)
