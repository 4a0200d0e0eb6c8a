"""Progress bars of a comparison, on standard error, so that its tables can be piped."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .compare import Progress as Advance


@contextmanager
def progress_bars(trainings: int, epochs: int | None = None) -> Iterator[Advance]:
    """A bar of all trainings, and one of the training under way; calling what is given moves them on.

    Args:
        trainings: how many there are.
        epochs: of each; None counts trainings alone.
    """
    each = epochs or 1
    with Progress(
        TextColumn("{task.description:<24}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("epochs" if epochs else "trainings"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as progress:
        total = progress.add_task("all trainings", total=trainings * each)
        current = progress.add_task("", total=epochs, visible=False)
        finished: dict[tuple[str, int, str], int] = {}

        def advance(name: str, seed: int, training: str, epoch: int) -> None:
            finished[name, seed, training] = epoch if epochs else 1
            progress.update(total, completed=sum(finished.values()))
            what = f"{name}, seed {seed}, {training}"
            progress.update(current, description=what, completed=epoch, visible=epochs is not None)

        yield advance
        progress.update(current, visible=False)
