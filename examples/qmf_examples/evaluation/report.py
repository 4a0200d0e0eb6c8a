"""Tables of tested runs, with the paper's figures beside: terminal, JSON, Markdown and pictures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from ..data.catalogue import DATA_SETS
from ..files import write_atomically, write_results_file
from ..training.settings import Settings
from .cells import Cell, Robustness, measure_robustness, summarise_runs
from .damaged_tests import NoisePlan
from .display import bare_table, console
from .further_sheets import MEASURES, Sheet, accuracy, area, damage_sheets, pair_sheets, signed
from .paired_difference import TEST, TIE
from .paired_tests import in_words, stand
from .paper_figures import plot_correlations, plot_gaps
from .pictures import plot_noise, plot_weights
from .published import SOURCE, Published, not_comparable
from .testing import Tested


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
            rows.append((method, *(text for cell in line for text in (accuracy(cell), _theirs(cell.published)))))
            r = stands[method, noise]
            more.append(
                (
                    method,
                    *(
                        f"{100 * cell.calibration_error:.1f} / {100 * cell.risk_coverage_area:.1f} / "
                        f"{signed(cell.correlation)}{_printed(cell.published_correlation)} / {area(cell.detection)}"
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
                f"{noise}: {MEASURES}, correlation as [the paper]'s; MultiBench robustness",
                ("method", *(f"ε = {level}" for level in levels), "relative", "effective"),
                more,
            )
        )
    return made


def _reasons(noise: str, plan: NoisePlan) -> list[str | None]:
    """By level, why the paper's figure is none to hold ours against."""
    return [not_comparable(noise, level, plan.protocol) for level in plan.levels]


def _theirs(cell: Published | None) -> str:
    if cell is None:
        return "-"
    std = "" if cell.std is None else f" ± {cell.std:.2f}"
    return f"{cell.mean:.2f}{std}" + ("" if cell.worst is None else f" ({cell.worst:.2f})")


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
    if plan.further:
        said.append("Further damages are done to half of each sample's modalities: of two, to one.")
    if len({cell.method for cell in cells}) > 1:
        said.append(f"Best and not distinguishable: {TEST}.")
    if settings.frozen:
        said.append(frozen_note(settings))
    reasons = dict.fromkeys(why for noise in plan.kinds for why in _reasons(noise, plan) if why is not None)
    said += [f"Not comparable with the paper: {why}." for why in reasons]
    flattered = sorted({record.settings.method for record in tested if record.settings.selection == "test"})
    if flattered:
        said.append(
            "Epochs were chosen on the test set (--selection test, the released RGB-D scripts' procedure), which "
            f"flatters: {', '.join(flattered)}."
        )
    if _tiny(tested):
        said.append("Tiny networks: what they learn of a sample is shown, and nothing of real data.")
    if settings.skip_bad:
        said.append("Test samples that cannot be used were skipped.")
    return said


def frozen_note(settings: Settings) -> str:
    """What differs from the paper's networks."""
    text = "" if DATA_SETS[settings.data_set].paired else f" and {Path(settings.text_encoder).name} texts"
    paper = "two ResNet-18" if DATA_SETS[settings.data_set].paired else "BERT and ResNet-152"
    hidden = f"a hidden layer of {settings.hidden}" if settings.hidden else "a linear layer"
    return (
        f"Frozen encoders ({settings.image_encoder} sees images{text}), {hidden} a modality: the paper fine-tunes "
        f"{paper}, so that its figures are of other networks; what can be compared is the order of the methods and how "
        "far each falls."
    )


def _tiny(tested: Sequence[Tested]) -> bool:
    return any("tiny" in (record.settings.image_encoder, record.settings.text_encoder) for record in tested)


def write_report(tested: Sequence[Tested], plan: NoisePlan, folder: Path) -> None:
    """Print the tables, and write results.json, results.md and the pictures."""
    cells = summarise_runs(tested)
    robustness = measure_robustness(cells)
    late, rivals = stand(tested)
    tables = [*sheets(cells, robustness, plan), *damage_sheets(cells, plan), *pair_sheets(late, rivals)]
    said = [*in_words(late, rivals), *notes(tested, cells, plan)]
    console(160).print(Group(*(_draw(sheet) for sheet in tables), *(Text(note) for note in said)))
    content: dict[str, Any] = {
        "data_set": tested[0].settings.data_set,
        "conditions": {**plan._asdict(), "damages": [condition.kind for condition in plan.further]},
        "cells": [cell.to_dict() for cell in cells],
        "robustness": [r._asdict() for r in robustness],
        "against_late": [each.to_dict() for each in late],
        "against_best_peer": [each.to_dict() for each in rivals],
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
