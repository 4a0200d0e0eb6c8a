"""The job as the command runs it: progress bars, files, tables."""

from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from qmf_fusion.processes import place_of_process

from ..corruption.view_copies import CORRUPTIONS
from ..data.digits import VIEWS
from ..models.methods import TRAININGS, list_methods
from .accuracy_plot import plot_accuracy
from .digits import DigitsConfig, describe, run_digits
from .results import Row, summarise, write_results
from .tables import report, wide_console
from .verdicts import judge


def run_and_report(config: DigitsConfig, output: Path, resume: bool = False) -> list[Row]:
    """Run, write `results.json` and `accuracy.png` to the folder ``output``, and print the tables.

    Checkpoints go to ``output / "checkpoints"``; see ``run_digits`` for ``resume`` and what is raised. Of several
    processes, the first alone writes and prints.
    """
    checkpoints = output / "checkpoints"
    if place_of_process()[0]:
        run_digits(config, checkpoints, resume)
        return []
    checkpoints.mkdir(parents=True, exist_ok=True)
    methods = list_methods(tuple(VIEWS))
    with _progress() as progress:
        runs = progress.add_task("all trainings", total=len(config.seeds) * len(TRAININGS) * config.epochs)
        current = progress.add_task("", total=config.epochs, visible=False)
        finished: dict[tuple[int, str], int] = {}

        def advance(seed: int, training: str, epoch: int) -> None:
            finished[seed, training] = epoch
            progress.update(runs, completed=sum(finished.values()))
            progress.update(current, description=f"seed {seed}, {training}", completed=epoch, visible=True)

        scores = run_digits(config, checkpoints, resume, advance)
        progress.update(current, visible=False)

    rows = summarise(scores)
    verdicts = judge(rows, methods)
    write_results(output / "results.json", describe(config), rows, [verdict.sentence() for verdict in verdicts])
    units = {kind: corruption.unit for kind, corruption in CORRUPTIONS.items()}
    title = f"Digits, {len(VIEWS)} views, half of them damaged per test image ({len(config.seeds)} seeds)"
    plot_accuracy(output / "accuracy.png", rows, methods, units, title)

    console = wide_console()
    console.print(report(rows, verdicts))
    console.print(f"Wrote {output / 'results.json'} and {output / 'accuracy.png'}", soft_wrap=True)
    return rows


def _progress() -> Progress:
    # On standard error, so that the tables can be piped.
    return Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
