"""One rule against every other: is the difference more than the luck of seeds and test samples?"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..corruption.conditions import Condition
from ..evaluation.paired_difference import TIE, Array, Difference, by_seed, difference, right_less_right
from ..models.methods import Method
from .figures import Scores
from .results import Score

ALL = "all sets"


class Paired(NamedTuple):
    """A rule less another, on one set or the mean of all: mean accuracy over conditions."""

    rule: str
    other: str
    on: str
    difference: Difference
    """Each seed has the same data, order of batches and damage for both."""
    seeds_won: int
    seeds: int
    conditions_won: int
    conditions_lost: int
    """Those with a verdict of their own; the others are not distinguishable."""

    @property
    def verdict(self) -> str:
        return self.difference.verdict

    def cell(self) -> str:
        mark = f"{TIE} " if self.verdict == "tie" else ""
        gap = self.difference
        return f"{mark}{gap.points:+.1f} {gap.interval()} {self.conditions_won}:{self.conditions_lost}"

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it."""
        rest = {name: value for name, value in self._asdict().items() if name != "difference"}
        return {**rest, **self.difference.to_dict()}


def compare_pairs(results: Scores, rule: str, methods: Sequence[Method]) -> list[Paired]:
    """The rule against every other method, on each set and, where there are several, on their mean."""
    pairs = []
    for method in methods:
        if method.label == rule:
            continue
        found = {name: differences(scores, rule, method.label) for name, scores in results.items()}
        over = {name: [of_set] for name, of_set in found.items()}
        if len(found) > 1:
            over[ALL] = list(found.values())
        pairs += [_pair(rule, method.label, name, sets) for name, sets in over.items()]
    return pairs


def _pair(rule: str, other: str, on: str, sets: Sequence[dict[Condition, Array]]) -> Paired:
    means = [np.mean(list(of_set.values()), axis=0) for of_set in sets]
    of_seeds = np.mean([by_seed(mean) for mean in means], axis=0)
    verdicts = [difference([of_set[condition] for of_set in sets]).verdict for condition in sets[0]]
    won = int((of_seeds > 0).sum())
    return Paired(
        rule, other, on, difference(means), won, len(of_seeds), verdicts.count("better"), verdicts.count("worse")
    )


def differences(scores: Sequence[Score], rule: str, other: str) -> dict[Condition, Array]:
    """By condition ``[seeds, samples]``: what ``rule`` gets right less what ``other`` does."""
    answers: dict[tuple[str, Condition], dict[int, bytes]] = {}
    for score in scores:
        answers.setdefault((score.method, score.under), {})[score.seed] = score.right
    found = {}
    for (method, condition), ours in answers.items():
        if method == rule:
            theirs = answers[other, condition]
            found[condition] = right_less_right(list(ours.values()), [theirs[seed] for seed in ours])
    return found


def best_rivals(pairs: Sequence[Paired], methods: Sequence[Method]) -> list[Paired]:
    """On each set, the pair with the best other rule: neither an oracle nor a variant of the rule itself."""
    rivals = {method.label for method in methods if method.role not in ("oracle", "variant")}
    best: dict[str, Paired] = {}
    for pair in pairs:
        if pair.other in rivals and (pair.on not in best or pair.difference.points < best[pair.on].difference.points):
            best[pair.on] = pair
    return list(best.values())
