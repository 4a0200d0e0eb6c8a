"""``qmf-fusion train digits``: attach with ``train.command("digits", help=HELP)(digits)``."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import require_extras, resumable
from .device import check_device
from .output_folder import disk_errors, prepare_output

HELP = (
    "Four views of scikit-learn's handwritten digits, half of them damaged at test time: who fuses best?\n\n"
    "Nothing is downloaded. Trains small heads on clean views, damages half of each test image's views with Gaussian "
    "noise, salt-and-pepper and occlusion, and compares every view alone, plain averages, QMF without and with its "
    "ranking loss (three forms), the energy of heads trained with LogitNorm, the robust rule, and an oracle."
)


def check_devices(number: int, device: str, batch_size: int) -> None:
    """Whether ``number`` processes can share out batches here.

    Raises:
        typer.BadParameter: they cannot.
    """
    from ..processes import launched, most_devices

    there = launched()
    if there not in (None, number):
        problem = f"torchrun has started {there} processes"
    elif number == 1:
        return
    elif device not in ("cpu", "cuda"):
        problem = f"several processes need --device cpu or cuda, not {device}"
    elif number > (most := most_devices(device)) and there is None:
        problem = f"there are {most} here"
    elif batch_size % number:
        problem = f"it must divide the batch of {batch_size}, which the processes share out"
    else:
        return
    raise typer.BadParameter(f"{number}: {problem}", param_hint="'--devices'")


def digits(
    output: Annotated[Path, typer.Option(help="Folder for results.json, accuracy.png and checkpoints/.")] = Path(
        "runs/digits"
    ),
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How many seeds: 5 if not given, 2 with --quick.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="The first seed; the others follow it.")] = 0,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="Epochs of each training: 40 if not given, 4 with --quick.")
    ] = None,
    device: Annotated[str, typer.Option(help="Where to train: cpu, cuda, cuda:1, mps, ...")] = "cpu",
    devices: Annotated[
        int | None,
        typer.Option(
            min=1, help="Processes that share out every batch: 1 if not given, or as many as torchrun starts."
        ),
    ] = None,
    strategy: Annotated[
        str, typer.Option(help="How they train together: ddp, or auto for that where needed.")
    ] = "auto",
    quick: Annotated[bool, typer.Option("--quick", help="Two seeds of a few epochs, in seconds.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on from the checkpoints of a run that was killed.")
    ] = False,
) -> None:
    """Run the job; see ``HELP``."""
    require_extras(("numpy", "sklearn", "matplotlib", "rich", "torchmetrics"))
    if strategy not in ("auto", "ddp"):
        raise typer.BadParameter(f"{strategy!r} must be auto or ddp", param_hint="'--strategy'")
    check_device(device)
    from ..comparison.digits import run_and_report
    from ..comparison.heads import Config
    from ..processes import launched, run_in_processes

    processes = devices or launched() or 1
    config = Config(
        seeds=tuple(range(seed, seed + (seeds or (2 if quick else 5)))),
        epochs=epochs or (4 if quick else 40),
        device=device,
        devices=processes,
    )
    check_devices(processes, device, config.batch_size)
    prepare_output(output)
    with disk_errors(), resumable("run it again with --resume to go on"):
        if processes == 1:
            run_and_report(config, output, resume)
        else:
            run_in_processes(processes, device, run_and_report, config, output, resume)
