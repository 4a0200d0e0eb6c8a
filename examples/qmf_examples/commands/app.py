"""The subcommands and their options. The jobs themselves are imported when one runs."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from . import bench_robustness, bench_trainers, data, digits, evaluate, features, report, train_sets
from .version import package_version

# Some versions of Typer bring click along and others carry their own: its errors are found from the one it exports.
UsageError: Any = typer.BadParameter.__mro__[2]
Abort = typer.Abort

app = typer.Typer(
    name="qmf-fusion",
    help="Quality-aware Multimodal Fusion: weight each modality per sample by how certain it is.",
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
    pretty_exceptions_enable=False,
)
train = typer.Typer(help="Train and compare fusions on a data set.", invoke_without_command=True)
app.add_typer(train, name="train")
train_sets.attach(train)
train.command("digits", help=digits.HELP)(digits.digits)
evaluate.attach(app)
data.attach(app)
app.command("features", cls=features.ManyDamages, help=features.HELP)(features.features)
app.command("bench-robustness", help=bench_robustness.HELP)(bench_robustness.bench_robustness)
app.command("bench-trainers", help=bench_trainers.HELP)(bench_trainers.bench_trainers)
app.command("report", help=report.HELP)(report.report)


def run(arguments: Sequence[str] | None = None) -> int:
    """Parse and run; errors come out as exceptions, for ``cli.main`` to word."""
    given = None if arguments is None else list(arguments)
    code = app(args=given, prog_name="qmf-fusion", standalone_mode=False)
    if code == 130:  # what Typer makes of an interrupt, without a word
        raise KeyboardInterrupt
    return code if isinstance(code, int) else 0


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"qmf-fusion {package_version()}")
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
