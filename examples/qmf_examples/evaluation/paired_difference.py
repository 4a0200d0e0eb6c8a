"""Is one method better than another, or is it luck? A paired bootstrap over seeds and test samples."""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 1000
TEST = f"paired bootstrap over seeds and test samples, {LEVEL:.0%}, not corrected for the number of comparisons"
TIE = "≈"
"""The mark of what is not distinguishable."""


class Difference(NamedTuple):
    """One method's accuracy less another's, in points, and its interval."""

    points: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """``"better"`` or ``"worse"`` where the whole interval says so, and else ``"tie"``: not distinguishable."""
        return "better" if self.low > 0 else "worse" if self.high < 0 else "tie"

    def interval(self) -> str:
        return f"[{self.low:+.1f}, {self.high:+.1f}]"

    def to_dict(self) -> dict[str, object]:
        """As JSON takes it, in fractions."""
        ends = {"low": as_fraction(self.low), "high": as_fraction(self.high)}
        return {"difference": as_fraction(self.points), **ends, "verdict": self.verdict}


def as_fraction(points: float | None) -> float | None:
    """Of percent, without the digits that the division adds.

    Example:
        >>> as_fraction(55.6)
        0.556
    """
    return None if points is None else round(points / 100, 12)


def difference(sets: Sequence[Array]) -> Difference:
    """The mean difference over seeds, samples and, of several sets, over sets.

    Each resample draws seeds and test samples, both with replacement, the same for both methods. A sample that several
    seeds share counts once for all of them: more seeds do not make a small test set larger. A few seeds' own spread is
    too small, and their normal tails too thin: what the seeds add is widened to Student's t interval. Of a single seed
    the samples alone speak.

    Args:
        sets: for each set of data ``[seeds, samples]``, what one method gets right (1 or 0) less what the other does;
            NaN at the end of a seed that has fewer samples.

    Example:
        >>> rng = np.random.default_rng(0)
        >>> difference([rng.choice([-1.0, 0.0, 1.0], (5, 400))]).verdict
        'tie'
        >>> difference([rng.choice([0.0, 0.0, 1.0], (5, 400))]).verdict
        'better'
    """
    means = [float(by_seed(values).mean()) for values in sets]
    drawn = np.mean([_draw(number, values) for number, values in enumerate(sets)], axis=0)
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Difference(100 * float(np.mean(means)), 100 * float(low), 100 * float(high))


def by_seed(values: Array) -> Array:
    """Each seed's mean, of ``[seeds, samples]``."""
    return np.asarray(np.nanmean(values, axis=1))


def _draw(number: int, values: Array) -> Array:
    """Resampled means of a set's ``[seeds, samples]``, ``[RESAMPLES]``."""
    from scipy.stats import norm, t

    seeds, samples = values.shape
    mean = by_seed(values).mean()
    of_each = np.nanmean(values, axis=0)
    of_samples = _counts(2 * number, samples) @ of_each / samples - of_each.mean()
    if seeds == 1:
        return np.asarray(mean + of_samples)
    tail = (1 + LEVEL) / 2
    widened = (seeds / (seeds - 1)) ** 0.5 * t.ppf(tail, seeds - 1) / norm.ppf(tail)
    of_seeds = _counts(2 * number + 1, seeds) @ by_seed(values) / seeds - mean
    return np.asarray(mean + of_samples + widened * of_seeds)


@lru_cache(maxsize=8)
def _counts(stream: int, size: int) -> Array:
    """How often each of ``size`` things is drawn, ``[RESAMPLES, size]``: the same for every pair of methods."""
    rng = np.random.default_rng([stream, size])
    return rng.multinomial(size, np.full(size, 1 / size), RESAMPLES).astype(np.float64)


def right_less_right(ours: Sequence[bytes], theirs: Sequence[bytes]) -> Array:
    """``[seeds, samples]`` from what two methods got right, a byte of 0 or 1 per sample, by seed.

    Seeds that split the data may have different numbers of test samples: the shorter end in NaN.
    """
    found = np.full((len(ours), max(map(len, ours))), np.nan)
    for row, one, other in zip(found, ours, theirs, strict=True):
        row[: len(one)] = np.frombuffer(one, np.uint8).astype(np.float64) - np.frombuffer(other, np.uint8)
    return found
