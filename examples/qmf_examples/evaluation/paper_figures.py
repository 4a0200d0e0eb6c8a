"""The paper's pictures: fusion's gap to the best single modality (Figure 1), accuracy against r (Figure 3)."""

from collections.abc import Sequence
from pathlib import Path

from ..models.methods import METHODS
from .cells import Cell
from .damaged_tests import NoisePlan
from .display import legend_below, new_figure, panels, put_title, save_figure
from .styles import style_of


def plot_gaps(path: Path, cells: Sequence[Cell], plan: NoisePlan, title: str) -> None:
    """Write a PNG: by epsilon, each fusion's mean accuracy less that of the best single modality at the same epsilon.

    Below 0 a single modality had been better. Without a single modality and a fusion among the runs, the picture says
    so.
    """
    at = {(cell.method, cell.noise, cell.level): cell.mean for cell in cells}
    names = list(dict.fromkeys(cell.method for cell in cells))
    singles = [name for name in names if METHODS[name].role == "single"]
    fusions = [name for name in names if name not in singles]
    if not singles or not fusions:
        return _say(path, "no single modality and a fusion among the runs")
    figure, axes = panels(plan.kinds, 4.0)
    for axis, kind in zip(axes, plan.kinds, strict=True):
        best = [max(at[name, kind, level] for name in singles) for level in plan.levels]
        for name in fusions:
            gaps = [100 * (at[name, kind, level] - b) for level, b in zip(plan.levels, best, strict=True)]
            axis.plot(plan.levels, gaps, **style_of(name).options())
        axis.axhline(0, color="black", linewidth=0.8)
        axis.set_xlabel("ε")
    axes[0].set_ylabel(f"points above the best of {', '.join(singles)}")
    put_title(figure, title)
    legend_below(figure, {name: style_of(name).options() for name in fusions})
    save_figure(figure, path)


def _say(path: Path, why: str) -> None:
    figure = new_figure(2.0)
    figure.text(0.5, 0.5, why, ha="center")
    save_figure(figure, path)


def plot_correlations(path: Path, cells: Sequence[Cell], plan: NoisePlan, title: str) -> None:
    """Write a PNG: each weighting method's mean accuracy against the correlation r of its weights and losses.

    A panel for each kind of noise; a method's points are joined in the order of epsilon and grow with it. The paper
    finds accuracy rising towards r = -1. Without such a method the picture says so.
    """
    weighted = [cell for cell in cells if cell.correlation is not None]
    names = list(dict.fromkeys(cell.method for cell in weighted))
    if not weighted:
        return _say(path, "no method among the runs weights modalities per sample")
    figure, axes = panels(plan.kinds, 4.0)
    for axis, kind in zip(axes, plan.kinds, strict=True):
        for name in names:
            line = sorted((c for c in weighted if (c.method, c.noise) == (name, kind)), key=lambda c: c.level)
            style = style_of(name)
            options = {**style.options(), "marker": "", "linewidth": 0.6 * style.width}
            axis.plot([c.correlation for c in line], [100 * c.mean for c in line], **options)
            for cell in line:
                size = style.size * (0.7 + 0.6 * plan.levels.index(cell.level) / max(1, len(plan.levels) - 1))
                axis.plot([cell.correlation], [100 * cell.mean], **{**style.options(), "markersize": size})
        axis.set_xlabel("r of weight and loss")
    axes[0].set_ylabel("test accuracy (%), mean over seeds")
    levels = ", ".join(f"{level:g}" for level in plan.levels)
    put_title(figure, f"{title} (ε = {levels}: the larger, the larger the marker)")
    legend_below(figure, {name: style_of(name).options() for name in names})
    save_figure(figure, path)
