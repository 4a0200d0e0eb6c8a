"""Tables of tested runs, with the paper's figures beside: terminal, JSON, Markdown and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..files import write_atomically, write_results_file
from .cells import Cell, Robustness, measure_robustness, summarise_runs
from .display import bare_table, console
from .paired_difference import TEST, TIE
from .paper_figures import plot_correlations, plot_gaps
from .pictures import plot_noise, plot_weights
from .published import SOURCE, Published, not_comparable
from .testing import NoisePlan, Tested


class Sheet(NamedTuple):
    """A table, before it is drawn."""

    title: str
    header: tuple[str, ...]
    rows: list[tuple[str, ...]]


def sheets(cells: Sequence[Cell], robustness: Sequence[Robustness], plan: NoisePlan) -> list[Sheet]:
    """The tables, as text."""
    made = []
    methods = list(dict.fromkeys(cell.method for cell in cells))
    at = {(cell.method, cell.noise, cell.level): cell for cell in cells}
    stands = {(r.method, r.noise): r for r in robustness}
    for noise in plan.kinds:
        rows, more = [], []
        for method in methods:
            line = [at[method, noise, level] for level in plan.levels]
            rows.append((method, *(text for cell in line for text in (_ours(cell), _theirs(cell.published)))))
            r = stands[method, noise]
            more.append(
                (
                    method,
                    *(
                        f"{100 * cell.calibration_error:.1f} / {100 * cell.risk_coverage_area:.1f} / "
                        f"{_signed(cell.correlation)}{_printed(cell.published_correlation)}"
                        for cell in line
                    ),
                    "-" if r.relative is None else f"{100 * r.relative:.1f}",
                    "-" if r.effective is None else f"{100 * r.effective:+.1f}",
                )
            )
        levels = [f"{level:g}" for level in plan.levels]
        theirs = ["paper" if why is None else "paper, not comparable" for why in _reasons(noise, plan)]
        columns = [text for level, paper in zip(levels, theirs, strict=True) for text in (f"ε = {level}", paper)]
        title = f"{noise}: accuracy in %, mean ± std (worst) over seeds; {TIE} not distinguishable from the best"
        made.append(Sheet(title, ("method", *columns), rows))
        made.append(
            Sheet(
                f"{noise}: calibration error / area under risk-coverage, in % / correlation of weight and loss "
                "[paper]; MultiBench robustness",
                ("method", *(f"ε = {level}" for level in levels), "relative", "effective"),
                more,
            )
        )
    return made


def _reasons(noise: str, plan: NoisePlan) -> list[str | None]:
    """By level, why the paper's figure is none to hold ours against."""
    return [not_comparable(noise, level, plan.protocol) for level in plan.levels]


def _ours(cell: Cell) -> str:
    std = "-" if cell.std is None else f"{100 * cell.std:.2f}"
    mark = f" {TIE}" if cell.behind is not None and cell.behind.verdict == "tie" else ""
    return f"{100 * cell.mean:.2f} ± {std} ({100 * cell.worst:.2f}){mark}"


def _theirs(cell: Published | None) -> str:
    if cell is None:
        return "-"
    std = "" if cell.std is None else f" ± {cell.std:.2f}"
    return f"{cell.mean:.2f}{std}" + ("" if cell.worst is None else f" ({cell.worst:.2f})")


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}"


def _printed(value: float | None) -> str:
    return "" if value is None else f" [{value:.2f}]"


def notes(tested: Sequence[Tested], cells: Sequence[Cell], plan: NoisePlan) -> list[str]:
    """What a reader of the tables must know."""
    settings = tested[0].settings
    counts = {len(cell.seeds) for cell in cells}
    said = [
        f"{settings.data_set}, {'/'.join(map(str, sorted(counts)))} seed(s), protocol {plan.protocol}, noise "
        f"seed {plan.seed}; half of the samples of each modality are damaged.",
        f"Paper: {SOURCE}, Tables 5, 1, 2 (gaussian), 6 (salt-pepper) and 3 (in brackets: "
        "correlations as printed, without a sign; ours are best at -1).",
    ]
    if len({cell.method for cell in cells}) > 1:
        said.append(f"Best and not distinguishable: {TEST}.")
    reasons = dict.fromkeys(why for noise in plan.kinds for why in _reasons(noise, plan) if why is not None)
    said += [f"Not comparable with the paper: {why}." for why in reasons]
    flattered = sorted({record.settings.method for record in tested if record.settings.selection == "test"})
    if flattered:
        said.append(
            "Epochs were chosen on the test set (--selection test, the released RGB-D scripts' procedure), which "
            f"flatters: {', '.join(flattered)}."
        )
    if _tiny(tested):
        said.append("Tiny networks: these figures only show that everything runs.")
    if settings.skip_bad:
        said.append("Test samples that cannot be used were skipped.")
    return said


def _tiny(tested: Sequence[Tested]) -> bool:
    return any("tiny" in (record.settings.backbone, record.settings.text_model) for record in tested)


def write_report(tested: Sequence[Tested], plan: NoisePlan, folder: Path) -> None:
    """Print the tables, and write results.json, results.md and the pictures."""
    cells = summarise_runs(tested)
    robustness = measure_robustness(cells)
    tables, said = sheets(cells, robustness, plan), notes(tested, cells, plan)
    console(160).print(Group(*(_draw(sheet) for sheet in tables), *(Text(note) for note in said)))
    content: dict[str, Any] = {
        "data_set": tested[0].settings.data_set,
        "conditions": plan._asdict(),
        "cells": [cell.to_dict() for cell in cells],
        "robustness": [r._asdict() for r in robustness],
        "source_of_published": SOURCE,
        "notes": said,
    }
    write_results_file(folder / "results.json", "evaluation", content)
    markdown = "\n\n".join([*(_markdown(sheet) for sheet in tables), *said]) + "\n"
    write_atomically(folder / "results.md", lambda file: file.write(markdown.encode()))
    title = tested[0].settings.data_set + (", tiny networks" if _tiny(tested) else "")
    plot_noise(folder / "accuracy.png", cells, plan, title)
    plot_weights(folder / "weights.png", tested, plan, title)
    plot_gaps(folder / "gaps.png", cells, plan, title)
    plot_correlations(folder / "correlations.png", cells, plan, title)


def _draw(sheet: Sheet) -> Table:
    table = bare_table(sheet.title)
    for n, name in enumerate(sheet.header):
        table.add_column(name, justify="right" if n else "left")
    for row in sheet.rows:
        table.add_row(*(Text(value) for value in row))
    return table


def _markdown(sheet: Sheet) -> str:
    lines = [sheet.header, ("---", *("---:" for _ in sheet.header[1:])), *sheet.rows]
    return f"**{sheet.title}**\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)
