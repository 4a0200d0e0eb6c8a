"""What the robustness bench says of each rule: means over sets, conditions and seeds, and how far it falls short."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Self

from ..evaluation.paired_difference import as_fraction
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

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it, in fractions."""
        return {n: as_fraction(x) if n != "shortfall_in" else x for n, x in self._asdict().items()}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """The measures that ``to_dict`` has made this of, other entries aside."""
        found: dict[str, Any] = {}
        for name in cls._fields:
            found[name] = 100 * given[name] if isinstance(given[name], float) else given[name]
        return cls(**found)


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
        """As JSON takes it, in fractions, the measures of all sets beside the rest."""
        rest = {
            "worst": as_fraction(self.worst),
            "conditions": {name: as_fraction(value) for name, value in self.conditions.items()},
            "sets": {name: measures.to_dict() for name, measures in self.sets.items()},
            "correlations": self.correlations,
        }
        return {"rule": self.rule, **self.all.to_dict(), **rest}

    @classmethod
    def from_dict(cls, given: Mapping[str, Any]) -> Self:
        """The line that ``to_dict`` has made this of.

        Raises:
            KeyError, TypeError: it has not.
        """
        percent = {name: 100 * value for name, value in given["conditions"].items()}
        sets = {name: Measures.from_dict(measures) for name, measures in given["sets"].items()}
        own = Measures.from_dict(given)
        return cls(given["rule"], own, 100 * given["worst"], percent, sets, given["correlations"])


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
