"""The paper's pictures: fusion's gap to the best single modality (Figure 1), accuracy against r (Figure 3)."""

from collections.abc import Sequence
from pathlib import Path

from ..models.methods import METHODS
from .cells import Cell
from .damaged_tests import NoisePlan
from .display import COLORS, MARKERS, legend_below, new_figure, save_figure


def plot_gaps(path: Path, cells: Sequence[Cell], plan: NoisePlan, title: str) -> None:
    """Write a PNG: by epsilon, each fusion's mean accuracy less that of the best single modality at the same epsilon.

    Below 0 a single modality had been better. Without a single modality and a fusion among the runs, the picture says
    so.
    """
    at = {(cell.method, cell.noise, cell.level): cell.mean for cell in cells}
    names = list(dict.fromkeys(cell.method for cell in cells))
    singles = [name for name in names if METHODS[name].role == "single"]
    fusions = [name for name in names if name not in singles]
    figure = new_figure(5.2 * len(plan.kinds), 5.0)
    if not singles or not fusions:
        figure.text(0.5, 0.5, "no single modality and a fusion among the runs", ha="center")
    else:
        axes = list(figure.subplots(1, len(plan.kinds), sharey=True, squeeze=False)[0])
        for axis, kind in zip(axes, plan.kinds, strict=True):
            best = [max(at[name, kind, level] for name in singles) for level in plan.levels]
            for n, name in enumerate(fusions):
                gaps = [100 * (at[name, kind, level] - b) for level, b in zip(plan.levels, best, strict=True)]
                style = {"color": COLORS[n % len(COLORS)], "marker": MARKERS[n % 7]}
                axis.plot(plan.levels, gaps, label=name, markersize=5, linewidth=1.4, **style)
            axis.axhline(0, color="black", linewidth=0.8)
            axis.set_title(kind)
            axis.set_xlabel("ε")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel(f"points above the best of {', '.join(singles)}")
        figure.suptitle(title)
        legend_below(figure, axes[0], 5)
    save_figure(figure, path, 120)


def plot_correlations(path: Path, cells: Sequence[Cell], plan: NoisePlan, title: str) -> None:
    """Write a PNG: each weighting method's mean accuracy against the correlation r of its weights and losses.

    A panel for each kind of noise, a colour for each method, a marker for each epsilon; the paper finds accuracy rising
    towards r = -1. Without such a method the picture says so.
    """
    weighted = [cell for cell in cells if cell.correlation is not None]
    names = list(dict.fromkeys(cell.method for cell in weighted))
    figure = new_figure(5.2 * len(plan.kinds), 5.0)
    if not weighted:
        figure.text(0.5, 0.5, "no method among the runs weights modalities per sample", ha="center")
    else:
        axes = list(figure.subplots(1, len(plan.kinds), sharey=True, squeeze=False)[0])
        for axis, kind in zip(axes, plan.kinds, strict=True):
            for cell in weighted:
                if cell.noise == kind:
                    n, shape = names.index(cell.method), MARKERS[plan.levels.index(cell.level) % len(MARKERS)]
                    label = f"{cell.method}, ε = {cell.level:g}"
                    axis.scatter(
                        cell.correlation, 100 * cell.mean, color=COLORS[n % len(COLORS)], marker=shape, label=label
                    )
            axis.set_title(kind)
            axis.set_xlabel("r of weight and loss")
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("test accuracy (%), mean over seeds")
        figure.suptitle(title)
        legend_below(figure, axes[0], 4)
    save_figure(figure, path, 120)
