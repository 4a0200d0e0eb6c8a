"""Accuracy against corruption strength, one panel per kind of damage."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluation.display import COLORS, MARKERS, new_figure, save_figure
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
    figure = new_figure(4.6 * len(units), 5.6)
    axes = figure.subplots(1, len(units), sharey=True, squeeze=False)[0]
    styles = _styles(methods)
    for axis, (condition, unit) in zip(axes, units.items(), strict=True):
        for nth, method in enumerate(methods):
            points = sorted(
                (row for row in rows if row.method == method.label and row.condition in ("clean", condition)),
                key=lambda row: row.level,
            )
            # A little to the side, so that bars of methods that tie stay apart.
            nudge = (nth - len(methods) / 2) * 0.004 * points[-1].level
            axis.errorbar(
                [row.level + nudge for row in points],
                [100 * row.mean for row in points],
                [100 * (row.std or 0.0) for row in points],
                label=method.label,
                capsize=2,
                elinewidth=0.8,
                **styles[method.label],
            )
        axis.set_title(condition)
        axis.set_xlabel(f"strength: {unit}")
        axis.set_xticks(sorted({row.level for row in rows if row.condition in ("clean", condition)}))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("test accuracy (%), mean ± std over seeds")
    figure.suptitle(title)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    save_figure(figure, path, 120)


def _styles(methods: Sequence[Method]) -> dict[str, dict[str, object]]:
    styles: dict[str, dict[str, object]] = {}
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
            "markersize": 5,
            "linewidth": 1.6,
            "linestyle": line,
        }
        other += 1
    return styles
