"""The picture of a benchmark: each case's times side by side, and how time grows with M."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .contenders import COPY, OURS
from .report import Outcome

HATCHES = ("", "//", "..", "xx", "\\\\", "oo", "--", "++")


def draw(outcomes: Sequence[Outcome], title: str, path: Path) -> None:
    """Write a PNG.

    Raises:
        ImportError: Matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("the picture needs Matplotlib: pip install matplotlib") from error
    compared = [outcome for outcome in outcomes if outcome.case.kind != "growth"]
    growing = [outcome for outcome in outcomes if outcome.case.kind == "growth"]
    panels = [(len(compared), _draw_bars, compared), (3, _draw_growth, growing)]
    panels = [panel for panel in panels if panel[2]]
    figure = Figure(figsize=(3 + 2 * sum(width for width, _, _ in panels), 4.5), layout="constrained")
    ratios = [max(2, width) for width, _, _ in panels]
    axes = figure.subplots(1, len(panels), width_ratios=ratios, squeeze=False)[0]
    for axis, (_, draw_panel, chosen) in zip(axes, panels, strict=True):
        draw_panel(axis, chosen)
    figure.suptitle(title, fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def _draw_bars(axis: Any, outcomes: Sequence[Outcome]) -> None:
    names = list(dict.fromkeys(name for outcome in outcomes for name in outcome.rows))
    width = 0.8 / len(names)
    for place, name in enumerate(names):
        seconds = [outcome.seconds(name) for outcome in outcomes]
        at = [i + (place - (len(names) - 1) / 2) * width for i, s in enumerate(seconds) if s is not None]
        # Hatched, for print in black and white.
        hatch, heights = HATCHES[place % len(HATCHES)], [s * 1e6 for s in seconds if s is not None]
        axis.bar(at, heights, width, label=name, hatch=hatch, edgecolor="white", linewidth=0)
    axis.set_yscale("log")
    axis.set_ylabel("microseconds per step, on the device")
    axis.set_xticks(range(len(outcomes)), [outcome.case.name for outcome in outcomes], rotation=20, fontsize="small")
    axis.legend(fontsize="x-small")


def _draw_growth(axis: Any, outcomes: Sequence[Outcome]) -> None:
    for name, line in ((OURS, "-o"), (COPY, "--s")):
        found = [(o.case.modalities, s * 1e6) for o in outcomes if (s := o.seconds(name)) is not None]
        axis.plot([m for m, _ in found], [s for _, s in found], line, label=name)
    axis.set_ylim(bottom=0)
    axis.set_xlabel("modalities")
    axis.set_ylabel("microseconds per step, on the device")
    axis.legend(fontsize="x-small")
