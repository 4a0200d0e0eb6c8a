"""Product of experts against Bayes' rule, written out in Python's floats."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, testing
from qmf_fusion.rules import ProductOfExperts


def layer(m, prior=None):
    return QualityAwareFusion(m, combine=ProductOfExperts(m, prior))


def softmax(row):
    top = max(row)
    exps = [math.exp(v - top) for v in row]
    return [e / sum(exps) for e in exps]


def expected(rows, prior):
    """Log-probabilities given the rows that are there, each a list of K logits."""
    probs = [softmax(row) for row in rows]
    prior = [p / sum(prior) for p in prior]
    total = [math.prod(p[y] for p in probs) / prior[y] ** (len(probs) - 1) for y in range(len(prior))]
    return [math.log(t / sum(total)) for t in total]


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_bayes_rule(data):
    m, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    number = st.floats(-30, 30)
    logits = torch.tensor([data.draw(st.lists(number, min_size=k, max_size=k)) for _ in range(m)], dtype=torch.float64)
    there = data.draw(testing.present_masks(m, 1, min_present=1))
    prior = data.draw(st.none() | st.lists(st.floats(0.1, 5), min_size=k, max_size=k))
    out = layer(m, None if prior is None else torch.tensor(prior))(logits.unsqueeze(1), there)
    kept = [row.tolist() for row, here in zip(logits, there[:, 0], strict=True) if here]
    wanted = torch.tensor([expected(kept, prior or [1.0] * k)], dtype=torch.float64)
    torch.testing.assert_close(out.logits, wanted, rtol=1e-6, atol=1e-6)  # a prior of float32
    assert torch.equal(out.weights, there.double())


def test_exact_where_modalities_are_independent_given_the_class():
    """Whatever is missing, what the rule says is the posterior of the joint distribution."""
    g = torch.Generator().manual_seed(0)
    prior = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    seen = torch.rand(3, 4, 3, generator=g, dtype=torch.float64)  # p(x_m = v | y) at [m, v, y]
    seen = seen / seen.sum(1, keepdim=True)
    heads = (seen * prior).log()  # log p(x_m, y): the posterior up to what its softmax takes away
    values = torch.cartesian_prod(*[torch.arange(4)] * 3).T
    logits = torch.stack([head[v] for head, v in zip(heads, values, strict=True)])
    for there in ([True, True, True], [True, False, True], [False, True, False]):
        mask = torch.tensor(there)
        likelihood = torch.stack([s[v] for s, v, here in zip(seen, values, there, strict=True) if here]).prod(0)
        joint = likelihood * prior
        posterior = joint / joint.sum(-1, keepdim=True)
        torch.testing.assert_close(layer(3, prior)(logits, present=mask).logits.exp(), posterior)


@pytest.mark.parametrize("prior", [None, torch.tensor([1.0, 2.0, 5.0])])
def test_gradients(prior):
    g = torch.Generator().manual_seed(1)
    rows = [torch.randn(4, 3, generator=g, dtype=torch.float64).requires_grad_() for _ in range(3)]
    mask = torch.rand(3, 4, generator=g) > 0.3
    fusion = layer(3, prior)
    assert torch.autograd.gradcheck(lambda *x: fusion(x, mask).logits, rows)


def test_large_logits():
    x = torch.tensor([[[1e4, -1e4, 50.0]], [[-1e4, 1e4, 0.0]]], requires_grad=True)
    out = layer(2)(x)
    torch.testing.assert_close(out.logits.exp(), torch.tensor([[0.0, 0.0, 1.0]]))
    QMFLoss(layer(2), ranking_weight=0)(x, torch.tensor([2])).loss.backward()
    assert torch.isfinite(x.grad).all()


def test_bad_priors_are_refused():
    for prior in (torch.tensor([0.5, -0.5]), torch.tensor([1.0, math.inf]), torch.ones(2, 2), torch.tensor([])):
        with pytest.raises(ValueError, match="prior must be"):
            ProductOfExperts(2, prior)
    for prior in ("even", [1j, 1.0], [None, 1.0], torch.tensor([True, True])):
        with pytest.raises(TypeError, match="prior must be a sequence or a tensor of numbers"):
            ProductOfExperts(2, prior)
    with pytest.raises(ValueError, match="logits must have the 2 classes of prior, got 3"):
        layer(2, torch.ones(2))(torch.zeros(2, 1, 3))


@pytest.mark.parametrize("prior", [[0.9, 0.1], (0.9, 0.1), np.array([0.9, 0.1]), [9, 1]])
def test_a_prior_may_be_any_sequence(prior):
    expected = ProductOfExperts(2, torch.tensor([0.9, 0.1], dtype=torch.float64)).log_prior
    torch.testing.assert_close(ProductOfExperts(2, prior).log_prior, expected)
    model = FusionModel([nn.Identity(), nn.Identity()], "product_of_experts", prior=prior)
    torch.testing.assert_close(model.fusion.rule.log_prior, expected)


def test_a_prior_is_state():
    there = layer(2, torch.tensor([1.0, 3.0]))
    other = layer(2, torch.ones(2))
    other.load_state_dict(there.state_dict())
    assert torch.equal(other.rule.log_prior, there.rule.log_prior)
    with pytest.raises(RuntimeError, match="another kind of fusion"):
        layer(2).load_state_dict(there.state_dict())
    assert there.half().rule.log_prior.dtype == torch.float64
