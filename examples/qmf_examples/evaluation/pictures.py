"""Accuracy against noise, and weight against loss per modality."""

from collections.abc import Sequence
from pathlib import Path

from ..data.catalogue import DATA_SETS
from ..models.methods import METHODS
from .cells import Cell
from .damaged_tests import NoisePlan
from .display import COLORS, MARKERS, accuracy_line, accuracy_panels, legend_below, new_figure, save_figure
from .published import not_comparable
from .testing import Tested

POINTS = 2000
"""How many samples a panel shows at most."""


def plot_noise(path: Path, cells: Sequence[Cell], plan: NoisePlan, title: str) -> None:
    """Write a PNG: mean accuracy in %, bars of one standard deviation over seeds; the paper's means dotted.

    Args:
        path: the file.
        cells: of every method, kind of noise and level.
        plan: a panel for each kind.
        title: over the panels.
    """
    figure, axes = accuracy_panels(plan.kinds, 5.2, 5.4)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    for axis, kind in zip(axes, plan.kinds, strict=True):
        for n, method in enumerate(methods):
            line = [cell for cell in cells if (cell.method, cell.noise) == (method, kind)]
            # Seven markers against eight colours: no two of 56 methods look alike.
            color = "#a0a0a0" if METHODS[method].role == "single" else COLORS[n % len(COLORS)]
            levels = [cell.level for cell in line]
            accuracy_line(axis, levels, line, label=method, color=color, marker=MARKERS[n % 7], linewidth=1.4)
            theirs = [
                (cell.level, cell.published.mean)
                for cell in line
                if cell.published is not None and not_comparable(kind, cell.level, plan.protocol) is None
            ]
            if theirs:
                axis.plot(*zip(*theirs, strict=True), color=color, linestyle=":", linewidth=0.9)
        axis.set_xlabel("ε")
    axes[0].set_ylabel("test accuracy (%), mean ± std over seeds; dotted: published")
    figure.suptitle(title)
    legend_below(figure, axes[0], 5)
    save_figure(figure, path, 120)


def plot_weights(path: Path, tested: Sequence[Tested], plan: NoisePlan) -> None:
    """Write a PNG: each sample's weight against its loss, a row per weighting method and a column per modality.

    Shown are the first kind of noise at its highest level, and each method's first seed. Without such a method the
    picture says so.
    """
    shown: dict[str, Tested] = {}
    for record in tested:
        if record.weights is not None and record.condition == (plan.kinds[0], plan.levels[-1]):
            shown.setdefault(record.settings.method, record)
    modalities = DATA_SETS[tested[0].settings.data_set].modalities
    figure = new_figure(4.6 * len(modalities), 3.2 * max(1, len(shown)))
    if not shown:
        figure.text(0.5, 0.5, "no method among the runs weights modalities per sample", ha="center")
    else:
        grid = figure.subplots(len(shown), len(modalities), squeeze=False)
        for axes, (method, record) in zip(grid, shown.items(), strict=True):
            assert record.weights is not None
            assert record.losses is not None
            for m, axis in enumerate(axes):
                axis.scatter(record.losses[m][:POINTS], record.weights[m][:POINTS], s=6, alpha=0.5, color=COLORS[m])
                axis.set_title(f"{method}: {modalities[m]}", fontsize=10)
                axis.set_xlabel("loss")
                axis.set_ylabel("weight")
                axis.grid(alpha=0.3)
        figure.suptitle(f"{plan.kinds[0]}, ε = {plan.levels[-1]:g}")
    save_figure(figure, path, 110)
