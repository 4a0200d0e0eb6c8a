"""The robustness bench's picture: accuracy, and the correlation of weight and loss, by condition.

A run's file is enough to draw it again: ``python -m qmf_examples.comparison.robustness_plot FILE TABLE PICTURE``.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import CommandError
from ..evaluation.display import legend_below, new_figure, put_title, save_figure, tidy
from ..evaluation.styles import style_of
from ..models.methods import RECOMMENDED
from .figures import Line

SHOWN = (
    "mean of logits",
    "mean of probabilities",
    "TMC",
    "RCML",
    "QMF, released",
    "energy of LogitNorm",
    RECOMMENDED,
    "oracle: clean views only",
)


def plot(path: Path, lines: Sequence[Line], title: str) -> None:
    """Accuracy (top) and the correlation of weight and loss (bottom) by condition, a PNG."""
    figure = new_figure(5.8)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    for axis in (top, bottom):
        tidy(axis)
    by_rule = {line.rule: line for line in lines}
    # Conditions are names in no order of strength across kinds, at places of their own.
    places = range(len(lines[0].conditions))
    # Of an ablation, whose rules have no place among those, all.
    shown = SHOWN if by_rule.keys() >= set(SHOWN) else tuple(by_rule)
    for name in shown:
        line, style = by_rule[name], style_of(name).options()
        top.plot(places, list(line.conditions.values()), **style)
        if not name.startswith("oracle") and any(value is not None for value in line.correlations.values()):
            bottom.plot(places, [v if v is not None else float("nan") for v in line.correlations.values()], **style)
    bottom.axhline(0, color="black", linewidth=0.8)
    top.set_ylabel("test accuracy (%)")
    bottom.set_ylabel("r(weight, loss)")
    bottom.set_xticks(places, list(lines[0].conditions), rotation=30, ha="right")
    put_title(figure, title)
    legend_below(figure, {name: style_of(name).options() for name in shown})
    save_figure(figure, path)


def redraw(file: Path, table: str, picture: Path) -> None:
    """Draw the picture of a table of a run's ``robustness.json``.

    Raises:
        CommandError: it has no such table, or is no such file.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        tables = content["tables"]
        if table not in tables:
            raise CommandError(f"{file} has no table {table!r}; it has {', '.join(tables)}")
        lines, title = [Line.from_dict(line) for line in tables[table]], content["pictures"][table]["title"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CommandError(f"{file} is no robustness.json of this version: {type(error).__name__}: {error}") from error
    plot(picture, lines, title)


def main(arguments: Sequence[str] | None = None) -> None:
    """Redraw; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.comparison.robustness_plot", description=__doc__)
    parser.add_argument("file", type=Path, help="robustness.json of a run")
    parser.add_argument("table", help="which of its tables, such as features")
    parser.add_argument("picture", type=Path, help="the PNG to write")
    options = parser.parse_args(arguments)
    try:
        redraw(options.file, options.table, options.picture)
    except CommandError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
