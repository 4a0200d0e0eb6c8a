"""The robustness bench's tables, picture and JSON, and the run that makes them."""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from ..data.multiview import MultiView
from ..files import write_atomically
from .accuracy_plot import COLORS, MARKERS
from .results import Score, mean_or_none
from .robustness import RULES, TRAININGS, BenchConfig, list_jobs, run
from .tables import bare_table

SHOWN = (
    "mean of logits",
    "mean of probabilities",
    "TMC",
    "QMF, released ranking",
    "energy of LogitNorm, probabilities",
    "robust",
    "oracle (told what is corrupted)",
)


class Line(NamedTuple):
    """One rule in one table, in points of accuracy."""

    rule: str
    mean: float
    """Over sets, conditions and seeds."""
    worst: float
    """The worst seed's mean over sets and conditions."""
    shortfall: float
    """In the condition where it is largest: the best rule's mean over sets and seeds less this one's (oracle aside)."""
    shortfall_in: str
    conditions: dict[str, float]
    """Means over sets and seeds."""
    sets: dict[str, float]
    """Means over conditions and seeds."""
    correlations: dict[str, float | None]
    """Of weight and loss, means over views, sets and seeds; None where nothing is weighted."""


def tabulate(results: dict[str, list[Score]]) -> list[Line]:
    """One line for each rule, from the scores of sets under the same conditions."""
    scores = [(name, score) for name, every in results.items() for score in every]
    conditions = list(dict.fromkeys(score.condition for _, score in scores))
    seeds = sorted({score.seed for _, score in scores})

    def mean(rule: str, **which: Any) -> float:
        return 100 * statistics.fmean(
            score.accuracy
            for name, score in scores
            if score.method == rule
            and which.get("set", name) == name
            and which.get("condition", score.condition) == score.condition
            and which.get("seed", score.seed) == score.seed
        )

    by_condition = {rule.name: {c: mean(rule.name, condition=c) for c in conditions} for rule in RULES}
    best = {c: max(by_condition[rule.name][c] for rule in RULES if not rule.told) for c in conditions}
    lines = []
    for rule in RULES:
        gaps = {c: best[c] - by_condition[rule.name][c] for c in conditions}
        largest = max(gaps, key=lambda c: gaps[c])
        correlations = {
            c: mean_or_none([s.correlation for _, s in scores if s.method == rule.name and s.condition == c])
            for c in conditions
        }
        lines.append(
            Line(
                rule.name,
                mean(rule.name),
                min(mean(rule.name, seed=seed) for seed in seeds),
                gaps[largest],
                largest,
                by_condition[rule.name],
                {name: mean(rule.name, set=name) for name in results},
                correlations,
            )
        )
    return lines


def accuracy_table(lines: Sequence[Line], title: str) -> Table:
    table = bare_table(title)
    table.add_column("rule", no_wrap=True)
    columns = ["mean", "worst\nseed", "short-\nfall", *lines[0].conditions]
    for column in columns:
        table.add_column(_heading(column), justify="right", no_wrap=True)
    for line in lines:
        cells = [line.mean, line.worst, line.shortfall, *line.conditions.values()]
        table.add_row(line.rule, *(f"{cell:.1f}" for cell in cells))
    return table


def sets_table(lines: Sequence[Line], title: str) -> Table:
    table = bare_table(title)
    table.add_column("rule", no_wrap=True)
    for name in lines[0].sets:
        table.add_column(name, justify="right")
    for line in lines:
        table.add_row(line.rule, *(f"{value:.1f}" for value in line.sets.values()))
    return table


def _heading(name: str) -> str:
    return name.replace(" ", "\n").replace("-and-", "-and-\n")


def correlation_table(lines: Sequence[Line], title: str) -> Table:
    table = bare_table(title)
    table.add_column("rule", no_wrap=True)
    for condition in lines[0].conditions:
        table.add_column(_heading(condition), justify="right", no_wrap=True)
    for line in lines:
        if any(value is not None for value in line.correlations.values()):
            table.add_row(line.rule, *("-" if v is None else f"{v:+.2f}" for v in line.correlations.values()))
    return table


def plot(path: Path, lines: Sequence[Line], title: str) -> None:
    """Accuracy (top) and the correlation of weight and loss (bottom) by condition, a PNG."""
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    conditions = list(lines[0].conditions)
    for nth, name in enumerate(SHOWN):
        line = next(line for line in lines if line.rule == name)
        told = name.startswith("oracle")
        style: dict[str, Any] = {
            "color": "black" if told else COLORS[nth % len(COLORS)],
            "marker": MARKERS[nth % len(MARKERS)],
            "linestyle": ":" if told else "-",
            "linewidth": 2.4 if name == "robust" else 1.3,
            "markersize": 5,
        }
        top.plot(conditions, list(line.conditions.values()), label=name, **style)
        if any(value is not None for value in line.correlations.values()):
            bottom.plot(conditions, [v if v is not None else float("nan") for v in line.correlations.values()], **style)
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("test accuracy (%)")
    bottom.set_ylabel("r(weight, loss)")
    bottom.tick_params(axis="x", labelrotation=30)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    figure.legend(*top.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=80))


def run_and_report(sets: Sequence[MultiView], config: BenchConfig, output: Path) -> dict[str, list[Line]]:
    """Run, write ``robustness.json`` and PNGs to the folder, print the tables; by table's name, its lines."""
    with Progress(
        TextColumn("{task.description:<40}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("trainings"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        task = progress.add_task("", total=len(sets) * len(config.seeds) * len(TRAININGS))

        def advance(name: str, seed: int, training: str, seconds: float) -> None:
            progress.update(task, advance=1, description=f"{name}, seed {seed}, {training}: {seconds:.1f} s")

        results = run(sets, config, advance)
    images = [job.name for job in list_jobs(sets) if job.images]
    tables = {"features": tabulate({name: scores for name, scores in results.items() if name not in images})}
    tables |= {name: tabulate({name: results[name]}) for name in images}
    content = {
        "config": asdict(config),
        "sets": [{"name": s.name, "samples": len(s.labels), "views": [v.shape[1] for v in s.views]} for s in sets],
        "tables": {name: [line._asdict() for line in lines] for name, lines in tables.items()},
        "scores": {name: [score._asdict() for score in scores] for name, scores in results.items()},
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(output / "robustness.json", lambda file: file.write(text.encode()))
    console = Console(highlight=False)
    console = console if console.is_terminal else Console(highlight=False, width=180)
    count = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    for name, lines in tables.items():
        what = f"{len(sets)} set{'s' if len(sets) > 1 else ''}" if name == "features" else name
        stem = "robustness" if name == "features" else "robustness-images"
        plot(output / f"{stem}.png", lines, f"{what}, half of the views corrupted, {count}")
        console.print(accuracy_table(lines, f"Accuracy in %: {what}, {count}, {config.steps} steps"))
        if len(lines[0].sets) > 1:
            console.print(sets_table(lines, "Accuracy in %: mean over conditions and seeds, by set"))
        console.print(correlation_table(lines, f"Correlation of weight and loss (Eq. 6 wants 0 or less): {what}"))
    console.print(
        "Half of each sample's views are corrupted. 'worst seed': its mean. 'shortfall': the largest gap to the best "
        "rule of a condition, oracle aside.\n"
        f"Wrote {output / 'robustness.json'} and pictures beside it.",
        soft_wrap=True,
    )
    return tables
