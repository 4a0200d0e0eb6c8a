"""The tables on the terminal: accuracy, fusions against plain averages, and the correlation of weight and loss."""

import statistics
from collections.abc import Sequence

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..evaluation.display import bare_table
from ..evaluation.paired_difference import TEST, TIE
from ..evaluation.statistics import mean_or_none, over_seeds
from .results import Row
from .verdicts import Verdict, in_words

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
    title = "Correlation of weight and loss: -1 is best; above 0, worse views weigh more"
    table = _table(title, grouped)
    for method, conditions in grouped.items():
        means = [mean_or_none([row.correlation for row in levels]) for levels in conditions.values()]
        table.add_row(method, *("-" if mean is None else f"{mean:+.2f}" for mean in means))
    return table


def verdict_tables(verdicts: Sequence[Verdict]) -> list[Table]:
    """Where the fusions lose, in words: a table for each plain average."""
    tables = []
    for average in dict.fromkeys(verdict.average for verdict in verdicts):
        against = [verdict for verdict in verdicts if verdict.average == average]
        table = bare_table(f"Against the plain {average}, in points of mean accuracy; {TIE} not distinguishable")
        table.add_column("method")
        for kind in against[0].kinds:
            table.add_column(kind, justify="right")
        table.add_column("lost", justify="right")
        for verdict in against:
            cells = [Text(in_words(x), style="red" if x.verdict == "worse" else "") for x in verdict.kinds.values()]
            table.add_row(verdict.method, *cells, f"{len(verdict.losses)} of {len(verdict.gaps)}")
        tables.append(table)
    return tables


def _table(title: str, grouped: Grouped) -> Table:
    table = bare_table(title)
    table.add_column("method")
    for condition, levels in next(iter(grouped.values()), {}).items():
        shown = ", ".join(f"{row.level:g}" for row in levels)
        table.add_column(condition if condition == "clean" else f"{condition}\n{shown}", justify="right")
    return table


def _count(rows: Sequence[Row]) -> str:
    seeds = {seed for row in rows for seed in row.seeds}
    return f"{len(seeds)} seed{'s' if len(seeds) > 1 else ''}"


def report(rows: Sequence[Row], verdicts: Sequence[Verdict]) -> Group:
    """Accuracy, how the fusions stand against the plain averages, and the correlations."""
    return Group(
        accuracy_table(rows),
        *verdict_tables(verdicts),
        correlation_table(rows),
        Text(
            f"Wins and losses: {TEST}. "
            "Columns with several levels show the mean over them; 'lost' counts levels, clean included; results.json "
            "has every level's row. All heads see clean images in training, for a fixed number of epochs; nothing is "
            "selected. Single views, plain averages and the oracle share heads trained with the sum of unimodal "
            "cross-entropies; each QMF row has heads of its own, which start from the same weights."
        ),
    )
