"""`train digits` as the command runs it: progress bars, the comparison, files, tables."""

from pathlib import Path

from ..corruption.view_copies import CORRUPTIONS
from ..data.digits import VIEWS, load_digits
from ..evaluation.display import console
from ..files import alone_in
from ..models.methods import digits_table
from ..processes import place
from .accuracy_plot import plot_accuracy
from .compare import compare
from .heads import Config
from .prepared import DIGITS, Prepared, prepare
from .progress import progress_bars
from .results import Row, Score, summarise, write_results
from .tables import report
from .verdicts import judge

TABLE = digits_table(tuple(VIEWS))


def run_digits(config: Config, checkpoints: Path | None = None, resume: bool = False, **options: object) -> list[Score]:
    """The whole comparison; see ``compare``."""
    data = load_digits()

    def prepared(seed: int) -> Prepared:
        return prepare(data, DIGITS, seed, config.device)

    return compare(data.name, prepared, TABLE, config, checkpoints, resume, **options)  # type: ignore[arg-type]


def run_and_report(config: Config, output: Path, resume: bool = False) -> list[Row]:
    """Run, write `results.json` and `accuracy.png` to the folder ``output``, and print the tables.

    Checkpoints go to ``output / "checkpoints"``; see ``compare`` for ``resume`` and what is raised. Of several
    processes, the first alone writes and prints, and sees to it that no other command does.
    """
    checkpoints = output / "checkpoints"
    if place()[0]:
        run_digits(config, checkpoints, resume)
        return []
    with alone_in(output):
        return _run_and_report_alone(config, output, checkpoints, resume)


def _run_and_report_alone(config: Config, output: Path, checkpoints: Path, resume: bool) -> list[Row]:
    checkpoints.mkdir(parents=True, exist_ok=True)
    assert config.epochs is not None
    with progress_bars(len(config.seeds) * len(TABLE.trainings), config.epochs) as progress:
        scores = run_digits(config, checkpoints, resume, progress=progress)

    rows = summarise(scores)
    verdicts = judge(scores, TABLE.methods)
    write_results(output / "results.json", config.describe(), rows, [verdict.sentence() for verdict in verdicts])
    units = {kind: corruption.unit for kind, corruption in CORRUPTIONS.items()}
    title = f"Digits, {len(VIEWS)} views, half of them damaged per test image ({config.length}, "
    title += f"{len(config.seeds)} seed{'' if len(config.seeds) == 1 else 's'})"
    plot_accuracy(output / "accuracy.png", rows, TABLE.methods, units, title)

    shown = console()
    shown.print(report(rows, verdicts))
    shown.print(f"Wrote {output / 'results.json'} and {output / 'accuracy.png'}", soft_wrap=True)
    return rows
