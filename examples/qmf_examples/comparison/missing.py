"""What a run's fusion says without some of its modalities: how good it is, what each brings, whether its sets cover."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from qmf_fusion import QualityAwareFusion
from qmf_fusion.conformal import ConformalSets
from qmf_fusion.importance import shapley_importance
from qmf_fusion.importance_intervals import ShapleyIntervals
from qmf_fusion.missing import MissingReport, missing_report
from qmf_fusion.selection import MOST, Selection, select_modalities
from qmf_fusion.subsets import EXACT

from ..evaluation.display import bare_table, save_figure
from ..files import write_atomically
from ..models.learners import Answer, Learner
from .prepared import Prepared

COVERAGE = 0.9
TOLERANCE = 0.05
"""How much accuracy a smaller set of modalities may lose, to be selected."""
HALVES = 20
"""How often the test split is parted at random: one half calibrates, the other is covered or not."""


class Covered(NamedTuple):
    """Prediction sets under one condition and pattern of modalities, means over halves."""

    condition: str
    modalities: tuple[str, ...]
    coverage: float
    size: float
    """Classes in a set."""


class Interval(NamedTuple):
    """Conformal Shapley intervals of one modality, in nats of log-loss saved, means over halves."""

    modality: str
    coverage: float
    width: float
    helps: float
    """The share of samples whose interval lies above 0: there it helps, whatever their class."""


class Missing(NamedTuple):
    """What ``examine`` found."""

    report: MissingReport
    selection: Selection | None
    """None for more modalities than can be compared."""
    intervals: list[Interval]
    sets: list[Covered]

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {
            "report": self.report.to_dict(),
            "selection": None if self.selection is None else self.selection.to_dict(),
            "intervals": [each._asdict() for each in self.intervals],
            "sets": [each._asdict() for each in self.sets],
        }


@torch.no_grad()
def examine(learner: Learner, fusion: QualityAwareFusion, data: Prepared, seed: int) -> Missing:
    """On the clean test split; prediction sets under every damage as well, calibrated on clean rows.

    The classes' shares in the training data are what is known without any modality; ``seed`` is of the halves.
    """
    labels = data.test_labels
    prior = torch.bincount(data.train_labels, minlength=data.num_classes).clamp(min=1)
    answers = {test.condition.name: learner(test.views) for test in data.tests}
    clean = next(iter(answers.values()))
    logits, features = clean.unimodal_logits, _features(fusion, clean)
    report = missing_report(fusion, logits, labels, features=features, prior=prior)
    selection, intervals, sets = None, [], []
    if fusion.num_modalities <= MOST:
        selection = select_modalities(fusion, logits, labels, TOLERANCE, features=features, prior=prior)
    if fusion.num_modalities <= EXACT:
        intervals = _intervals(fusion, clean, labels, prior, seed)
        sets = _sets(fusion, answers, labels, prior, seed)
    return Missing(report, selection, intervals, sets)


def _features(fusion: QualityAwareFusion, answer: Answer, rows: Tensor | None = None) -> list[Tensor] | None:
    if fusion.rule.feature_widths is None or answer.features is None:
        return None
    return [f if rows is None else f[rows] for f in answer.features]


def _halves(num: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(HALVES):
        order = torch.randperm(num, generator=generator)
        yield order[: num // 2], order[num // 2 :]


def _intervals(fusion: QualityAwareFusion, clean: Answer, labels: Tensor, prior: Tensor, seed: int) -> list[Interval]:
    features = _features(fusion, clean)
    truth = shapley_importance(fusion, clean.unimodal_logits, labels, features=features, prior=prior).samples
    found = []
    for old, new in _halves(len(labels), seed):
        logits = [[x[rows] for x in clean.unimodal_logits] for rows in (old, new)]
        intervals = ShapleyIntervals(fusion, COVERAGE, prior=prior)
        intervals.calibrate(logits[0], labels[old], features=_features(fusion, clean, old))
        low, high, _ = intervals(logits[1], features=_features(fusion, clean, new))
        inside = (low <= truth[:, new]) & (truth[:, new] <= high)
        found.append(torch.stack([inside.double().mean(1), (high - low).mean(1), (low > 0).double().mean(1)], 1))
    means = torch.stack(found).mean(0).tolist()
    return [Interval(name, *mean) for name, mean in zip(fusion.names, means, strict=True)]


def _sets(
    fusion: QualityAwareFusion, answers: dict[str, Answer], labels: Tensor, prior: Tensor, seed: int
) -> list[Covered]:
    clean = next(iter(answers.values()))
    found: dict[tuple[str, tuple[str, ...]], list[Tensor]] = {}
    patterns = _patterns(fusion.num_modalities)
    for old, new in _halves(len(labels), seed):
        sets = ConformalSets(fusion, COVERAGE, prior)
        sets.calibrate([x[old] for x in clean.unimodal_logits], labels[old], features=_features(fusion, clean, old))
        for condition, answer in answers.items():
            logits, features = [x[new] for x in answer.unimodal_logits], _features(fusion, answer, new)
            for pattern in patterns:
                held = sets(logits, present=pattern, features=features)
                inside = held[torch.arange(len(new)), labels[new]]
                names = tuple(n for n, there in zip(fusion.names, pattern.tolist(), strict=True) if there)
                figures = torch.stack([inside.double().mean(), held.sum(1).double().mean()])
                found.setdefault((condition, names), []).append(figures)
    return [Covered(*key, *torch.stack(every).mean(0).tolist()) for key, every in found.items()]


def _patterns(num: int) -> Tensor:
    """All, all but one, each alone, each pattern once: bool ``[P, M]``."""
    alone = torch.eye(num, dtype=torch.bool)
    rows = [torch.ones(num, dtype=torch.bool), *~alone, *alone]
    return torch.tensor([list(row) for row in dict.fromkeys(tuple(r.tolist()) for r in rows) if any(row)])


def show(found: Missing, shown: Console) -> None:
    """Print the report, what is selected, and how intervals and sets cover."""
    shown.print(str(found.report), soft_wrap=True, markup=False)
    if found.selection is not None:
        shown.print(f"\nWhich modalities do you need? {found.selection}\n", soft_wrap=True, markup=False)
    if found.intervals:
        shown.print(_intervals_table(found))
        shown.print(_sets_table(found))


def _intervals_table(found: Missing) -> Table:
    """What is known of a modality's share before the class is."""
    out = bare_table(f"Conformal Shapley intervals at {100 * COVERAGE:g} %, nats of log-loss saved on a new sample")
    for column in ("modality", "holds the value in %", "mean width", "above 0 in %"):
        out.add_column(column, justify="left" if column == "modality" else "right")
    for each in found.intervals:
        out.add_row(each.modality, f"{100 * each.coverage:.1f}", f"{each.width:.2f}", f"{100 * each.helps:.1f}")
    return out


