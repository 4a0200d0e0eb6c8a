"""Accuracy against corruption strength, one panel per kind of damage."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..evaluation.display import COLORS, MARKERS, accuracy_line, accuracy_panels, legend_below, save_figure
from ..models.methods import Method
from .results import Row


def plot_accuracy(
    path: Path, rows: Sequence[Row], methods: Sequence[Method], units: Mapping[str, str], title: str
) -> None:
    """Write a PNG: mean accuracy in %, bars of one standard deviation over seeds; level 0 is the clean test set.

    Args:
        path: the file.
        rows: of every method, "clean" and each condition in ``units``.
        methods: how to draw whom: single views thin and grey, averages dashed, the oracle dotted.
        units: by condition, what its levels measure; a panel each.
        title: over the panels.
    """
    figure, axes = accuracy_panels(list(units), 4.6, 5.6)
    styles = _styles(methods)
    for axis, (condition, unit) in zip(axes, units.items(), strict=True):
        for nth, method in enumerate(methods):
            points = sorted(
                (row for row in rows if row.method == method.label and row.condition in ("clean", condition)),
                key=lambda row: row.level,
            )
            # A little to the side, so that bars of methods that tie stay apart.
            nudge = (nth - len(methods) / 2) * 0.004 * points[-1].level
            levels = [row.level + nudge for row in points]
            accuracy_line(axis, levels, points, label=method.label, elinewidth=0.8, **styles[method.label])
        axis.set_xlabel(f"strength: {unit}")
        axis.set_xticks(sorted({row.level for row in rows if row.condition in ("clean", condition)}))
    axes[0].set_ylabel("test accuracy (%), mean ± std over seeds")
    figure.suptitle(title)
    legend_below(figure, axes[0], 4)
    save_figure(figure, path, 120)


def _styles(methods: Sequence[Method]) -> dict[str, dict[str, Any]]:
    styles: dict[str, dict[str, Any]] = {}
    singles = other = 0
    for method in methods:
        if method.role == "single":
            lines = ("-", "--", "-.", ":")
            styles[method.label] = {"color": "#a0a0a0", "linewidth": 1.2, "linestyle": lines[singles % len(lines)]}
            singles += 1
            continue
        line = {"average": "--", "oracle": ":"}.get(method.role, "-")
        color, marker = COLORS[other % len(COLORS)], MARKERS[other % len(MARKERS)]
        styles[method.label] = {
            "color": "black" if method.role == "oracle" else color,
            "marker": marker,
            "linewidth": 1.6,
            "linestyle": line,
        }
        other += 1
    return styles
