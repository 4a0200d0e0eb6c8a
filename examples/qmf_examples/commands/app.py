"""The subcommands and their options. The jobs themselves are imported when one runs."""

import importlib.util
import runpy
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import require_extras, resumable
from . import bench_robustness as robustness_cli
from . import bench_trainers as trainers_bench_cli
from . import data as data_cli
from . import evaluate as evaluation_cli
from . import report as report_cli
from . import train as train_cli
from .device import check_device
from .output_folder import disk_errors, prepare_output

# Some versions of Typer bring click along and others carry their own: its errors are found from the one it exports.
UsageError: Any = typer.BadParameter.__mro__[2]
Abort = typer.Abort

app = typer.Typer(
    name="qmf-fusion",
    help="Quality-aware Multimodal Fusion: weight each modality per sample by how certain it is.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train and compare fusions on a data set.", invoke_without_command=True)
app.add_typer(train, name="train")
train_cli.attach(train)
evaluation_cli.attach(app)
data_cli.attach(app)
app.command("bench-robustness", help=robustness_cli.HELP)(robustness_cli.bench_robustness)
app.command("bench-trainers", help=trainers_bench_cli.HELP)(trainers_bench_cli.bench_trainers)
app.command("report", help=report_cli.HELP)(report_cli.report)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; errors come out as exceptions, for ``cli.main`` to word."""
    given = None if arguments is None else list(arguments)
    code = app(args=given, prog_name="qmf-fusion", standalone_mode=False)
    if code == 130:  # what Typer makes of an interrupt, without a word
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _show_version(asked: bool) -> None:
    if asked:
        # The file on its own, for importing the package would import torch.
        package = importlib.util.find_spec("qmf_fusion")
        assert package is not None
        assert package.origin is not None
        version = runpy.run_path(str(Path(package.origin).with_name("version.py")))["__version__"]
        typer.echo(f"qmf-fusion {version}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    _help_without_command(context)


@train.callback()
def _train(context: typer.Context) -> None:
    _help_without_command(context)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        text = context.get_help()  # printed already, and empty, where Typer writes it with rich
        if text:
            typer.echo(text)
        raise typer.Exit


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


@train.command(
    help="Four views of scikit-learn's handwritten digits, half of them damaged at test time: who fuses best?\n\n"
    "Nothing is downloaded. Trains small heads on clean views, damages half of each test image's views with Gaussian "
    "noise, salt-and-pepper and occlusion, and compares every view alone, plain averages, QMF without and with its "
    "ranking loss (three forms), the energy of heads trained with LogitNorm, the robust rule, and an oracle."
)
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
    require_extras(("numpy", "sklearn", "matplotlib", "rich"))
    if strategy not in ("auto", "ddp"):
        raise typer.BadParameter(f"{strategy!r} must be auto or ddp", param_hint="'--strategy'")
    check_device(device)
    from ..comparison.digits import DigitsConfig
    from ..comparison.digits_report import run_and_report
    from ..processes import launched, run_in_processes

    processes = devices or launched() or 1
    config = DigitsConfig(
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
