"""From scores to rows: mean, standard deviation and worst over seeds, and `results.json`."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..corruption.conditions import Condition
from ..evaluation.statistics import mean_or_none, over_seeds
from ..files import write_results_file


class Score(NamedTuple):
    """One method under one condition, for one seed."""

    method: str
    condition: str
    level: float
    seed: int
    accuracy: float
    """In [0, 1]."""
    correlation: float | None
    """Of weight and loss; None where the weights do not vary."""
    right: bytes
    """Whether each test sample's answer is right, a byte of 1 or 0, for paired tests."""
    ece: float | None = None
    """Expected calibration error of the fused probabilities, in [0, 1]."""
    aurc: float | None = None
    """Area under the risk-coverage curve of the fused confidence, in [0, 1]."""
    auroc: float | None = None
    """How well the weights tell damaged modalities from others, in [0, 1]; None where none is damaged, or weighted."""

    @property
    def under(self) -> Condition:
        return Condition(self.condition, self.level)

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it: all but the single answers."""
        return {name: value for name, value in self._asdict().items() if name != "right"}


class Row(NamedTuple):
    """One method under one condition at one level, over the seeds."""

    method: str
    condition: str
    level: float
    mean: float
    std: float | None
    """With n - 1 in the denominator; None for a single seed."""
    worst: float
    correlation: float | None
    """The mean over seeds; None where the weights do not vary."""
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    """By seed, as are the next."""
    correlations: tuple[float | None, ...]

    @property
    def under(self) -> Condition:
        return Condition(self.condition, self.level)


def summarise(scores: Sequence[Score]) -> list[Row]:
    """One row per method, condition and level, in the order in which they first come."""
    groups: dict[tuple[str, str, float], list[Score]] = {}
    for score in scores:
        groups.setdefault((score.method, score.condition, score.level), []).append(score)
    rows = []
    for (method, condition, level), group in groups.items():
        accuracies = tuple(score.accuracy for score in group)
        correlations = tuple(score.correlation for score in group)
        rows.append(
            Row(
                method,
                condition,
                level,
                *over_seeds(accuracies),
                mean_or_none(correlations),
                tuple(score.seed for score in group),
                accuracies,
                correlations,
            )
        )
    return rows


def write_results(path: Path, config: dict[str, Any], rows: Sequence[Row], verdicts: Sequence[str]) -> None:
    """Write `results.json`, atomically: nothing in it but what the settings decide, so that reruns can be compared.

    Raises:
        ValueError: a number that is not finite.
    """
    if not all(math.isfinite(row.mean) for row in rows):
        raise ValueError("rows must hold finite accuracies")
    content = {"config": config, "rows": [row._asdict() for row in rows], "verdicts": list(verdicts)}
    write_results_file(path, "digits", content)
