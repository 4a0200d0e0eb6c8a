"""Accuracy against corruption strength, one panel per kind of damage."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..evaluation.display import accuracy_line, legend_below, panels, put_title, save_figure
from ..evaluation.styles import style_of
from ..models.methods import Method
from .results import Row


def plot_accuracy(
    path: Path, rows: Sequence[Row], methods: Sequence[Method], units: Mapping[str, str], title: str
) -> None:
    """Write a PNG: mean accuracy in %, bars of one standard deviation over seeds; level 0 is the clean test set.

    Args:
        path: the file.
        rows: of every method, "clean" and each condition in ``units``.
        methods: whom to draw.
        units: by condition, what its levels measure; a panel each.
        title: over the panels.
    """
    figure, axes = panels(list(units), 4.6)
    for axis, (condition, unit) in zip(axes, units.items(), strict=True):
        for nth, method in enumerate(methods):
            points = sorted(
                (row for row in rows if row.method == method.label and row.condition in ("clean", condition)),
                key=lambda row: row.level,
            )
            # A little to the side, so that bars of methods that tie stay apart.
            nudge = (nth - len(methods) / 2) * 0.004 * points[-1].level
            levels = [row.level + nudge for row in points]
            accuracy_line(axis, levels, points, **style_of(method.label).options())
        axis.set_xlabel(textwrap.fill(f"strength: {unit}", 32), fontsize=8)
        axis.set_xticks(sorted({row.level for row in rows if row.condition in ("clean", condition)}))
    axes[0].set_ylabel("test accuracy (%), mean ± std over seeds")
    put_title(figure, title)
    legend_below(figure, {method.label: style_of(method.label).options() for method in methods})
    save_figure(figure, path)
