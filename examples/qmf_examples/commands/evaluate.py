"""The command `evaluate`; ``attach(app)`` adds it to a typer app."""

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import CommandError, require_extras
from ..files import alone_in
from .device import check_device
from .features import ManyDamages
from .output_folder import disk_errors, prepare_output
from .train_sets import PACKAGES


def attach(app: typer.Typer) -> None:
    """Add the command to ``app``."""
    app.command("evaluate", cls=ManyDamages)(evaluate)


def evaluate(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Folders of runs, or folders above them.")],
    noise: Annotated[str, typer.Option(help="Corruptions, with commas: gaussian, salt-pepper.")] = (
        "gaussian,salt-pepper"
    ),
    levels: Annotated[str, typer.Option(help="Epsilons, with commas.")] = "0,5,10",
    protocol: Annotated[
        str,
        typer.Option(
            help="released-2023: the code that made the paper's tables, faults included; released-2025; clean."
        ),
    ] = "released-2023",
    damage: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KIND[:LEVEL,...] ...",
            help="Of runs on frozen encoders, to half of each sample's modalities: as in features, or conflict, "
            "another sample's.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for results.", show_default="evaluation in the first RUN")
    ] = None,
    data_root: Annotated[Path | None, typer.Option(help="The data set's folder, where it has moved.")] = None,
    noise_seed: Annotated[int, typer.Option(min=0, help="Of the corruption; the same for all runs.")] = 0,
    device: Annotated[str, typer.Option(help="Where to run: cpu, cuda, ...")] = "cpu",
    batch_size: Annotated[int, typer.Option(min=1, help="Samples at a time.")] = 64,
    workers: Annotated[int, typer.Option(min=0, help="Loader processes (clean protocol).")] = 0,
) -> None:
    """Test trained runs on clean and corrupted data, and print the paper's tables with its figures beside ours."""
    require_extras((*PACKAGES, "matplotlib"))
    kinds, epsilons = _kinds(noise), _levels(levels)
    from ..corruption.conditions import CONFLICT, named_protocol

    try:
        protocol = named_protocol(protocol)
    except ValueError as error:
        raise CommandError(f"--{error}") from error
    check_device(device)
    missing = [str(run) for run in runs if not run.is_dir()]
    if missing:
        raise CommandError(f"no folder {', '.join(missing)}")
    from ..evaluation.damaged_tests import NoisePlan
    from ..evaluation.report import write_report
    from ..evaluation.testing import evaluate_runs, find_runs

    found = find_runs(runs)
    target = output if output is not None else runs[0] / "evaluation"
    prepare_output(target)
    further = damage or []
    plan = NoisePlan(kinds, epsilons, protocol, noise_seed, _damages(further), CONFLICT.kind in further)
    with disk_errors(), alone_in(target):
        tested = evaluate_runs(found, plan, data_root, device, batch_size, workers, typer.echo)
        write_report(tested, plan, target)
    typer.echo(f"written: {target}/results.json, results.md, accuracy.png, weights.png, gaps.png, correlations.png")


def _damages(words: list[str]) -> tuple[Any, ...]:
    from ..corruption.conditions import CONFLICT
    from ..corruption.every_row import parse_damages

    try:
        return tuple(parse_damages([word for word in words if word != CONFLICT.kind]))
    except ValueError as error:
        raise CommandError(f"--damage: {error}; or {CONFLICT.kind}, another sample's") from error


def _kinds(text: str) -> tuple[str, ...]:
    from ..corruption.conditions import PAPER_KINDS

    kinds = tuple(dict.fromkeys(item.strip() for item in text.split(",")))
    strangers = [kind for kind in kinds if kind not in PAPER_KINDS]
    if strangers:
        raise CommandError(f"--noise must be of {', '.join(PAPER_KINDS)}; got {', '.join(strangers)!r}")
    return kinds


def _levels(text: str) -> tuple[float, ...]:
    try:
        levels = sorted({float(item) for item in text.split(",")})
    except ValueError as error:
        raise CommandError(f"--levels must be numbers with commas between, got {text!r}") from error
    if not all(0 <= level <= 100 for level in levels):
        raise CommandError(f"--levels must lie between 0 and 100, got {text!r}")
    return tuple(levels)
