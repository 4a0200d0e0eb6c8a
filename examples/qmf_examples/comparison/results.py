"""From scores to rows: mean, standard deviation and worst over seeds, and `results.json`."""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from ..files import write_atomically


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


def pearson(weights: Tensor, losses: Tensor) -> float | None:
    """The correlation over samples of each view's weight and loss (the paper's Table 3), averaged over views.

    Args:
        weights: ``[V, B]``.
        losses: ``[V, B]``, each view's own cross-entropy.

    Returns:
        From -1 (as it should be: the larger the loss, the smaller the weight) to 1; None where in no view both vary.

    Example:
        >>> import torch
        >>> round(pearson(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, 3.0]])), 3)
        -0.982
    """
    w, x = weights.detach().cpu().double(), losses.detach().cpu().double()
    sizes = w.norm(dim=1) * x.norm(dim=1)
    w, x = w - w.mean(1, keepdim=True), x - x.mean(1, keepdim=True)
    spread = w.norm(dim=1) * x.norm(dim=1)
    varies = spread > 1e-12 * sizes  # rounding alone is no variation
    if not varies.any():
        return None
    return float(((w * x).sum(1)[varies] / spread[varies]).mean())


def over_seeds(values: Sequence[float]) -> tuple[float, float | None, float]:
    """Mean, sample standard deviation (None for one value) and the smallest."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, min(values)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


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
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))
