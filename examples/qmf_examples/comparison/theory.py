"""``fusion_report`` for a run of the digits job: Theorem 2's conditions at every kind and level of damage."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from qmf_fusion import FusionReport, QualityAwareFusion, fusion_report

from ..corruption.conditions import Condition
from ..data.digits import VIEWS, load_digits
from ..errors import CommandError
from ..evaluation.display import bare_table, save_figure
from ..files import write_atomically
from ..models.divergence import weights_not_finite
from ..models.learners import QualityAware
from ..models.methods import digits_table
from .heads import untrained_heads
from .prepared import DIGITS, prepare


class LevelReport(NamedTuple):
    """The report under one condition."""

    condition: Condition
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
        data = prepare(load_digits(), DIGITS, seed)
        how = {each.name: each for each in digits_table(tuple(VIEWS)).trainings}[training]
        learner = untrained_heads(how, data, hidden, seed)
        learner.load_state_dict(state["learner"])
    except CommandError:
        raise
    except Exception as error:  # whatever a damaged file, or one of another make, leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path} is no checkpoint of the digits job: {reason}") from error
    broken = weights_not_finite(learner)
    if broken:
        raise CommandError(f"{path}: weights are not finite: {broken}; the training has diverged")
    learner.eval()
    # Heads that were trained without a layer are held against the paper's default one.
    fusion = learner.model.fusion if isinstance(learner, QualityAware) else QualityAwareFusion(tuple(VIEWS))
    with torch.no_grad():
        static = fusion(learner(data.train).unimodal_logits).weights.double().mean(1)
        given = static if bool((static > 0).all()) else None
        reports = []
        for test in data.tests:
            logits = learner(test.views).unimodal_logits
            reports.append(LevelReport(test.condition, fusion_report(fusion, logits, data.test_labels, given)))
    return reports


def table(reports: list[LevelReport], title: str) -> Table:
    """A row per level: each view's correlation of weight and loss, both verdicts, and the bound."""
    out = bare_table(title)
    out.add_column("damage", no_wrap=True)
    for view in VIEWS:
        out.add_column(f"r\n{view}", justify="right")
    for column in ("Eq. 5", "Eq. 6", "bound", "static"):
        out.add_column(column, justify="right")
    for condition, report in reports:
        cells = [f"{m.pearson:+.2f}" + ("!" if m.eq6 == "fails" else "") for m in report.modalities]
        out.add_row(condition.name, *cells, report.eq5, report.eq6, f"{report.bound:.2f}", f"{report.bound_static:.2f}")
    return out


def write(reports: list[LevelReport], output: Path, training: str, seed: int) -> Path:
    """Write ``theory-TRAINING-seedN.json``, and a picture for the clean data and the strongest level of each damage.

    Returns:
        The path of the JSON; the pictures lie beside it.
    """
    levels = [{"condition": c.kind, "level": c.level, **report.to_dict()} for c, report in reports]
    text = json.dumps({"training": training, "seed": seed, "reports": levels}, indent=1) + "\n"
    path = output / f"theory-{training}-seed{seed}.json"
    write_atomically(path, lambda file: file.write(text.encode()))
    strongest = {condition.kind: report for condition, report in reports}
    for condition, report in strongest.items():
        figure = report.plot()
        figure.suptitle(f"{training}, seed {seed}: {condition}")
        save_figure(figure, path.with_name(f"{path.stem}-{condition}.png"), 80)
    return path
