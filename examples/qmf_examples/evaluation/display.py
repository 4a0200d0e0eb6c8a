"""What tables and pictures have in common: a console wide enough, a bare table, a figure for a page and its file."""

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..files import write_atomically

PAGE = 7.2
"""Inches between the margins of a page: no picture is wider, so that its text is printed as large as it is set."""
ROW = 3
"""As many panels stand side by side at most."""


def console(width: int = 110) -> Console:
    """Standard output; where that is no terminal, ``width`` columns."""
    shown = Console(highlight=False)
    return shown if shown.is_terminal else Console(highlight=False, width=width)


def bare_table(title: str) -> Table:
    return Table(title=Text(title), title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)


def new_figure(height: float, width: float = PAGE) -> Figure:
    """A figure of its own rather than pyplot's: no global state, no display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def panels(titles: Sequence[str], height: float, share_y: bool = True) -> tuple[Figure, list[Any]]:
    """A figure with a panel for each title, at most ``ROW`` side by side, and a row of them ``height`` inches high."""
    columns = min(ROW, len(titles))
    rows = -(-len(titles) // columns)
    figure = new_figure(height * rows)
    axes = list(figure.subplots(rows, columns, sharey=share_y, squeeze=False).flat)
    for axis in axes[len(titles) :]:
        axis.remove()
    for axis, title in zip(axes, titles, strict=False):
        axis.set_title(title, fontsize=10)
        tidy(axis)
    return figure, axes[: len(titles)]


def put_title(figure: Figure, title: str) -> None:
    figure.suptitle(textwrap.fill(title, 84), fontsize=11)


def tidy(axis: Any) -> None:
    """A grid, small ticks, and numbers written out: Matplotlib's offset of an axis is printed over its title."""
    axis.grid(alpha=0.3)
    axis.tick_params(labelsize=8)
    for scale in (axis.xaxis, axis.yaxis):
        scale.set_major_formatter(lambda value, _: f"{value:.6g}".replace("-", "\N{MINUS SIGN}"))


def accuracy_line(axis: Any, levels: Sequence[float], rows: Sequence[Any], **style: Any) -> None:
    """The rows' ``mean`` at the levels, with a bar of one ``std`` where there is one."""
    bars = [100 * (row.std or 0.0) for row in rows]
    axis.errorbar(levels, [100 * row.mean for row in rows], bars, capsize=2, elinewidth=0.8, **style)


def widen(axis: Any) -> None:
    """Show at least a thousandth of the values: what hardly varies is no cloud, and its ticks must differ."""
    low, high = axis.get_ylim()
    missing = 1e-3 * max(abs(low), abs(high)) - (high - low)
    if missing > 0:
        axis.set_ylim(low - missing / 2, high + missing / 2)


def legend_below(figure: Figure, styles: Mapping[str, Mapping[str, Any]]) -> None:
    """One legend for all panels, under them, of the lines' options by label; the figure grows by its height."""
    # In points: 58 for a handle and the space around it, about 4.7 for a letter.
    columns = max(1, min(4, int(72 * figure.get_figwidth() / (58 + 4.7 * max(map(len, styles))))))
    lines = [Line2D([], [], label=label, **style) for label, style in styles.items()]
    figure.set_figheight(figure.get_figheight() + 0.19 * -(-len(lines) // columns))
    # Handles long enough to tell dashes from dots.
    figure.legend(handles=lines, loc="outside lower center", ncols=columns, frameon=False, fontsize=8.5, handlelength=4)


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a PNG, atomically."""
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=dpi))
