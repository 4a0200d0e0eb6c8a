"""The robustness bench's picture: accuracy, and the correlation of weight and loss, by condition."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..evaluation.display import COLORS, MARKERS, legend_below, new_figure, save_figure
from ..models.methods import RECOMMENDED
from .figures import Line

SHOWN = (
    "mean of logits",
    "mean of probabilities",
    "TMC",
    "RCML",
    "QMF, released",
    "energy of LogitNorm",
    RECOMMENDED,
    "oracle: clean views only",
)


def plot(path: Path, lines: Sequence[Line], title: str) -> None:
    """Accuracy (top) and the correlation of weight and loss (bottom) by condition, a PNG."""
    figure = new_figure(7.5, 6.5)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    conditions = list(lines[0].conditions)
    by_rule = {line.rule: line for line in lines}
    # Of an ablation, whose rules have no place among those, all.
    shown = SHOWN if by_rule.keys() >= set(SHOWN) else tuple(by_rule)
    for nth, name in enumerate(shown):
        line = by_rule[name]
        told = name.startswith("oracle")
        style: dict[str, Any] = {
            "color": "black" if told else COLORS[nth % len(COLORS)],
            "marker": MARKERS[nth % len(MARKERS)],
            "linestyle": ":" if told else "-",
            "linewidth": 2.4 if name == RECOMMENDED else 1.3,
            "markersize": 5,
        }
        top.plot(conditions, list(line.conditions.values()), label=name, **style)
        if not told and any(value is not None for value in line.correlations.values()):
            bottom.plot(conditions, [v if v is not None else float("nan") for v in line.correlations.values()], **style)
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("test accuracy (%)")
    bottom.set_ylabel("r(weight, loss)")
    bottom.tick_params(axis="x", labelrotation=30)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    legend_below(figure, top, 2)
    save_figure(figure, path, 80)
