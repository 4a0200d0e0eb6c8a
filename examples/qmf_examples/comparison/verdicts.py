"""Does it help? Every fusion against every plain average, under every condition, in words: nothing is picked."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ..corruption.conditions import Condition
from ..evaluation.paired_difference import TIE, Difference, difference
from ..models.methods import Method
from .paired import differences
from .results import Score


class Verdict(NamedTuple):
    """One fusion against one plain average; below 0 the fusion loses."""

    method: str
    average: str
    gaps: dict[Condition, Difference]
    """By condition and level."""
    kinds: dict[str, Difference]
    """By kind of damage, its levels averaged."""

    @property
    def losses(self) -> dict[Condition, Difference]:
        return {condition: gap for condition, gap in self.gaps.items() if gap.verdict == "worse"}

    @property
    def wins(self) -> dict[Condition, Difference]:
        return {condition: gap for condition, gap in self.gaps.items() if gap.verdict == "better"}

    def sentence(self) -> str:
        """Where the fusion loses, and by how many points."""
        wins, ties = len(self.wins), len(self.gaps) - len(self.wins) - len(self.losses)
        if self.losses:
            where = ", ".join(f"{condition.name} {gap.points:+.1f}" for condition, gap in self.losses.items())
            said = f"loses to {self.average} under {len(self.losses)} of {len(self.gaps)} conditions ({where} points)"
        else:
            said = f"loses to {self.average} nowhere"
        return f"{self.method} {said}; wins {wins}, not distinguishable {ties}."


def in_words(gap: Difference) -> str:
    """``"loses 1.5"``, ``"wins 0.2"``, or the points behind the mark of what is not distinguishable.

    Example:
        >>> in_words(Difference(-1.5, -2.0, -1.0)), in_words(Difference(0.2, -0.1, 0.5))
        ('loses 1.5', '≈ +0.2')
    """
    if gap.verdict == "tie":
        return f"{TIE} {gap.points:+.1f}"
    return f"{'wins' if gap.verdict == 'better' else 'loses'} {abs(gap.points):.1f}"


def judge(scores: Sequence[Score], methods: Sequence[Method]) -> list[Verdict]:
    """A verdict for each fusion and plain average.

    Example:
        >>> methods = [Method("mean", role="average"), Method("QMF")]
        >>> scores = [Score("mean", "clean", 0.0, 0, 0.9, None, bytes([1] * 90 + [0] * 10))]
        >>> scores += [Score("QMF", "clean", 0.0, 0, 0.8, None, bytes([1] * 80 + [0] * 20))]
        >>> [verdict] = judge(scores, methods)
        >>> verdict.sentence()
        'QMF loses to mean under 1 of 1 conditions (clean -10.0 points); wins 0, not distinguishable 0.'
    """
    fusions = [method.label for method in methods if method.role == "fusion"]
    averages = [method.label for method in methods if method.role == "average"]
    verdicts = []
    for fusion in fusions:
        for average in averages:
            found = differences(scores, fusion, average)
            kinds = {
                kind: difference([np.mean([x for c, x in found.items() if c.kind == kind], axis=0)])
                for kind in dict.fromkeys(condition.kind for condition in found)
            }
            verdicts.append(Verdict(fusion, average, {c: difference([x]) for c, x in found.items()}, kinds))
    return verdicts
