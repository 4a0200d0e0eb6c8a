"""The robustness bench's tables, picture and JSON, and the run that makes them."""

import json
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.table import Table

from ..corruption.conditions import CLEAN, FEATURES
from ..data.multiview import MultiView
from ..evaluation.display import COLORS, MARKERS, bare_table, console, legend_below, new_figure, save_figure
from ..evaluation.statistics import mean_or_none
from ..files import write_atomically
from ..models.methods import ROBUSTNESS as TABLE
from .compare import compare
from .heads import Config
from .prepared import ROBUSTNESS as PROTOCOL
from .progress import progress_bars
from .results import Score

DEFAULTS = Config(seeds=(0, 1, 2), epochs=None, steps=1000, hidden=128, learning_rate=1e-3, weight_decay=1e-4)
METHODS = TABLE.methods
SHOWN = (
    "mean of logits",
    "mean of probabilities",
    "TMC",
    "QMF, released",
    "energy of LogitNorm",
    "robust",
    "oracle: clean views only",
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
    conditions = list(dict.fromkeys(score.under.name for _, score in scores))
    seeds = sorted({score.seed for _, score in scores})

    def mean(rule: str, **which: Any) -> float:
        return 100 * statistics.fmean(
            score.accuracy
            for name, score in scores
            if score.method == rule
            and which.get("set", name) == name
            and which.get("condition", score.under.name) == score.under.name
            and which.get("seed", score.seed) == score.seed
        )

    by_condition = {rule.label: {c: mean(rule.label, condition=c) for c in conditions} for rule in METHODS}
    best = {c: max(by_condition[rule.label][c] for rule in METHODS if rule.role != "oracle") for c in conditions}
    lines = []
    for rule in METHODS:
        gaps = {c: best[c] - by_condition[rule.label][c] for c in conditions}
        largest = max(gaps, key=lambda c: gaps[c])
        correlations = {
            c: mean_or_none([s.correlation for _, s in scores if s.method == rule.label and s.under.name == c])
            for c in conditions
        }
        lines.append(
            Line(
                rule.label,
                mean(rule.label),
                min(mean(rule.label, seed=seed) for seed in seeds),
                gaps[largest],
                largest,
                by_condition[rule.label],
                {name: mean(rule.label, set=name) for name in results},
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
    for line, method in zip(lines, METHODS, strict=True):
        # What an oracle is told is no weighing.
        if method.role != "oracle" and any(value is not None for value in line.correlations.values()):
            table.add_row(line.rule, *("-" if v is None else f"{v:+.2f}" for v in line.correlations.values()))
    return table


def plot(path: Path, lines: Sequence[Line], title: str) -> None:
    """Accuracy (top) and the correlation of weight and loss (bottom) by condition, a PNG."""
    figure = new_figure(7.5, 6.5)
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
        if not told and any(value is not None for value in line.correlations.values()):
            bottom.plot(conditions, [v if v is not None else float("nan") for v in line.correlations.values()], **style)
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("test accuracy (%)")
    bottom.set_ylabel("r(weight, loss)")
    bottom.tick_params(axis="x", labelrotation=30)
    for axis in (top, bottom):
        axis.grid(alpha=0.3)
    figure.suptitle(title)
    legend_below(figure, top, 2)
    save_figure(figure, path, 80)


def split_by_damage(scores: dict[str, list[Score]]) -> dict[str, list[Score]]:
    """By set, its scores under its features' conditions; then by set with images, those under its images'."""
    tables = {name: [s for s in every if s.under in FEATURES] for name, every in scores.items()}
    for name, every in scores.items():
        images = [s for s in every if s.under == CLEAN or s.under not in FEATURES]
        if any(s.under != CLEAN for s in images):
            tables[f"{name} (images)"] = images
    return tables


def run(sets: Sequence[MultiView], config: Config, **options: Any) -> dict[str, list[Score]]:
    """The whole bench, by set; see ``compare``."""
    return {data.name: compare(data, TABLE, PROTOCOL, config, **options) for data in sets}


def run_and_report(sets: Sequence[MultiView], config: Config, output: Path) -> dict[str, list[Line]]:
    """Run, write ``robustness.json`` and PNGs to the folder, print the tables; by table's name, its lines."""
    with progress_bars(len(sets) * len(config.seeds) * len(TABLE.trainings)) as progress:
        results = split_by_damage(run(sets, config, progress=progress))
    features = {data.name: results[data.name] for data in sets}
    tables = {"features": tabulate(features)}
    tables |= {name: tabulate({name: scores}) for name, scores in results.items() if name not in features}
    content = {
        "config": config.describe(),
        "sets": [
            {"name": s.name, "samples": len(s.labels), "views": [v.shape[1] for v in s.views.values()]} for s in sets
        ],
        "tables": {name: [line._asdict() for line in lines] for name, lines in tables.items()},
        "scores": {name: [score._asdict() for score in scores] for name, scores in results.items()},
    }
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(output / "robustness.json", lambda file: file.write(text.encode()))
    shown = console(180)
    count = f"{len(config.seeds)} seed{'s' if len(config.seeds) > 1 else ''}"
    for name, lines in tables.items():
        what = f"{len(sets)} set{'s' if len(sets) > 1 else ''}" if name == "features" else name
        stem = "robustness" if name == "features" else "robustness-images"
        plot(output / f"{stem}.png", lines, f"{what}, half of the views corrupted, {count}")
        shown.print(accuracy_table(lines, f"Accuracy in %: {what}, {count}, {config.steps} steps"))
        if len(lines[0].sets) > 1:
            shown.print(sets_table(lines, "Accuracy in %: mean over conditions and seeds, by set"))
        shown.print(correlation_table(lines, f"Correlation of weight and loss (Eq. 6 wants 0 or less): {what}"))
    shown.print(
        "Half of each sample's views are corrupted. 'worst seed': its mean. 'shortfall': the largest gap to the best "
        "rule of a condition, oracle aside.\n"
        f"Wrote {output / 'robustness.json'} and pictures beside it.",
        soft_wrap=True,
    )
    return tables
