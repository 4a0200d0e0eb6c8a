"""``fusion_report`` under every kind and level of damage, and what happens without some of the modalities.

For a run of the digits job, and for a file of features.
"""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.table import Table

from qmf_fusion import FusionReport, QualityAwareFusion, fusion_report
from qmf_fusion.measured import Difference

from ..corruption.conditions import CLEAN, Condition
from ..data.digits import VIEWS as DIGIT_VIEWS
from ..data.digits import load_digits
from ..data.feature_files import load_npz
from ..errors import CommandError
from ..evaluation.display import bare_table, save_figure
from ..files import write_atomically, write_results_file
from ..models.divergence import weights_not_finite
from ..models.learners import Learner, QualityAware
from ..models.methods import ROBUSTNESS, Training, digits_table
from .heads import Config, train_heads, untrained_heads
from .missing import Missing, examine
from .prepared import DIGITS, Prepared, prepare, prepare_file
from .robustness import FILES


class LevelReport(NamedTuple):
    """The report under one condition."""

    condition: Condition
    report: FusionReport


def report_run(run: Path, training: str, seed: int) -> tuple[list[LevelReport], Missing]:
    """Load the model of a run of the digits job, damage the test set as the run did, and report on every level.

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
        how = {each.name: each for each in digits_table(tuple(DIGIT_VIEWS)).trainings}[training]
        learner = untrained_heads(how, data, Config(hidden=hidden), seed)
        learner.load_state_dict(state["learner"])
    except CommandError:
        raise
    except Exception as error:  # whatever a damaged file, or one of another make, leads to
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path} is no checkpoint of the digits job: {reason}") from error
    broken = weights_not_finite(learner)
    if broken:
        raise CommandError(f"{path}: weights are not finite: {broken}; the training has diverged")
    return _report_all(learner.eval(), data, seed)


def report_file(path: Path, training: str, seed: int, epochs: int | None = None) -> tuple[list[LevelReport], Missing]:
    """Train heads on a file of features as the bench does, and report on its test split under every damage.

    Raises:
        CommandError: a file that cannot be used, or no such training; the message lists those that there are.
    """
    data = prepare_file(load_npz(path), seed)
    known: dict[str, Training] = {each.name: each for each in ROBUSTNESS.trainings}
    if training not in known:
        raise CommandError(f"there is no training {training}; there are: {', '.join(known)}")
    learner = train_heads(known[training], data, replace(FILES, epochs=epochs or FILES.epochs), seed)
    return _report_all(learner, data, seed)


def _report_all(learner: Learner, data: Prepared, seed: int) -> tuple[list[LevelReport], Missing]:
    """On the test split, against each view's mean weight on the clean training data.

    That is the static rule that Lemma 1 matches, so that Eq. 5 shows how far the damage shifts the weights.
    """
    # Heads that were trained without a layer are held against the paper's default one.
    fusion = learner.model.fusion if isinstance(learner, QualityAware) else QualityAwareFusion(tuple(data.train))
    widths = fusion.rule.feature_widths is not None
    with torch.no_grad():
        reports, given = [], None
        for views, condition in ((data.train, None), *((test.views, test.condition) for test in data.tests)):
            answer = learner(views)
            features = list(answer.features) if widths else None
            if condition is None:
                static = fusion(answer.unimodal_logits, features=features).weights.double().mean(1)
                given = static if bool((static > 0).all()) else None
                continue
            found = fusion_report(fusion, answer.unimodal_logits, data.test_labels, given, features=features)
            reports.append(LevelReport(condition, found))
    return reports, examine(learner, fusion, data, seed)


def table(reports: Sequence[LevelReport], title: str) -> Table:
    """A row per level: what is measured and recommended, each view's correlation of weight and loss, Theorem 2."""
    out = bare_table(title)
    out.add_column("damage", no_wrap=True)
    for column in ("loss,\ndynamic", "less static's", "accuracy,\ndynamic", "less static's"):
        out.add_column(column, justify="right")
    out.add_column("use")
    for m in reports[0].report.modalities if reports else []:
        out.add_column(f"r\n{m.name}", justify="right")
    for column in ("Eq. 5", "Eq. 6", "Theorem 2"):
        out.add_column(column, justify="right")
    for condition, report in reports:
        measured = report.measured
        figures = [*_cells(measured.loss, 1, 3), *_cells(measured.accuracy, 100, 1)]
        cells = [f"{m.pearson:+.2f}" + ("!" if m.eq6 == "fails" else "") for m in report.modalities]
        out.add_row(condition.name, *figures, report.recommended, *cells, report.eq5, report.eq6, report.verdict)
    return out


def _cells(measured: Difference, unit: float, digits: int) -> tuple[str, str]:
    low, high = (f"{unit * end:+.{digits}f}" for end in measured.interval)
    return f"{unit * measured.dynamic:.{digits}f}", f"{unit * measured.difference:+.{digits}f} [{low}, {high}]"


def write(reports: list[LevelReport], output: Path, training: str, seed: int) -> Path:
    """Write ``theory-TRAINING-seedN.json``, the reports as text, and pictures of the strongest level of each damage.

    Returns:
        The path of the JSON; the others lie beside it.
    """
    levels = [{"condition": c.kind, "level": c.level, **report.to_dict()} for c, report in reports]
    content = {"training": training, "seed": seed, "split": "test", "reports": levels}
    path = output / f"theory-{training}-seed{seed}.json"
    write_results_file(path, "theory", content)
    said = "\n".join(f"{condition.name}, test split\n\n{report}\n\n" for condition, report in reports)
    write_atomically(path.with_suffix(".txt"), lambda file: file.write(said.encode()))
    for condition, report in {condition.kind: each for each in reports for condition in each[:1]}.values():
        damage = condition.name if condition == CLEAN else f"{condition.name}, half of the views damaged"
        figure = report.plot(title=f"{training}, seed {seed}, test split: {damage}")
        save_figure(figure, path.with_name(f"{path.stem}-{condition.kind}.png"))
    return path
