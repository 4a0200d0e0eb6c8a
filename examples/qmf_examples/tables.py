"""The two tables on the terminal: accuracy, and the correlation of weight and loss."""

import statistics
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from .results import Row, mean_or_none, over_seeds

Grouped = dict[str, dict[str, list[Row]]]


def group_rows(rows: Sequence[Row]) -> Grouped:
    """By method, then by condition: its levels' rows."""
    grouped: Grouped = {}
    for row in rows:
        grouped.setdefault(row.method, {}).setdefault(row.condition, []).append(row)
    return grouped


def over_levels(levels: Sequence[Row]) -> tuple[float, float | None, float]:
    """Mean, standard deviation and worst over seeds of each seed's accuracy averaged over the levels."""
    return over_seeds([statistics.fmean(seed) for seed in zip(*(row.accuracies for row in levels), strict=True)])


def accuracy_table(rows: Sequence[Row]) -> Table:
    grouped = group_rows(rows)
    table = _table(f"Accuracy in %: mean ± std (worst) over {_count(rows)}", grouped)
    for method, conditions in grouped.items():
        cells = []
        for levels in conditions.values():
            mean, std, worst = over_levels(levels)
            deviation = "  - " if std is None else f"{100 * std:4.1f}"
            cells.append(f"{100 * mean:.1f} ±{deviation} ({100 * worst:.1f})")
        table.add_row(method, *cells)
    return table


def correlation_table(rows: Sequence[Row]) -> Table:
    """As the paper's Table 3; methods that weight nothing per sample are left out."""
    grouped = {
        method: conditions
        for method, conditions in group_rows(rows).items()
        if any(row.correlation is not None for levels in conditions.values() for row in levels)
    }
    table = _table("Correlation of weight and loss: -1 is best; above 0 the worse view weighs more", grouped)
    for method, conditions in grouped.items():
        means = [mean_or_none([row.correlation for row in levels]) for levels in conditions.values()]
        table.add_row(method, *("-" if mean is None else f"{mean:+.2f}" for mean in means))
    return table


def _table(title: str, grouped: Grouped) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("method")
    for condition, levels in next(iter(grouped.values()), {}).items():
        shown = ", ".join(f"{row.level:g}" for row in levels)
        table.add_column(condition if condition == "clean" else f"{condition}\n{shown}", justify="right")
    return table


def _count(rows: Sequence[Row]) -> str:
    seeds = {seed for row in rows for seed in row.seeds}
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def report(rows: Sequence[Row], verdicts: Sequence[str]) -> Group:
    """Both tables, and in words how the fusions stand against the plain averages."""
    return Group(
        accuracy_table(rows),
        Text("Damaged columns average over their levels; each level has its own row in results.json.\n", style="dim"),
        correlation_table(rows),
        Text("Against the plain averages, by mean accuracy, at every level:", style="bold"),
        *(Text(f"- {sentence}") for sentence in verdicts),
    )


def wide_console() -> Console:
    """Standard output; where that is no terminal, wide enough for the tables."""
    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=110)
