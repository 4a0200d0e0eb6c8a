"""The robustness bench on the terminal: accuracy, further measures by set, pairs, and weights against losses."""

from collections.abc import Sequence

from rich.table import Table

from ..evaluation.display import bare_table
from ..models.methods import Method
from .figures import Line
from .paired import Paired

MEASURES = {
    "accuracy": "Accuracy in %: mean over conditions and seeds, by set",
    "shortfall": "Shortfall in points: the largest gap to the best rule of a condition, oracle aside",
    "ece": "ECE in points, 15 bins",
    "aurc": "AURC in points: area under the risk-coverage curve, lower is better",
    "auroc": "AUROC of 'this modality is damaged' from the weights, in points: 50 is chance",
}


def accuracy_table(lines: Sequence[Line], title: str) -> Table:
    """Each rule's means, the measures over all sets among them, and its accuracy under each condition."""
    table = bare_table(title)
    table.add_column("rule", no_wrap=True)
    columns = ["mean", "worst\nseed", "short-\nfall", "ECE", "AURC", "AUROC", *lines[0].conditions]
    for column in columns:
        table.add_column(_heading(column), justify="right", no_wrap=True)
    for line in lines:
        means = line.all
        cells = [means.accuracy, line.worst, means.shortfall, means.ece, means.aurc, means.auroc]
        table.add_row(line.rule, *(_number(cell) for cell in (*cells, *line.conditions.values())))
    return table


def sets_table(lines: Sequence[Line], measure: str) -> Table:
    """One of ``MEASURES``, a column for each set."""
    table = bare_table(MEASURES[measure])
    table.add_column("rule", no_wrap=True)
    for name in lines[0].sets:
        table.add_column(name, justify="right")
    for line in lines:
        values = [getattr(measures, measure) for measures in line.sets.values()]
        if any(value is not None for value in values):
            table.add_row(line.rule, *(_number(value) for value in values))
    return table


def pairs_table(pairs: Sequence[Paired], title: str) -> Table:
    """A row for each other rule, a column for each set."""
    table = bare_table(title)
    table.add_column("against", no_wrap=True)
    cells: dict[str, list[str]] = {}
    for pair in pairs:
        cells.setdefault(pair.other, []).append(pair.cell())
    for name in dict.fromkeys(pair.on for pair in pairs):
        table.add_column(name, justify="right", no_wrap=True)
    for other, row in cells.items():
        table.add_row(other, *row)
    return table


def best_rival_sentence(pair: Paired) -> str:
    """What a target of so many points above the best other rule is read off from."""
    verdict = "not distinguishable" if pair.verdict == "tie" else pair.verdict
    tested = (
        f"{pair.difference.interval()}, {verdict}{', one seed: over test samples alone' if pair.seeds == 1 else ''}"
    )
    return (
        f"On {pair.on}: {pair.difference.points:+.1f} points against the best other rule, {pair.other} ({tested}); "
        f"ahead in {pair.seeds_won} of {pair.seeds} seeds, better under {pair.conditions_won} conditions, worse under "
        f"{pair.conditions_lost}."
    )


def correlation_table(lines: Sequence[Line], methods: Sequence[Method], title: str) -> Table:
    table = bare_table(title)
    table.add_column("rule", no_wrap=True)
    for condition in lines[0].conditions:
        table.add_column(_heading(condition), justify="right", no_wrap=True)
    for line, method in zip(lines, methods, strict=True):
        # What an oracle is told is no weighing.
        if method.role != "oracle" and any(value is not None for value in line.correlations.values()):
            table.add_row(line.rule, *("-" if v is None else f"{v:+.2f}" for v in line.correlations.values()))
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"


def _heading(name: str) -> str:
    return name.replace(" ", "\n").replace("-and-", "-and-\n")
