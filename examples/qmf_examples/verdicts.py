"""Does it help? Every fusion against every plain average, under every condition, in words: nothing is picked."""

from collections.abc import Sequence

from .methods import Method
from .results import Row

TIE = 5e-4
"""Means closer than this, 0.05 points, are said to tie: the tables would show them alike."""


def describe_setting(condition: str, level: float) -> str:
    return condition if condition == "clean" else f"{condition} {level:g}"


def verdicts(rows: Sequence[Row], methods: Sequence[Method]) -> list[str]:
    """One sentence per fusion and plain average: where the mean accuracy over seeds is lower, and by how many points.

    Example:
        >>> from qmf_examples.methods import mean_logits
        >>> methods = [Method("mean", "t", mean_logits, "average"), Method("QMF", "t", mean_logits, "fusion")]
        >>> seeds = ((0,), (0.9,), (None,))
        >>> rows = [Row("mean", "clean", 0.0, 0.9, None, 0.9, None, *seeds)]
        >>> rows += [Row("QMF", "clean", 0.0, 0.875, None, 0.875, None, *seeds)]
        >>> verdicts(rows, methods)
        ['QMF LOSES to mean under 1 of 1 conditions (clean -2.5 points); wins 0, ties 0.']
    """
    mean = {(row.method, row.condition, row.level): row.mean for row in rows}
    settings = list(dict.fromkeys((row.condition, row.level) for row in rows))
    sentences = []
    for method in methods:
        if method.role != "fusion":
            continue
        for average in (m for m in methods if m.role == "average"):
            gaps = {s: mean[method.name, *s] - mean[average.name, *s] for s in settings}
            losses = {s: gap for s, gap in gaps.items() if gap <= -TIE}
            wins = sum(gap >= TIE for gap in gaps.values())
            ties = len(gaps) - wins - len(losses)
            if losses:
                where = ", ".join(f"{describe_setting(*s)} {100 * gap:.1f}" for s, gap in losses.items())
                said = f"LOSES to {average.name} under {len(losses)} of {len(gaps)} conditions ({where} points)"
            else:
                said = f"loses to {average.name} nowhere"
            sentences.append(f"{method.name} {said}; wins {wins}, ties {ties}.")
    return sentences
