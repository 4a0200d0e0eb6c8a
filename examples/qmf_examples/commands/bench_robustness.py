"""``qmf-fusion bench-robustness``: attach with ``app.command("bench-robustness", help=HELP)(bench_robustness)``."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from ..errors import require_extras
from ..files import alone_in
from .output_folder import disk_errors, prepare_output

HELP = (
    "Which rule fuses best when half of the views are broken? Trains the same heads for every rule on each set, and "
    "tests them clean, with noise, blanked, swapped, and under damages that no rule was designed on.\n\n"
    "DATA: .npz files of the features that encoders see of clean and damaged inputs (classes, train_y, test_y, "
    "train_<modality>_clean, test_<modality>_<damage>); multi-view .mat files with X (a cell of N x D or D x N views) "
    "and y, Y or gt; scikit-learn's digits are built in. No network."
)


def bench_robustness(
    data: Annotated[
        list[Path] | None, typer.Argument(help="Feature .npz and multi-view .mat files; none: the digits alone.")
    ] = None,
    digits: Annotated[bool, typer.Option("--digits/--no-digits", help="Whether to add the built-in digits.")] = True,
    output: Annotated[Path, typer.Option(help="Folder for robustness.json and the pictures.")] = Path(
        "runs/robustness"
    ),
    seeds: Annotated[
        int | None, typer.Option(min=1, max=1000, help="How many seeds: 3 if not given, 1 with --quick.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="The first seed; the others follow it.")] = 0,
    steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps of each training on a multi-view set: 1000 if not given, 60 with --quick."),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option(min=1, help="Epochs of each training on a feature file: 40 if not given, 2 with --quick."),
    ] = None,
    ablation: Annotated[
        bool, typer.Option("--ablation", help="In place of the rules: the recommended one without each ingredient.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="One seed of a few steps, to see that it runs.")] = False,
) -> None:
    """Run the bench; see ``HELP``."""
    require_extras(("numpy", "scipy", "sklearn", "matplotlib", "rich", "torchmetrics"))
    if not data and not digits:
        raise typer.BadParameter("there must be a .mat or .npz file, or the digits", param_hint="'DATA'")
    for path in data or []:
        if not path.is_file():
            raise typer.BadParameter(f"{str(path)!r} is no file", param_hint="'DATA'")
    prepare_output(output)
    from ..comparison.robustness import FILES, VIEWS, Settings, run_and_report
    from ..data.digits import load_digits
    from ..data.feature_files import load_npz
    from ..data.multiview import load_mat
    from ..models.methods import ABLATION, ROBUSTNESS

    sets = [load_npz(path) if path.suffix == ".npz" else load_mat(path) for path in data or []]
    sets += [load_digits()] if digits else []
    names = [each.name for each in sets]
    if len(set(names)) < len(names):
        raise typer.BadParameter(f"the sets must have names of their own, got {names}", param_hint="'DATA'")
    chosen = tuple(range(seed, seed + (seeds or (1 if quick else 3))))
    settings = Settings(
        dataclasses.replace(VIEWS, seeds=chosen, steps=steps or (60 if quick else VIEWS.steps)),
        dataclasses.replace(FILES, seeds=chosen, epochs=epochs or (2 if quick else FILES.epochs)),
    )
    with disk_errors(), alone_in(output):
        run_and_report(sets, settings, output, ABLATION if ablation else ROBUSTNESS)
