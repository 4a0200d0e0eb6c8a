"""Fisher's test behind Eq. 6, against its textbook form."""

import math

import pytest
import torch

from qmf_fusion import QualityAwareFusion, fusion_report
from qmf_fusion.calibration import CleanData, positive_correlation
from qmf_fusion.correlation_test import judge_correlations

QUANTILES = {0.95: 1.6448536269514722, 0.99: 2.3263478740408408}  # of the normal distribution, from a table


def correlated(n, r):
    """Weights and losses ``[1, n]`` whose Pearson correlation is r, n a multiple of 4.

    Either is constant where the other varies, so that the error that the data show is below Fisher's own.
    """
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(n // 4)
    a, b = torch.cat([sign, 0 * sign]), torch.cat([0 * sign, sign])
    return a.unsqueeze(0), (r * a + math.sqrt(1 - r * r) * b).unsqueeze(0)


def rejects(n, r, confidence):
    weights, losses = correlated(n, r)
    data = CleanData([], torch.zeros(n, dtype=torch.int64), torch.ones(1, n, dtype=torch.bool), losses)
    return bool(positive_correlation(weights, data, confidence))


@pytest.mark.parametrize("confidence", QUANTILES)
@pytest.mark.parametrize("n", [12, 40])
def test_r_is_above_0_where_fishers_z_says_so(n, confidence):
    critical = math.tanh(QUANTILES[confidence] / math.sqrt(n - 3))
    assert rejects(n, critical + 1e-6, confidence)
    assert not rejects(n, critical - 1e-6, confidence)
    assert not rejects(n, -critical - 1e-6, confidence)


def test_too_few_samples_say_nothing_and_a_perfect_correlation_is_no_error():
    assert rejects(8, 1.0, 0.95)
    assert not rejects(8, 0.0, 0.95)


def test_an_r_of_0_is_no_constant():
    x = torch.tensor([[1.0, 1.0, -1.0, -1.0] * 3], dtype=torch.float64)
    y = torch.tensor([[1.0, -1.0, 1.0, -1.0] * 3], dtype=torch.float64)
    everywhere = torch.ones(1, 12, dtype=torch.bool)
    found, near = judge_correlations(x, y, everywhere, 0.95), judge_correlations(x, y + 1e-9 * x, everywhere, 0.95)
    assert (float(found.r), int(found.sign)) == (0, 0)
    assert float(found.low) == pytest.approx(float(near.low)) == pytest.approx(-float(found.high))
    assert float(found.high) > 0.5
    still = judge_correlations(x, torch.full_like(y, 0.1), everywhere, 0.95)
    assert (float(still.low), float(still.high)) == (0, 0)


def test_rows_that_do_not_count_have_no_say():
    weights, losses = correlated(20, 0.9)
    counted = torch.ones(1, 20, dtype=torch.bool)
    counted[0, 3:] = False
    data = CleanData([], torch.zeros(20, dtype=torch.int64), counted, losses)
    assert not positive_correlation(weights, data, 0.95)


@pytest.mark.parametrize(("num", "interval"), [(1, (-1.0, 1.0)), (3, (-1.0, 1.0))])
def test_intervals_of_hardly_any_samples(num, interval):
    logits = torch.tensor([[[4.0, 0.0], [1.0, 0.0], [2.0, 0.0]]], dtype=torch.float64)[:, :num]
    (found,) = fusion_report(QualityAwareFusion(1), logits, torch.zeros(num, dtype=torch.int64)).modalities
    assert found.interval == pytest.approx(interval)
    assert found.eq6 == "undecided"
