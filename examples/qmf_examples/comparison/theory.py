"""``fusion_report`` for a run of the digits job: Theorem 2's conditions at every kind and level of damage."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from qmf_fusion import FusionReport, fusion_report

from ..data.digits import VIEWS
from ..errors import CommandError
from ..files import write_atomically
from ..models.methods import TRAININGS
from .digits import build_model, prepare
from .tables import bare_table


class LevelReport(NamedTuple):
    """The report under one condition."""

    condition: str
    level: float
    report: FusionReport


def report_run(run: Path, training: str, seed: int) -> list[LevelReport]:
    """Load a run's trained model, damage the test set as the run did, and report on every level.

    The static counterpart is each view's mean weight on the clean training data: the static rule that Lemma 1 matches,
    so that Eq. 5 shows how far the damage shifts the weights.

    Raises:
        CommandError: no such checkpoint; the message lists those that are there.
    """
    folder = run / "checkpoints"
    path = folder / f"seed{seed}-{training}.pt"
    if not path.is_file():
        found = sorted(p.stem for p in folder.glob("seed*-*.pt")) if folder.is_dir() else []
        raise CommandError(
            f"{run} holds no checkpoint of {training} with seed {seed}; it holds: {', '.join(found) or 'none'}"
        )
    try:
        state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        hidden = int(json.loads(state["made_with"]["hidden"]))
        data = prepare(seed, torch.device("cpu"))
        how = next(each for each in TRAININGS if each.name == training)
        model = build_model({view: x.shape[1] for view, x in data.train.items()}, hidden, seed, how)
        model.load_state_dict(state["model"])
    except (KeyError, ValueError, RuntimeError, EOFError) as error:
        raise CommandError(f"{path} is no checkpoint of the digits job: {str(error).splitlines()[0]}") from error
    model.eval()
    with torch.no_grad():
        static = model(data.train).weights.double().mean(1)
        reports = []
        for condition in data.conditions:
            logits = model(condition.features).unimodal_logits
            given = static if bool((static > 0).all()) else None
            report = fusion_report(model.fusion, logits, data.test_labels, given)
            reports.append(LevelReport(condition.name, condition.level, report))
    return reports


def table(reports: list[LevelReport], title: str) -> Table:
    """A row per level: each view's correlation of weight and loss, both verdicts, and the bound."""
    out = bare_table(title)
    out.add_column("damage", no_wrap=True)
    for view in VIEWS:
        out.add_column(f"r\n{view}", justify="right")
    for column in ("Eq. 5", "Eq. 6", "bound", "static"):
        out.add_column(column, justify="right")
    for condition, level, report in reports:
        cells = [f"{m.pearson:+.2f}" + ("!" if m.eq6 == "fails" else "") for m in report.modalities]
        name = condition if condition == "clean" else f"{condition} {level:g}"
        out.add_row(name, *cells, report.eq5, report.eq6, f"{report.bound:.2f}", f"{report.bound_static:.2f}")
    return out


def write(reports: list[LevelReport], output: Path, training: str, seed: int) -> Path:
    """Write ``theory-TRAINING-seedN.json``, and a picture for the clean data and the strongest level of each damage.

    Returns:
        The path of the JSON; the pictures lie beside it.
    """
    levels = [{"condition": c, "level": level, **report.to_dict()} for c, level, report in reports]
    text = json.dumps({"training": training, "seed": seed, "reports": levels}, indent=1) + "\n"
    path = output / f"theory-{training}-seed{seed}.json"
    write_atomically(path, lambda file: file.write(text.encode()))
    strongest = {condition: report for condition, _, report in reports}
    for condition, report in strongest.items():
        figure = report.plot()
        figure.suptitle(f"{training}, seed {seed}: {condition}")
        target = path.with_name(f"{path.stem}-{condition}.png")
        write_atomically(target, lambda file, f=figure: f.savefig(file, format="png", dpi=80))  # type: ignore[misc]
    return path
