"""What tables and pictures have in common: a console wide enough, a bare table, colours, a figure and its file."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write_atomically

COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d", "#5c5c5c")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def console(width: int = 110) -> Console:
    """Standard output; where that is no terminal, ``width`` columns."""
    shown = Console(highlight=False)
    return shown if shown.is_terminal else Console(highlight=False, width=width)


def bare_table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def new_figure(width: float, height: float) -> Figure:
    """A figure of its own rather than pyplot's: no global state, no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def accuracy_panels(kinds: Sequence[str], width: float, height: float) -> tuple[Figure, list[Any]]:
    """A figure with a panel of accuracy in % for each kind of damage, side by side."""
    figure = new_figure(width * len(kinds), height)
    axes = list(figure.subplots(1, len(kinds), sharey=True, squeeze=False)[0])
    for axis, kind in zip(axes, kinds, strict=True):
        axis.set_title(kind)
        axis.grid(alpha=0.3)
    return figure, axes


def accuracy_line(axis: Any, levels: Sequence[float], rows: Sequence[Any], **style: Any) -> None:
    """The rows' ``mean`` at the levels, with a bar of one ``std`` where there is one."""
    bars = [100 * (row.std or 0.0) for row in rows]
    axis.errorbar(levels, [100 * row.mean for row in rows], bars, capsize=2, markersize=5, **style)


def legend_below(figure: Figure, axis: Any, columns: int) -> None:
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns, frameon=False)


def save_figure(figure: Figure, path: Path, dpi: int) -> None:
    """Write a PNG, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
