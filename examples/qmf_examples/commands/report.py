"""``qmf-fusion report RUN``: attach with ``app.command("report", help=HELP)(report)``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import require_extras
from .output_folder import disk_errors, prepare_output

HELP = (
    "Do dynamic weights help, at every level of damage, and does Theorem 2 say why? Are views weighed less where they "
    "err? What does each bring, and what if one is missing?\n\n"
    "RUN: the output folder of `qmf-fusion train digits`, or a .npz file of encoders' features as bench-robustness "
    "takes it, on which heads are trained first. Writes theory-TRAINING-seedN.json, the same as text, "
    "missing-TRAINING-seedN.json, and pictures."
)


def report(
    run: Annotated[Path, typer.Argument(help="The run's folder, or a file of features.", metavar="RUN")],
    training: Annotated[str, typer.Option(help="Which heads: as the checkpoints are named.")] = "qmf-paper",
    seed: Annotated[int, typer.Option(min=0, help="Of which seed.")] = 0,
    output: Annotated[
        Path | None, typer.Option(help="Folder to write to: RUN itself if not given, runs/report for a file.")
    ] = None,
) -> None:
    """Report on a run; see ``HELP``."""
    require_extras(("numpy", "sklearn", "matplotlib", "rich"))
    is_file = run.suffix == ".npz"
    folder = output or (Path("runs/report") if is_file else run)
    if is_file and not run.is_file():
        raise typer.BadParameter(f"{str(run)!r} is no file", param_hint="'RUN'")
    if not is_file and run.is_file():
        raise typer.BadParameter(f"must be a run's folder or an .npz file of features, got {run}", param_hint="'RUN'")
    if output or is_file or run.exists():  # else there is nothing to report on, which is told below, nor to create
        prepare_output(folder, "RUN" if folder == run else "--output")
    from ..comparison import missing
    from ..comparison.theory import report_file, report_run, table, write
    from ..evaluation.display import console

    reports, without = (report_file if is_file else report_run)(run, training, seed)
    shown = console(180)
    title = f"{run.stem if is_file else 'digits'}, test split, {training}, seed {seed}"
    shown.print(table(reports, f"{title}: dynamic against static fusion; r of weight and loss ('!': Eq. 6 fails)"))
    for condition, found in reports:
        shown.print(f"{condition.name}: {found.sentence}", soft_wrap=True)
    missing.show(without, shown)
    with disk_errors():
        path = write(reports, folder, training, seed)
        missing.write(without, folder, training, seed)
    shown.print(f"Wrote {path}, whole reports and pictures beside it.", soft_wrap=True)
