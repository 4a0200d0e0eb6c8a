"""What the robustness bench says of each rule: means over sets, conditions and seeds, and how far it falls short."""

import statistics
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from ..evaluation.statistics import mean_or_none
from ..models.methods import Method
from .results import Score

Scores = Mapping[str, Sequence[Score]]
"""By set; all of them under the same conditions."""


class Measures(NamedTuple):
    """One rule on one set or on all of a table, means over conditions and seeds, in points (of 100)."""

    accuracy: float
    shortfall: float
    """In the condition where it is largest: the best rule's accuracy less this one's (oracle aside)."""
    shortfall_in: str
    ece: float | None
    """Expected calibration error."""
    aurc: float | None
    """Area under the risk-coverage curve: low where the errors are among the least confident answers."""
    auroc: float | None
    """How well the weights tell damaged modalities; None of rules without weights, and of the oracle, which is told."""


class Line(NamedTuple):
    """One rule in one table, in points."""

    rule: str
    all: Measures
    worst: float
    """The worst seed's mean accuracy over sets and conditions."""
    conditions: dict[str, float]
    """Accuracy, means over sets and seeds."""
    sets: dict[str, Measures]
    correlations: dict[str, float | None]
    """Of weight and loss by condition, means over views, sets and seeds; None where nothing is weighted."""

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it, the measures of all sets beside the rest."""
        rest = {**self._asdict(), "sets": {name: measures._asdict() for name, measures in self.sets.items()}}
        del rest["all"]
        return {**self.all._asdict(), **rest}


def tabulate(results: Scores, methods: Sequence[Method]) -> list[Line]:
    """One line for each method, from the scores of sets under the same conditions."""
    of_set = {name: _measure({name: scores}, methods) for name, scores in results.items()}
    over_all = _measure(results, methods)
    lines = []
    for method in methods:
        scores = [score for every in results.values() for score in every if score.method == method.label]
        seeds, conditions = {score.seed for score in scores}, _conditions(scores)
        correlations = {c: mean_or_none([s.correlation for s in scores if s.under.name == c]) for c in conditions}
        lines.append(
            Line(
                method.label,
                over_all[method.label],
                min(100 * statistics.fmean(s.accuracy for s in scores if s.seed == seed) for seed in seeds),
                _by_condition(scores),
                {name: measures[method.label] for name, measures in of_set.items()},
                correlations,
            )
        )
    return lines


def _measure(results: Scores, methods: Sequence[Method]) -> dict[str, Measures]:
    scores = {
        method.label: [score for every in results.values() for score in every if score.method == method.label]
        for method in methods
    }
    accuracy = {rule: _by_condition(of_rule) for rule, of_rule in scores.items()}
    rivals = [method.label for method in methods if method.role != "oracle"]
    best = {c: max(accuracy[rule][c] for rule in rivals) for c in accuracy[rivals[0]]}
    measures = {}
    for method in methods:
        of_rule = scores[method.label]
        gaps = {c: best[c] - value for c, value in accuracy[method.label].items()}
        largest = max(gaps, key=lambda c: gaps[c])
        measures[method.label] = Measures(
            100 * statistics.fmean(score.accuracy for score in of_rule),
            gaps[largest],
            largest,
            _points([score.ece for score in of_rule]),
            _points([score.aurc for score in of_rule]),
            None if method.role == "oracle" else _points([score.auroc for score in of_rule]),
        )
    return measures


def _points(values: Sequence[float | None]) -> float | None:
    mean = mean_or_none(values)
    return None if mean is None else 100 * mean


def _conditions(scores: Sequence[Score]) -> list[str]:
    return list(dict.fromkeys(score.under.name for score in scores))


def _by_condition(scores: Sequence[Score]) -> dict[str, float]:
    """Accuracy in points, means over sets and seeds."""
    return {
        c: 100 * statistics.fmean(score.accuracy for score in scores if score.under.name == c)
        for c in _conditions(scores)
    }
