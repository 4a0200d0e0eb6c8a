"""The ranking in the objective's launches, in the interpreter, against PyTorch's sums and brute force."""

import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch

from qmf_kernels import triton_kernels
from qmf_kernels.eager.ranking import ranking
from qmf_kernels.rules import FORMS, PAIRS, LossRule, ObjectiveOptions, WeightRule
from qmf_kernels.triton_kernels import tiling

from ...qmf_fusion import reference
from .cases import assert_errors_close, backwards, few_and_many, poisoned, same


def rank(weights, kappa, form, pairs):
    """The ranking loss of these weights, and its gradient: that of ready uncertainties with alpha 1 and beta 0."""
    num, batch = weights.shape
    heads = [torch.zeros(batch, 2, dtype=weights.dtype) for _ in range(num)]
    rule = WeightRule(weights, torch.ones(num), torch.zeros(num), None)
    target, loss_rule = torch.zeros(batch, dtype=torch.int64), LossRule(form=form, pairs=pairs)
    out, *_, kept = triton_kernels.objective(
        heads, ObjectiveOptions(target, kappa, None, rule, loss_rule), False, False
    )
    return out.ranking_loss, kept[2]


def loss_and_gradient(batch, num, form, pairs, dtype, kind, several, seed):
    generator = torch.Generator().manual_seed(seed)
    weights, kappa = (torch.rand(num, batch, generator=generator).to(dtype) for _ in range(2))
    if kind == "ties":
        weights, kappa = (weights * 4).round() / 4, (kappa * 4).round() / 4
    if kind == "unknown":
        kappa[torch.rand(num, batch, generator=generator) < 0.4] = torch.nan
    if kind == "transposed":
        weights, kappa = weights.t().contiguous().t(), kappa.t().contiguous().t()
    block = tiling.Block(4, 8, 4) if several else tiling.sample_block(batch, pairs)
    before = weights.clone(), kappa.clone()
    with mock.patch.object(tiling, "sample_block", return_value=block):
        with poisoned(math.nan):
            loss, grad = rank(weights, kappa, form, pairs)
        with poisoned(12345), backwards():
            again = rank(weights, kappa, form, pairs)
    truth, slope = ranking(weights.double(), kappa.double(), form, pairs)
    eager, eager_slope = ranking(weights, kappa, form, pairs)
    assert_errors_close("loss", loss, eager, truth)
    assert_errors_close("grad", grad, eager_slope, slope)
    assert same(loss, again[0])
    assert same(grad, again[1])
    assert same(weights, before[0])
    assert same(kappa, before[1])
    if batch <= 7:
        brute = reference.ranking(weights.double(), kappa.double(), form, pairs)
        torch.testing.assert_close(loss.double(), torch.as_tensor(brute), rtol=1e-6, atol=1e-7)


test_loss_and_gradient, test_loss_and_gradient_widely = few_and_many(
    15,
    40,
    st.sampled_from((1, 2, 3, 7, 16, 37, 70)),
    st.sampled_from((1, 2, 5)),
    st.sampled_from(FORMS),
    st.sampled_from(PAIRS),
    st.sampled_from((torch.float32, torch.float64)),
    st.sampled_from(("plain", "ties", "unknown", "transposed")),
    st.booleans(),
    st.integers(0, 1000),
)(loss_and_gradient)


@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_weight_that_is_not_finite_is_in_no_pair(pairs, value):
    weights, kappa = torch.rand(1, 6), torch.rand(1, 6)
    weights[0, 2] = value
    loss, grad = rank(weights, kappa, "paper", pairs)
    kappa[0, 2], weights[0, 2] = math.nan, 0.0
    expected, slope = ranking(weights, kappa, "paper", pairs)
    torch.testing.assert_close((loss, grad), (expected, slope))
