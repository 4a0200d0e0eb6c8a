"""``qmf-fusion bench-trainers``: attach with ``app.command("bench-trainers", help=HELP)(bench_trainers)``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ..errors import require_extras
from .data import Name
from .device import check_device
from .output_folder import disk_errors, prepare_output
from .train_sets import PACKAGES

HELP = (
    "How fast are the trainers? Image files per second on one core against plain torchvision on the same files, and "
    "the share of a training step that fusion and its objective take.\n\n"
    "SET: nyud2, sunrgbd, food101, mvsa; all four if none is given. Networks and batches are the released ones, with "
    "random weights. No network."
)


class Part(StrEnum):
    """What can be measured."""

    loading = "loading"
    step = "step"


def bench_trainers(
    sets: Annotated[list[Name] | None, typer.Argument(metavar="[SET]...", help="The data sets.")] = None,
    data_root: Annotated[
        Path | None, typer.Option(help="The folder of the one SET. (default: a sample, written and removed)")
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for results.json.")] = Path("runs/bench-trainers"),
    only: Annotated[Part | None, typer.Option(help="Measure that alone.")] = None,
    sample_size: Annotated[
        int | None,
        typer.Option(min=16, max=4096, help="Pixels to each side of a sample's images: 256, 64 with --quick."),
    ] = None,
    device: Annotated[str, typer.Option(help="Where training steps run: cpu, cuda, ...")] = "cpu",
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Of a training step; the released if not given.")
    ] = None,
    tokens: Annotated[int, typer.Option(min=1, max=512, help="Of each text in a training step.")] = 32,
    repeats: Annotated[
        int | None, typer.Option(min=1, help="Passes and steps that medians are of: 7, 2 with --quick.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="Tiny networks and images, to see that it runs.")] = False,
) -> None:
    """Run the benchmark; see ``HELP``."""
    require_extras(PACKAGES)
    names = tuple(dict.fromkeys(name.value for name in sets or Name))
    if data_root is not None and len(names) != 1:
        raise typer.BadParameter("takes one SET, whose folder it is", param_hint="'--data-root'")
    check_device(device)
    prepare_output(output)
    from ..benchmarks.trainers import PARTS, Bench, run_and_report

    bench = Bench(
        names,
        PARTS if only is None else (only.value,),
        data_root,
        sample_size or (64 if quick else 256),
        device,
        repeats or (2 if quick else 7),
        batch_size,
        min(tokens, 48) if quick else tokens,
        quick,
    )
    with disk_errors():
        run_and_report(bench, output)
