"""The monitor's picture: what became of each modality over time."""

import importlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .alarm import TESTS, Alarm

_COLOURS = {"shift": "#0072b2", "repetition": "#d55e00", "absence": "#009e73"}


def draw(
    names: Sequence[str],
    rows: Tensor,
    values: Tensor,
    threshold: float,
    alarms: Sequence[Alarm],
    path: str | None = None,
    title: str | None = None,
) -> Any:
    """A column for each modality: P(clean) above, evidence of each test below.

    Args:
        names: M.
        rows: ``[P]``, from where on to draw.
        values: ``[P, 4, M]``: the log of each test's e-value, and P(clean).
        threshold: the log of the e-value that raises an alarm.
        alarms: marked at the row that raised them.
        path: a file to write.
        title: of the picture.
    """
    try:
        figures = importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise ImportError("plot() needs matplotlib: pip install 'qmf-fusion[examples]'") from error
    figure = figures.Figure(figsize=(max(4.5, 3.2 * len(names)), 4.2), layout="constrained")
    axes = figure.subplots(2, len(names), sharex=True, sharey="row", squeeze=False, height_ratios=(1, 2))
    unit = math.log(10)
    for m, name in enumerate(names):
        above, below = axes[0, m], axes[1, m]
        above.plot(rows, values[:, len(TESTS), m], color="black", linewidth=1)
        above.set_ylim(-0.02, 1.02)
        above.set_title(name, fontsize=10)
        for n, test in enumerate(TESTS):
            below.plot(rows, values[:, n, m] / unit, color=_COLOURS[test], linewidth=1, label=test)
        below.axhline(threshold / unit, color="black", linewidth=0.8, linestyle="--")
        for alarm in alarms:
            if alarm.modality == name:
                for each in (above, below):
                    each.axvline(alarm.raised, color=_COLOURS[alarm.test], linewidth=0.8, linestyle=":")
        below.set_xlabel("row", fontsize=9)
        for each in (above, below):
            each.tick_params(labelsize=8)
            each.grid(alpha=0.3)
    axes[0, 0].set_ylabel("P(clean)", fontsize=9)
    axes[1, 0].set_ylabel("e-value, power of 10\n(dashed: alarm)", fontsize=9)
    axes[1, 0].legend(fontsize=8)
    if title is not None:
        figure.suptitle(title, fontsize=11)
    if path is not None:
        figure.savefig(path, dpi=80)
    return figure