def _sets_table(found: Missing) -> Table:
    """Coverage and size of the sets: a row for each condition, a column for each pattern."""
    out = bare_table(
        f"Prediction sets of {100 * COVERAGE:g} % coverage, calibrated on clean rows: true class in the set in % "
        "(classes in a set), by what is there"
    )
    out.add_column("damage", no_wrap=True)
    rows: dict[str, dict[str, str]] = {}
    for each in found.sets:
        cell = f"{100 * each.coverage:.1f} ({each.size:.2f})"
        rows.setdefault(each.condition, {})[" + ".join(each.modalities)] = cell
    for pattern in next(iter(rows.values()), {}):
        out.add_column(pattern, justify="right")
    for condition, cells in rows.items():
        out.add_row(condition, *cells.values())
    return out


def write(found: Missing, output: Path, training: str, seed: int) -> Path:
    """Write ``missing-TRAINING-seedN.json`` and the picture beside it; the path of the JSON."""
    path = output / f"missing-{training}-seed{seed}.json"
    content = {"training": training, "seed": seed, "split": "test", **found.to_dict()}
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
    figure = found.report.plot()
    figure.suptitle(f"{training}, seed {seed}: the same heads, by the modalities that are there")
    save_figure(figure, path.with_suffix(".png"), 80)
    return path
