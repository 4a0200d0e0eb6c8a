"""One rule against every other, seed by seed: is the difference more than the seeds' luck?"""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ..models.methods import Method
from .figures import Scores
from .results import Score, summarise
from .verdicts import Verdict

LEVEL = 0.95
ALL = "all sets"


class Paired(NamedTuple):
    """A rule less another, on one set or the mean of all: mean accuracy over conditions, in points."""

    rule: str
    other: str
    on: str
    difference: float
    """The mean over seeds, each of which has the same data, order of batches and damage for both."""
    low: float | None
    """Of the interval at ``LEVEL`` by Student's t over seeds; None for a single seed."""
    high: float | None
    seeds_won: int
    seeds: int
    conditions_won: int
    conditions_lost: int
    """By means over seeds; closer than 0.05 points is neither."""

    @property
    def verdict(self) -> str:
        """``"better"`` or ``"worse"`` where the interval says so, and else ``"tie"``."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "tie"
        return "better" if self.low > 0 else "worse"

    def cell(self) -> str:
        interval = "" if self.low is None else f" [{self.low:+.1f}, {self.high:+.1f}]"
        return f"{self.difference:+.1f}{interval} {self.conditions_won}:{self.conditions_lost}"


def compare_pairs(results: Scores, rule: str, methods: Sequence[Method]) -> list[Paired]:
    """The rule against every other method, on each set and, where there are several, on their mean."""
    pairs = []
    for method in methods:
        if method.label == rule:
            continue
        of_set = {name: _differences(scores, rule, method.label) for name, scores in results.items()}
        if len(of_set) > 1:
            of_set[ALL] = [statistics.fmean(seed) for seed in zip(*of_set.values(), strict=True)]
        for name, differences in of_set.items():
            scores = [s for each, every in results.items() if name in (each, ALL) for s in every]
            verdict = _over_conditions(scores, rule, method.label)
            low, high = interval(differences)
            pairs.append(
                Paired(
                    rule,
                    method.label,
                    name,
                    statistics.fmean(differences),
                    low,
                    high,
                    sum(d > 0 for d in differences),
                    len(differences),
                    len(verdict.wins),
                    len(verdict.losses),
                )
            )
    return pairs


def best_rivals(pairs: Sequence[Paired], methods: Sequence[Method]) -> list[Paired]:
    """On each set, the pair with the best other rule: neither an oracle nor a variant of the rule itself."""
    rivals = {method.label for method in methods if method.role not in ("oracle", "variant")}
    best: dict[str, Paired] = {}
    for pair in pairs:
        if pair.other in rivals and (pair.on not in best or pair.difference < best[pair.on].difference):
            best[pair.on] = pair
    return list(best.values())


def interval(values: Sequence[float], level: float = LEVEL) -> tuple[float, float] | tuple[None, None]:
    """Student's t interval of the mean; None for a single value.

    Example:
        >>> low, high = interval([1.0, 2.0, 3.0])
        >>> round(low, 2), round(high, 2)
        (-0.48, 4.48)
    """
    from scipy.stats import t

    if len(values) < 2:
        return None, None
    mean = statistics.fmean(values)
    half = float(t.ppf((1 + level) / 2, len(values) - 1)) * statistics.stdev(values) / len(values) ** 0.5
    return mean - half, mean + half


def _differences(scores: Sequence[Score], rule: str, other: str) -> list[float]:
    """By seed."""
    means = [
        {
            seed: statistics.fmean(s.accuracy for s in scores if s.method == name and s.seed == seed)
            for seed in sorted({s.seed for s in scores})
        }
        for name in (rule, other)
    ]
    return [100 * (means[0][seed] - means[1][seed]) for seed in means[0]]


def _over_conditions(scores: Sequence[Score], rule: str, other: str) -> Verdict:
    """As the other comparison's verdicts are; of several sets, by their mean."""
    mean = {
        name: {row.under: row.mean for row in summarise([s for s in scores if s.method == name])}
        for name in (rule, other)
    }
    return Verdict(rule, other, {c: value - mean[other][c] for c, value in mean[rule].items()})
