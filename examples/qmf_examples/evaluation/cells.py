"""From tested runs to figures over seeds: a cell per method, kind of noise and level; robustness over levels."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from ..corruption.conditions import PAPER_KINDS, Condition
from .paired_difference import Difference, as_fraction
from .paired_tests import LATE, Pair, best_peer, mean_accuracy, pair_with
from .published import Published, published_accuracy, published_correlation
from .reliability import effective_robustness, relative_robustness
from .statistics import mean_or_none, over_seeds
from .testing import Tested


class Cell(NamedTuple):
    """One method under one kind of noise at one level, over seeds; shares in [0, 1]."""

    method: str
    noise: str
    level: float
    mean: float
    std: float | None
    worst: float
    seeds: tuple[int, ...]
    accuracies: tuple[float, ...]
    calibration_error: float
    risk_coverage_area: float
    correlation: float | None
    published: Published | None
    """In percent, as printed."""
    published_correlation: float | None
    behind: Difference | None
    """This method's accuracy less the best one's under the condition, over the seeds that both have; None of the best
    itself, and where there is no such seed, or the two were tested on other samples."""
    detection: float | None = None
    """How well the weights tell damaged modalities; None where nothing is weighted or damaged."""
    against_late: Pair | None = None
    against_best_peer: Pair | None = None
    """The best of the others; for the recommended rule, but for its variants."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, all of it shares in [0, 1]."""
        published = None
        if self.published is not None:
            table, *shares = self.published
            names = Published._fields[1:]
            published = {"table": table, **{n: as_fraction(x) for n, x in zip(names, shares, strict=True)}}
        behind = None if self.behind is None else self.behind.to_dict()
        pairs = {
            name: None if pair is None else pair.to_dict()
            for name, pair in (("against_late", self.against_late), ("against_best_peer", self.against_best_peer))
        }
        return {**self._asdict(), "published": published, "behind": behind, **pairs}


class Robustness(NamedTuple):
    """One method under one kind of noise, from the means over seeds."""

    method: str
    noise: str
    relative: float | None
    effective: float | None
    """Against late fusion; None where that was not tested."""


def summarise_runs(tested: Sequence[Tested]) -> list[Cell]:
    """One cell per method, kind of noise and level, in the order of the runs."""
    groups: dict[Condition, dict[str, list[Tested]]] = {}
    for record in tested:
        groups.setdefault(record.condition, {}).setdefault(record.settings.method, []).append(record)
    cells = {}
    for condition, methods in groups.items():
        best = max(methods, key=lambda name: mean_accuracy(methods[name]))
        for method in methods:
            behind = pair_with(methods, method, best)
            late, peer = (pair_with(methods, method, other) for other in (LATE, best_peer(methods, method)))
            gap = None if behind is None else behind.gap
            cells[method, condition] = _cell(methods[method], condition, gap, late, peer)
    return [cells[key] for key in dict.fromkeys((record.settings.method, record.condition) for record in tested)]


def _cell(
    group: Sequence[Tested], condition: Condition, behind: Difference | None, late: Pair | None, peer: Pair | None
) -> Cell:
    settings, (noise, level) = group[0].settings, condition
    accuracies, of_paper = tuple(record.accuracy for record in group), noise in PAPER_KINDS
    return Cell(
        settings.method,
        noise,
        level,
        *over_seeds(accuracies),
        tuple(record.settings.seed for record in group),
        accuracies,
        statistics.fmean(record.calibration_error for record in group),
        statistics.fmean(record.risk_coverage_area for record in group),
        mean_or_none([record.correlation for record in group]),
        published_accuracy(settings.data_set, settings.method, noise, level) if of_paper else None,
        published_correlation(settings.data_set, settings.method, level) if noise == "gaussian" else None,
        behind,
        mean_or_none([record.detection for record in group]),
        late,
        peer,
    )


def measure_robustness(cells: Sequence[Cell]) -> list[Robustness]:
    """MultiBench's two measures for each method and kind of noise."""
    curves: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted((cell for cell in cells if cell.noise in PAPER_KINDS), key=lambda cell: cell.level):
        curves.setdefault((cell.method, cell.noise), []).append(cell)
    found = []
    for method, noise in curves:
        means = [cell.mean for cell in curves[method, noise]]
        late = [cell.mean for cell in curves.get(("late", noise), [])]
        relative = relative_robustness([cell.level for cell in curves[method, noise]], means)
        found.append(Robustness(method, noise, relative, effective_robustness(means, late) if late else None))
    return found
