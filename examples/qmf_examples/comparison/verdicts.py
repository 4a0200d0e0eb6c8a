"""Does it help? Every fusion against every plain average, under every condition, in words: nothing is picked."""

from collections.abc import Sequence
from typing import NamedTuple

from ..corruption.conditions import Condition
from ..models.methods import Method
from .results import Row

TIE = 5e-4
"""Means closer than this, 0.05 points, are said to tie: the tables would show them alike."""


class Verdict(NamedTuple):
    """One fusion against one plain average, by mean accuracy over seeds."""

    method: str
    average: str
    gaps: dict[Condition, float]
    """By condition and level: the fusion's mean less the average's; below 0 the fusion loses."""

    @property
    def losses(self) -> dict[Condition, float]:
        return {condition: gap for condition, gap in self.gaps.items() if gap <= -TIE}

    @property
    def wins(self) -> dict[Condition, float]:
        return {condition: gap for condition, gap in self.gaps.items() if gap >= TIE}

    def sentence(self) -> str:
        """Where the fusion loses, and by how many points."""
        wins, ties = len(self.wins), len(self.gaps) - len(self.wins) - len(self.losses)
        if self.losses:
            where = ", ".join(f"{condition.name} {100 * gap:+.1f}" for condition, gap in self.losses.items())
            said = f"loses to {self.average} under {len(self.losses)} of {len(self.gaps)} conditions ({where} points)"
        else:
            said = f"loses to {self.average} nowhere"
        return f"{self.method} {said}; wins {wins}, ties {ties}."


def in_words(gap: float) -> str:
    """``"loses 1.5"``, ``"wins 0.2"`` or ``"ties"``, in points."""
    if abs(gap) < TIE:
        return "ties"
    return f"{'wins' if gap > 0 else 'loses'} {100 * abs(gap):.1f}"


def judge(rows: Sequence[Row], methods: Sequence[Method]) -> list[Verdict]:
    """A verdict for each fusion and plain average.

    Example:
        >>> methods = [Method("mean", role="average"), Method("QMF")]
        >>> seeds = ((0,), (0.9,), (None,))
        >>> rows = [Row("mean", "clean", 0.0, 0.9, None, 0.9, None, *seeds)]
        >>> rows += [Row("QMF", "clean", 0.0, 0.875, None, 0.875, None, *seeds)]
        >>> [verdict] = judge(rows, methods)
        >>> verdict.sentence()
        'QMF loses to mean under 1 of 1 conditions (clean -2.5 points); wins 0, ties 0.'
    """
    mean = {(row.method, row.under): row.mean for row in rows}
    conditions = list(dict.fromkeys(row.under for row in rows))
    fusions = [method.label for method in methods if method.role == "fusion"]
    averages = [method.label for method in methods if method.role == "average"]
    return [
        Verdict(fusion, average, {c: mean[fusion, c] - mean[average, c] for c in conditions})
        for fusion in fusions
        for average in averages
    ]
