"""From tested runs to figures over seeds: a cell per method, kind of noise and level; robustness over levels."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from .paired_difference import Difference, as_fraction, difference, right_less_right
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

    def to_dict(self) -> dict[str, Any]:
        """As JSON takes it, all of it shares in [0, 1]."""
        published = None
        if self.published is not None:
            table, *shares = self.published
            names = Published._fields[1:]
            published = {"table": table, **{n: as_fraction(x) for n, x in zip(names, shares, strict=True)}}
        behind = None if self.behind is None else self.behind.to_dict()
        return {**self._asdict(), "published": published, "behind": behind}


class Robustness(NamedTuple):
    """One method under one kind of noise, from the means over seeds."""

    method: str
    noise: str
    relative: float | None
    effective: float | None
    """Against late fusion; None where that was not tested."""


def summarise_runs(tested: Sequence[Tested]) -> list[Cell]:
    """One cell per method, kind of noise and level, in the order of the runs."""
    groups: dict[tuple[str, str, float], list[Tested]] = {}
    for record in tested:
        groups.setdefault((record.settings.method, *record.condition), []).append(record)
    best: dict[tuple[str, float], tuple[float, list[Tested]]] = {}
    for (_, noise, level), group in groups.items():
        mean = statistics.fmean(record.accuracy for record in group)
        if mean > best.get((noise, level), (-1.0, []))[0]:
            best[noise, level] = mean, group
    cells = []
    for (method, noise, level), group in groups.items():
        data_set = group[0].settings.data_set
        accuracies = tuple(record.accuracy for record in group)
        cells.append(
            Cell(
                method,
                noise,
                level,
                *over_seeds(accuracies),
                tuple(record.settings.seed for record in group),
                accuracies,
                statistics.fmean(record.calibration_error for record in group),
                statistics.fmean(record.risk_coverage_area for record in group),
                mean_or_none([record.correlation for record in group]),
                published_accuracy(data_set, method, noise, level),
                published_correlation(data_set, method, level) if noise == "gaussian" else None,
                _behind(group, best[noise, level][1]),
            )
        )
    return cells


def _behind(group: Sequence[Tested], best: Sequence[Tested]) -> Difference | None:
    theirs = {record.settings.seed: record.right for record in best}
    ours = {record.settings.seed: record.right for record in group if record.settings.seed in theirs}
    if (
        group is best
        or not ours
        or {len(right) for right in (*ours.values(), *theirs.values())} != {len(best[0].right)}
    ):
        return None
    return difference([right_less_right(list(ours.values()), [theirs[seed] for seed in ours])])


def measure_robustness(cells: Sequence[Cell]) -> list[Robustness]:
    """MultiBench's two measures for each method and kind of noise."""
    curves: dict[tuple[str, str], list[Cell]] = {}
    for cell in sorted(cells, key=lambda cell: cell.level):
        curves.setdefault((cell.method, cell.noise), []).append(cell)
    found = []
    for method, noise in dict.fromkeys((cell.method, cell.noise) for cell in cells):
        means = [cell.mean for cell in curves[method, noise]]
        late = [cell.mean for cell in curves.get(("late", noise), [])]
        relative = relative_robustness([cell.level for cell in curves[method, noise]], means)
        found.append(Robustness(method, noise, relative, effective_robustness(means, late) if late else None))
    return found
