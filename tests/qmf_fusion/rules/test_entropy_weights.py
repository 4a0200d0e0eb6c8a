"""MLA's weights against their formula in NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion import QMFLoss, QualityAwareFusion, fusion_report, testing
from qmf_fusion.rules import EntropyWeights


def layer(m=2):
    return QualityAwareFusion(m, combine="entropy_weights")


def expected(logits, there):
    """Weights ``[M, N]`` and fused logits ``[N, K]``."""
    probs = np.exp(logits - logits.max(-1, keepdims=True))
    probs = probs / probs.sum(-1, keepdims=True)
    entropy = -(probs * np.log(np.where(probs > 0, probs, 1))).sum(-1)
    worth = np.where(there, np.exp(-entropy), 0)
    weights = worth / np.maximum(worth.sum(0), 1e-300)
    return weights, (weights[..., None] * np.where(there[..., None], logits, 0)).sum(0)


@settings(max_examples=60, derandomize=True, deadline=None)
@given(testing.logits(dtype=torch.float64), st.data())
def test_softmax_of_negative_entropy(logits, data):
    there = data.draw(testing.present_masks(len(logits), tuple(logits[0].shape[:-1])))
    out = layer(len(logits))(logits, there)
    weights, fused = expected(torch.stack(logits).numpy(), there.numpy())
    torch.testing.assert_close(out.weights, torch.tensor(weights))
    torch.testing.assert_close(out.logits, torch.tensor(fused))


def test_a_modality_is_worth_at_most_k_times_another():
    out = layer()([torch.tensor([[1e4, 0.0, 0.0, 0.0]]), torch.zeros(1, 4)])
    torch.testing.assert_close(out.weights, torch.tensor([[0.8], [0.2]]))


def test_nothing_is_trained_through_the_weights_but_by_the_ranking():
    g = torch.Generator().manual_seed(0)
    rows = [torch.randn(5, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(2)]
    out = layer()(rows)
    slope = torch.randn(5, 3, generator=g, dtype=torch.float64)
    grads = torch.autograd.grad(out.logits, rows, slope, retain_graph=True)
    for w, grad in zip(out.weights, grads, strict=True):
        torch.testing.assert_close(grad, w.unsqueeze(-1) * slope)
    assert all(grad.abs().sum() > 0 for grad in torch.autograd.grad(out.weights[0].sum(), rows))
    assert torch.autograd.gradcheck(lambda *x: layer()(x).weights, rows)
    losses = []
    for ranking_weight in (0.0, 1.0):
        criterion = QMFLoss(layer(), 5, ranking_weight, form="margin")
        for _ in range(2):
            res = criterion(rows, torch.arange(5) % 3, torch.arange(5))
        losses.append(torch.autograd.grad(res.loss, rows)[0])
    assert not torch.allclose(*losses)


def test_theorem_1_covers_it():
    g = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(2, 300, 4, generator=g)
    target = logits.sum(0).argmax(-1)
    present = torch.ones(2, 300, dtype=torch.bool)
    present[1, :100] = False
    report = fusion_report(layer(), logits, target, present=present, resamples=50)
    assert report.bound is not None
    assert not report.negative
    # The static rule shares among what is there, as this one does.
    weights = layer().rule.static_fusion(list(logits), present, torch.tensor([0.6, 0.4]))[1]
    torch.testing.assert_close(weights[:, [0, 200]], torch.tensor([[1.0, 0.6], [0.0, 0.4]]))


def test_there_is_nothing_to_calibrate():
    with pytest.raises(ValueError, match="EntropyWeights"):
        layer().calibrate(torch.randn(2, 40, 3), torch.arange(40) % 3)
    assert isinstance(layer().rule, EntropyWeights)
