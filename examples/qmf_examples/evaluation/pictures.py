"""Accuracy against noise, and weight against loss per modality."""

from collections.abc import Sequence
from pathlib import Path

from ..data.catalogue import DATA_SETS
from .cells import Cell
from .damaged_tests import NoisePlan
from .display import accuracy_line, legend_below, new_figure, panels, put_title, save_figure, tidy, widen
from .published import not_comparable
from .styles import style_of
from .testing import Tested

POINTS = 2000
"""How many samples a panel shows at most."""
ACROSS = 4
"""How many panels of weights stand side by side where there are many methods."""


def plot_noise(path: Path, cells: Sequence[Cell], plan: NoisePlan, title: str) -> None:
    """Write a PNG: mean accuracy in %, bars of one standard deviation over seeds; the paper's means dotted.

    Args:
        path: the file.
        cells: of every method, kind of noise and level.
        plan: a panel for each kind.
        title: over the panels.
    """
    figure, axes = panels(plan.kinds, 4.2)
    methods = list(dict.fromkeys(cell.method for cell in cells))
    legend = {method: style_of(method).options() for method in methods}
    for axis, kind in zip(axes, plan.kinds, strict=True):
        for method in methods:
            line = [cell for cell in cells if (cell.method, cell.noise) == (method, kind)]
            style = style_of(method)
            accuracy_line(axis, [cell.level for cell in line], line, **style.options())
            theirs = [
                (cell.level, cell.published.mean)
                for cell in line
                if cell.published is not None and not_comparable(kind, cell.level, plan.protocol) is None
            ]
            if theirs:
                legend[f"{method}, published"] = style.published()
                axis.plot(*zip(*theirs, strict=True), **style.published())
        axis.set_xlabel("ε")
    axes[0].set_ylabel("test accuracy (%), mean ± std over seeds")
    put_title(figure, title)
    legend_below(figure, legend)
    save_figure(figure, path)


def plot_weights(path: Path, tested: Sequence[Tested], plan: NoisePlan, title: str) -> None:
    """Write a PNG: each sample's weight against its loss, a panel for each weighting method and modality.

    Shown are the first kind of noise at its highest level, and each method's first seed. Without such a method the
    picture says so.
    """
    shown: dict[str, Tested] = {}
    for record in tested:
        if record.weights is not None and record.condition == (plan.kinds[0], plan.levels[-1]):
            shown.setdefault(record.settings.method, record)
    modalities = DATA_SETS[tested[0].settings.data_set].modalities
    beside = ACROSS // len(modalities) if len(shown) > 3 else 1
    rows = -(-max(1, len(shown)) // beside)
    figure = new_figure(0.4 + rows * (1.9 if beside > 1 else 2.4))
    if not shown:
        figure.text(0.5, 0.5, "no method among the runs weights modalities per sample", ha="center")
    else:
        axes = list(figure.subplots(rows, beside * len(modalities), squeeze=False).flat)
        for number, (method, record) in enumerate(shown.items()):
            assert record.weights is not None
            assert record.losses is not None
            for m, modality in enumerate(modalities):
                axis = axes[number * len(modalities) + m]
                style = style_of(method)
                axis.scatter(
                    record.losses[m][:POINTS], record.weights[m][:POINTS], s=5, alpha=0.5, linewidths=0, c=style.color
                )
                axis.set_title(f"{method}: {modality}", fontsize=9)
                axis.set_xlabel("loss", fontsize=8)
                axis.set_ylabel("weight" if m == 0 else "", fontsize=8)
                tidy(axis)
                widen(axis)
        for axis in axes[len(shown) * len(modalities) :]:
            axis.remove()
        put_title(figure, f"{title}: {plan.kinds[0]}, ε = {plan.levels[-1]:g}, half of the samples damaged")
    save_figure(figure, path)
