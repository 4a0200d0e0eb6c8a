"""Noisy-or against products of decimals, and UNO's deviation ratio against its formula."""

import math
from decimal import Decimal, localcontext

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion import QMFLoss, QualityAwareFusion, testing
from qmf_fusion.rules import NoisyOr


def layer(m=2, typical=None):
    rule = NoisyOr(m)
    if typical is not None:
        rule.typical.copy_(torch.tensor([[mean, spread, 1.0] for mean, spread in typical]))
    return QualityAwareFusion(m, combine=rule)


def expected(rows):
    """Log-probabilities of rows of K logits, with 80 digits and more exponent than floats have."""
    with localcontext(prec=80):
        exps = [[Decimal(v).exp() for v in row] for row in rows]
        probs = [[e / sum(row) for e in row] for row in exps]
        either = [1 - math.prod((1 - p[y] for p in probs), start=Decimal(1)) for y in range(len(rows[0]))]
        return [float((q / sum(either)).ln()) for q in either]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_noisy_or(data):
    m, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    number = st.one_of(st.floats(-5, 5), st.sampled_from([-60.0, 60.0, 30.0]))
    logits = torch.tensor([data.draw(st.lists(number, min_size=k, max_size=k)) for _ in range(m)], dtype=torch.float64)
    there = data.draw(testing.present_masks(m, 1, min_present=1))
    out = layer(m)(logits.unsqueeze(1), there)
    kept = [row.tolist() for row, here in zip(logits, there[:, 0], strict=True) if here]
    torch.testing.assert_close(out.logits, torch.tensor([expected(kept)], dtype=torch.float64), rtol=1e-9, atol=1e-12)
    assert torch.equal(out.weights, there.double())  # nothing is typical yet


def test_no_digit_is_lost_near_0_and_1():
    """Where probabilities round to 1 and underflow to 0, in float32, with the gradients of float64."""
    rows = [[110.0, 0.0, -30.0], [-5.0, 120.0, -40.0]]
    x = torch.tensor(rows).unsqueeze(1).requires_grad_()
    fused = layer()(x).logits
    torch.testing.assert_close(fused, torch.tensor([expected(rows)]), rtol=1e-6, atol=1e-6)
    fused.backward(torch.tensor([[0.3, -0.2, 0.7]]))
    wide = x.detach().double().requires_grad_()
    layer()(wide).logits.backward(torch.tensor([[0.3, -0.2, 0.7]], dtype=torch.float64))
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-6)


def batch(m=2, n=6, k=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, k, generator=g, dtype=torch.float64) for _ in range(m)]


@pytest.mark.parametrize("typical", [None, [(0.3, 0.05), (0.5, 0.1), (0.4, 0.2)]])
def test_gradients(typical):
    rows = [x.requires_grad_() for x in batch(3)]
    mask = torch.rand(3, 6, generator=torch.Generator().manual_seed(1)) > 0.3
    fusion = layer(3, typical)
    assert torch.autograd.gradcheck(lambda *x: fusion(x, mask)[:2], rows)


def entropies(rows):
    probs = [np.exp(x.numpy()) / np.exp(x.numpy()).sum(-1, keepdims=True) for x in rows]
    return [-(p * np.log(p)).sum(-1) for p in probs]


def test_calibrate_measures_what_entropy_is_typical():
    clean, damaged = batch(2, 200), batch(2, 5, seed=3)
    target = torch.arange(200) % 3
    present = torch.ones(2, 200, dtype=torch.bool)
    present[1, :50] = False
    fusion = layer()
    before = fusion(damaged)
    fusion.calibrate(clean, target, present=present)
    known = [entropies(clean)[0], entropies(clean)[1][50:]]
    wanted = [[h.mean(), h.std(), 1] for h in known]
    torch.testing.assert_close(fusion.rule.typical, torch.tensor(wanted, dtype=torch.float64))
    ratio = [
        h.mean() / (h.mean() + np.maximum(0, own - h.mean() - h.std()))
        for h, own in zip(known, entropies(damaged), strict=True)
    ]
    out = fusion(damaged)
    torch.testing.assert_close(out.weights, torch.tensor(np.stack(ratio)))
    assert (out.weights < 1).any()
    wanted = [expected([(d[i] * x[i]).tolist() for d, x in zip(ratio, damaged, strict=True)]) for i in range(5)]
    torch.testing.assert_close(out.logits, torch.tensor(wanted, dtype=torch.float64))
    # Training is without, as published.
    criterion = QMFLoss(fusion, ranking_weight=0)
    torch.testing.assert_close(criterion(damaged, target[:5]).logits, before.logits)
    fusion.eval()
    torch.testing.assert_close(criterion.eval()(damaged, target[:5]).logits, out.logits)
    again = layer()
    again.load_state_dict(fusion.state_dict())
    assert torch.equal(again(damaged).logits, out.logits)
    fusion.reset_calibration()
    assert torch.equal(fusion(damaged).logits, before.logits)


def test_calibrate_refuses_what_it_has_not():
    with pytest.raises(ValueError, match="static_weights and fit must be left out for noisy_or"):
        layer().calibrate(batch(2, 40), torch.arange(40) % 3, 0.5)
    with pytest.raises(ValueError, match="static_weights and fit must be left out for noisy_or"):
        layer().calibrate(batch(2, 40), torch.arange(40) % 3, fit=["alpha"])


def test_a_modality_that_was_always_sure():
    fusion = layer(2, [(0.0, 0.0), (0.3, 0.0)])
    sure, even = torch.tensor([[0.0, -1e4]]), torch.zeros(1, 2)
    assert fusion([sure, even]).weights[0] == 1
    out = fusion([even, sure])
    assert out.weights[0] == 0
    torch.testing.assert_close(out.logits.exp(), torch.tensor([[2 / 3, 1 / 3]]))


def test_weights_follow_the_entropy_once_calibrated():
    testing.check_weight_monotonicity(layer(3, [(0.2, 0.05), (0.5, 0.1), (0.4, 0.2)]))
