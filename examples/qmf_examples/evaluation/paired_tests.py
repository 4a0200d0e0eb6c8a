"""Each method by pairs: against late fusion, and against the best of its peers, under each condition and over all."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..corruption.conditions import CLEAN, PAPER_KINDS, Condition
from ..models.methods import METHODS, RECOMMENDED
from .paired_difference import TIE, Array, Difference, difference, right_less_right
from .testing import Tested

LATE = "late"
Runs = Sequence[Tested]
"""Of one method under one condition, over seeds."""


class Pair(NamedTuple):
    """One method's accuracy less another's under one condition."""

    other: str
    gap: Difference

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {"other": self.other, **self.gap.to_dict()}


class Standing(NamedTuple):
    """One method over all conditions, each counted once, against late fusion or its peers."""

    method: str
    other: str
    """Late fusion, or of the peers the one with the best mean over conditions."""
    gap: Difference
    """To that one, of mean accuracies over conditions."""
    verdicts: dict[str, str]
    """By condition, against late fusion or against the peer that is best under it: better, tie or worse."""

    def count(self, verdict: str) -> int:
        return list(self.verdicts.values()).count(verdict)

    def cells(self) -> tuple[str, str]:
        """The gap, and wins, ties and losses."""
        mark = f"{TIE} " if self.gap.verdict == "tie" else ""
        counts = " : ".join(str(self.count(verdict)) for verdict in ("better", "tie", "worse"))
        return f"{mark}{self.gap.points:+.1f} {self.gap.interval()}", counts

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it."""
        return {**self._asdict(), "gap": self.gap.to_dict()}


def by_condition(tested: Runs) -> dict[Condition, dict[str, Runs]]:
    """Runs by condition and method: clean data once, whatever kinds of noise there are."""
    found: dict[Condition, dict[str, list[Tested]]] = {}
    kinds = [record.condition.kind for record in tested if record.condition.kind in PAPER_KINDS]
    for record in tested:
        condition = record.condition
        if condition.kind in PAPER_KINDS and not condition.level:
            if condition.kind != kinds[0]:
                continue
            condition = CLEAN
        found.setdefault(condition, {}).setdefault(record.settings.method, []).append(record)
    return {condition: dict(methods) for condition, methods in found.items()}


def right_less_others(ours: Runs, theirs: Runs) -> Array | None:
    """What one method gets right less what another does, ``[seeds, samples]``, over the seeds that both have.

    None where there is no such seed, or the two were tested on other samples.
    """
    those = {record.settings.seed: record.right for record in theirs}
    these = {record.settings.seed: record.right for record in ours if record.settings.seed in those}
    if not these or len({len(right) for right in (*these.values(), *those.values())}) != 1:
        return None
    return right_less_right(list(these.values()), [those[seed] for seed in these])


def peers(method: str, names: Sequence[str]) -> list[str]:
    """What of ``names`` a method is held against: all others; for the recommended rule, not its variants.

    Example:
        >>> peers("robust", ["late", "robust", "robust-logits"]), peers("late", ["late", "robust", "robust-logits"])
        (['late'], ['robust', 'robust-logits'])
    """
    own = {name for name in names if name == RECOMMENDED or METHODS[name].role == "variant"}
    return [name for name in names if name != method and not (name in own and method in own)]


def pair_with(methods: Mapping[str, Runs], method: str, other: str | None) -> Pair | None:
    """The pair under one condition; None where it cannot be made."""
    if other is None or other == method or other not in methods:
        return None
    gaps = right_less_others(methods[method], methods[other])
    return None if gaps is None else Pair(other, difference([gaps]))


def best_peer(methods: Mapping[str, Runs], method: str) -> str | None:
    """The one with the best mean accuracy under a condition."""
    return max(peers(method, list(methods)), key=lambda name: mean_accuracy(methods[name]), default=None)


def mean_accuracy(runs: Runs) -> float:
    return statistics.fmean(record.accuracy for record in runs)


def stand(tested: Runs) -> tuple[list[Standing], list[Standing]]:
    """Every method against late fusion, and every method against its peers, where there are such."""
    conditions = by_condition(tested)
    names = list(dict.fromkeys(record.settings.method for record in tested))
    means = {name: statistics.fmean(mean_accuracy(methods[name]) for methods in conditions.values()) for name in names}
    late, rivals = [], []
    for method in names:
        rival = max(peers(method, names), key=lambda name: means[name], default=None)
        late.append(_stand(conditions, method, LATE, dict.fromkeys(conditions, LATE)))
        best = {condition: best_peer(methods, method) for condition, methods in conditions.items()}
        rivals.append(_stand(conditions, method, rival, best))
    return [each for each in late if each is not None], [each for each in rivals if each is not None]


def _stand(
    conditions: Mapping[Condition, Mapping[str, Runs]],
    method: str,
    other: str | None,
    under: Mapping[Condition, str | None],
) -> Standing | None:
    verdicts, gaps = {}, []
    for condition, methods in conditions.items():
        pair = pair_with(methods, method, under[condition])
        if pair is None or other is None or other not in methods:
            return None
        gap = right_less_others(methods[method], methods[other])
        if gap is None:
            return None
        gaps.append(gap)
        verdicts[condition.name] = pair.gap.verdict
    assert other is not None
    return Standing(method, other, difference([np.mean(gaps, axis=0)]), verdicts)


def in_words(late: Sequence[Standing], rivals: Sequence[Standing]) -> list[str]:
    """Where the recommended rule wins, ties and loses, a sentence against each."""
    said = []
    for against, standings in (("late fusion", late), ("the best peer of each condition", rivals)):
        for each in standings:
            if each.method == RECOMMENDED:
                parts = []
                for word, verdict in (("wins", "better"), ("ties", "tie"), ("loses", "worse")):
                    names = [name for name, found in each.verdicts.items() if found == verdict]
                    parts.append(f"{word} {len(names)}" + (f" ({', '.join(names)})" if names else ""))
                gap, interval = each.cells()[0].rsplit(" [", 1)[0], each.gap.interval()
                said.append(
                    f"{RECOMMENDED} against {against}: {'; '.join(parts)}; over all conditions {gap} points {interval} "
                    f"against {each.other}."
                )
    return said
