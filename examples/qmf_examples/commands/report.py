"""``qmf-fusion report RUN``: attach with ``app.command("report", help=HELP)(report)``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import require_extras
from .output_folder import disk_errors, prepare_output

HELP = (
    "Does Theorem 2 apply to a trained run, at every level of damage? Are views weighed less where they err?\n\n"
    "RUN: the output folder of `qmf-fusion train digits`. Writes theory-TRAINING-seedN.json and pictures into it."
)


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder.", metavar="RUN")],
    training: Annotated[str, typer.Option(help="Which heads: as the checkpoints are named.")] = "qmf-paper",
    seed: Annotated[int, typer.Option(min=0, help="Of which seed.")] = 0,
) -> None:
    """Report on a run; see ``HELP``."""
    require_extras(("numpy", "sklearn", "matplotlib", "rich"))
    if run.exists():  # else there is nothing to report on, which is told below, nor to create
        prepare_output(run, "RUN")
    from ..comparison.theory import report_run, table, write
    from ..evaluation.display import console

    reports = report_run(run, training, seed)
    shown = console()
    shown.print(table(reports, f"{training}, seed {seed}: correlation of weight and loss ('!': Eq. 6 fails)"))
    for condition, found in reports:
        if found.verdict != "holds":
            shown.print(f"{condition.name}: {found.sentence}", soft_wrap=True)
    with disk_errors():
        path = write(reports, run, training, seed)
    shown.print(f"Wrote {path} and pictures beside it.", soft_wrap=True)
