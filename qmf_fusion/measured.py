"""What a fusion rule does on the data given: measured, beside the static rule, whatever any theorem says.

Differences are paired (both rules see the same samples) and their intervals come from resampling samples: positions of
one sample, such as its pixels, stay together, since they are not independent. Resamples of a few samples spread too
little, and too evenly: their distances from the mean are widened as Student's t interval is. Loss and accuracy are two
chances to err, so that each has an interval at half the level (Bonferroni).
"""

import math
from dataclasses import dataclass
from statistics import NormalDist

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from .correlation_test import FEWEST, student_quantile


@dataclass(frozen=True)
class Difference:
    """A mean under the dynamic and under the static rule."""

    dynamic: float
    static: float
    interval: tuple[float, float]
    """Bootstrap interval of the difference, dynamic less static, at a confidence for both measures together."""

    @property
    def difference(self) -> float:
        return self.dynamic - self.static

    @property
    def sign(self) -> int:
        """1 or -1 where the interval lies above or below 0, else 0."""
        return int(self.interval[0] > 0) - int(self.interval[1] < 0)


@dataclass(frozen=True)
class Measured:
    """The two rules on the same samples."""

    samples: int
    """How many had any row that counts; fewer than 4 decide nothing."""
    rows: int
    """Positions of samples that count; as many as samples where predictions are not dense."""
    loss: Difference
    """Mean cross-entropy of the fused logits over rows."""
    accuracy: Difference
    """The share of rows whose largest fused logit is the target's."""

    @property
    def recommended(self) -> str:
        """``"dynamic"`` or ``"static"``: the one with the lower loss or the higher accuracy, beyond chance.

        Of two rules that are as good as each other, one is recommended with a probability of ``1 - confidence``.
        ``"either"`` where neither is told apart; ``"depends"`` where one has the lower loss, the other more accuracy.
        """
        signs = {self.loss.sign, -self.accuracy.sign} - {0}
        if self.samples < FEWEST or not signs:
            return "either"
        return "depends" if len(signs) > 1 else "static" if signs == {1} else "dynamic"


@dataclass(frozen=True)
class CleanReliability:
    """Whether P(clean) can be relied on, of one modality of ``QualityAwareFusion.robust``.

    The rule gives P(clean) before it knows the class. On held-out data the class is known, and so is what the rule
    would then say. If its probabilities are right, both are the same on average, wherever P(clean) lies.
    """

    promised: float
    """The mean of P(clean)."""
    found: float
    """The mean of P(clean) once the class is known."""
    error: float
    """Their distance, averaged over tenths of P(clean): an expected calibration error, 0 to 1."""


def measure(
    fused: Tensor, static: Tensor, target: Tensor, some: Tensor, confidence: float, resamples: int, seed: int
) -> Measured:
    """Of fused logits ``[N, *, K]`` of both rules and targets ``[N, *]`` where ``some`` modality counts, ``[N, *]``."""
    values, some = [], some.cpu()
    for logits in (fused, static):
        f, y = logits.cpu()[some].double(), target.cpu()[some]
        loss = F.cross_entropy(f, y, reduction="none")
        right = (f.argmax(-1) == y).double()
        values += [torch.zeros_like(some, dtype=torch.float64).masked_scatter(some, v) for v in (loss, right)]
    sums, counts = per_sample(torch.stack(values), some.expand(4, *some.shape))
    means = (sums.sum(0) / counts.sum(0)).tolist()
    drawn = resample_means(sums, counts, resamples, seed)
    samples, each = int((counts[:, 0] > 0).sum()), (1 + confidence) / 2
    differences = []
    for n in (0, 1):
        gap = means[n] - means[n + 2]
        ends = interval(drawn[:, n] - drawn[:, n + 2], gap, samples, each)
        if math.isclose(*ends, rel_tol=1e-9):  # all samples alike
            ends = _without_spread(gap, samples, each)
        differences.append(Difference(means[n], means[n + 2], ends))
    return Measured(samples, int(some.sum()), *differences)


def per_sample(values: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Sums and counts over each of N samples, ``[N, Q]``, of ``[Q, N, *]`` where they count, in float64 on the CPU."""
    v, c = (rearrange(x.cpu().double(), "q n ... -> n q (...)") for x in (torch.where(counted, values, 0), counted))
    return v.sum(-1), c.sum(-1)


def resample_means(sums: Tensor, counts: Tensor, resamples: int, seed: int) -> Tensor:
    """Means ``[R, Q]`` of R resamples of the samples with sums and counts ``[N, Q]``; those of none are left out."""
    there = counts.sum(1) > 0
    sums, counts = sums[there], counts[there]
    num, generator, means = len(sums), torch.Generator().manual_seed(seed), []
    for start in range(0, resamples, chunk := max(1, 4_000_000 // max(num, 1))):
        pick = torch.randint(num, (min(chunk, resamples - start), num), generator=generator)
        often = torch.zeros(pick.shape, dtype=torch.float64).scatter_add_(
            1, pick, torch.ones(1, dtype=torch.float64).expand(pick.shape)
        )
        means.append(often @ sums / (often @ counts))
    return torch.cat(means)


def interval(drawn: Tensor, mean: float, samples: int, confidence: float) -> tuple[float, float]:
    """The percentile interval of resampled values ``[R]`` around the ``mean`` of N samples, widened for a small N.

    As Student's t interval is wider than the normal one of the spread ``sum / N``. What is not finite is left out.
    """
    drawn = drawn[torch.isfinite(drawn)]
    if not len(drawn):
        return float("nan"), float("nan")
    tail = min((1 + confidence) / 2, 1 - 2**-53)
    widened = 1.0
    if samples > 1:
        widened = math.sqrt(samples / (samples - 1)) * student_quantile(tail, samples - 1) / NormalDist().inv_cdf(tail)
    low, high = (mean + widened * (drawn.quantile(drawn.new_tensor([1 - tail, tail])) - mean)).tolist()
    return low, high


def _without_spread(gap: float, samples: int, confidence: float) -> tuple[float, float]:
    """The interval of a difference that is ``gap`` in each of N samples, of which no resample can tell more.

    Had others the opposite sign, with the share p, all N would have this one with a probability of ``(1 - p) ** N``:
    the exact binomial interval of p (Clopper and Pearson), so that fewer than 7 decide nothing at 95 %.
    """
    other = gap * (2 * ((1 - confidence) / 2) ** (1 / samples) - 1)
    return min(gap, other), max(gap, other)


def clean_reliability(promised: Tensor, found: Tensor, bins: int = 10) -> CleanReliability:
    """Of P(clean) before and after the class is known, ``[n]`` each, in bins of equal width.

    Example:
        >>> round(clean_reliability(torch.tensor([0.9, 0.9, 0.2, 0.2]), torch.tensor([1.0, 0.8, 0.0, 0.0])).error, 6)
        0.1
    """
    promised, found = promised.double(), found.double()
    which = (promised * bins).long().clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, promised - found)
    error = float(gaps.abs().sum()) / len(promised)
    return CleanReliability(float(promised.mean()), float(found.mean()), error)
