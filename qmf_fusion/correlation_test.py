"""Whether weight and loss correlate beyond chance (Eq. 6): one test, for ``calibrate`` and ``fusion_report`` alike.

Fisher's z, ``atanh(r)``, against its standard error, one-sided. The error comes from the data (a sandwich of ``r``'s
influence, summed over each sample; Student's t makes up for a few samples), so that neither heavy tails nor samples of
many positions make chance look like more: positions of one sample are not independent, and samples are what counts. It
is never taken for smaller than Fisher's own, ``1 / sqrt(n - 3)``.

M modalities are M chances to err, for which Holm's procedure corrects: some modality is wrongly called positive with a
probability of at most ``1 - confidence`` (Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979).
"""

import math
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor

from .correlation import Correlation, co_moments, constant

FEWEST = 4  # samples: fewer have no standard error


class CorrelationTest(NamedTuple):
    """Of M modalities, ``[M]`` each, on the CPU."""

    r: Tensor  # Pearson's, float64; 0 where either is constant, or nothing counts
    low: Tensor  # each one's own interval, two-sided; 0 to 0 where either is constant, -1 to 1 for too few samples
    high: Tensor
    sign: Tensor  # int64: 1 for positive, -1 for negative, at a family-wise level over the modalities; 0 for undecided


def judge_correlations(x: Tensor, y: Tensor, counted: Tensor, confidence: float) -> CorrelationTest:
    """Test the correlation of ``[M, N, *]`` and ``[M, N, *]`` where they count, bool ``[M, N, *]``, over N samples.

    Example:
        >>> x, y = torch.randn(2, 1, 300, generator=torch.Generator().manual_seed(0)).unbind()
        >>> everywhere = torch.ones(1, 300, dtype=torch.bool)
        >>> judge_correlations(x, y, everywhere, 0.95).sign, judge_correlations(x, y - x, everywhere, 0.95).sign
        (tensor([0]), tensor([-1]))
    """
    every = [_fishers_z(*modality) for modality in zip(x, y, counted, strict=True)]
    half = NormalDist().inv_cdf((1 + confidence) / 2)
    ends = [(math.tanh(z - half * error), math.tanh(z + half * error)) for _, z, error in every]
    scores = [z / error if error else 0.0 for _, z, error in every]
    family = sum(0 < error < math.inf for _, _, error in every)
    sign = [0] * len(every)
    for direction in (1, -1):
        for rank, m in enumerate(sorted(range(len(every)), key=lambda m: -direction * scores[m])):
            level = (1 - confidence) / max(1, family - rank)
            if not direction * scores[m] > NormalDist().inv_cdf(1 - level):
                break
            sign[m] = direction
    r, low, high = torch.tensor([(r, *e) for (r, _, _), e in zip(every, ends, strict=True)], dtype=torch.float64).T
    return CorrelationTest(r, low, high, torch.tensor(sign))


def student_quantile(probability: float, free: int) -> float:
    """Student's t of ``free`` degrees of freedom at a probability from 0.5 on, by Wallace's approximation (1959).

    In the tails it is above the exact one, by about 1 % at 4 degrees of freedom and more at fewer.

    Example:
        >>> round(student_quantile(0.975, 10), 2), round(student_quantile(0.975, 10000), 2)
        (2.23, 1.96)
    """
    normal = NormalDist().inv_cdf(probability) * (8 * free + 3) / (8 * free + 1)
    return math.sqrt(free * math.expm1(normal * normal / free))


def _fishers_z(x: Tensor, y: Tensor, counted: Tensor) -> tuple[float, float, float]:
    """r, ``atanh(r)`` and its standard error of ``[N, *]`` each: infinity for too few, 0 where either is constant."""
    sample = counted.nonzero()[:, 0].cpu()
    samples, sample = sample.unique(return_inverse=True)
    x, y = (v[counted].cpu().double() for v in (x, y))
    n, num = len(x), len(samples)
    moments = co_moments(x, y)
    r = float(Correlation.of(moments).pearson) if n else 0.0
    if num < FEWEST:
        return r, 0.0, math.inf
    if bool(constant(moments)):
        return 0.0, 0.0, 0.0
    _, mean_x, mean_y, xx, yy, _ = moments.tolist()
    a, b = (x - mean_x) / math.sqrt(xx / n), (y - mean_y) / math.sqrt(yy / n)
    influence = torch.zeros(num, dtype=torch.float64).index_add_(0, sample, a * b - r / 2 * (a * a + b * b))
    z = math.atanh(max(-1 + 1e-15, min(r, 1 - 1e-15)))
    own = float(influence.square().sum().sqrt()) / n / max(1 - r * r, 1e-15) * math.sqrt(num / (num - 3))
    # Of a few samples the error is uncertain itself, so that ``z / own`` has Student's t distribution: Wallace's
    # approximation (1959) of the normal score as probable.
    # An r of 0 takes the limit.
    own, free = max(own, 1e-15), num - 2
    score = max(abs(z) / own, 1e-6)
    normal = math.sqrt(free * math.log1p(score * score / free)) * (8 * free + 1) / (8 * free + 3)
    return r, z, max(own * score / normal, 1 / math.sqrt(n - 3))
