"""The baselines against their papers' formulas, one sample and two views at a time."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special, stats

from qmf_examples.models import baselines


@pytest.fixture
def evidence():
    return 5 * torch.rand(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_dempster_is_the_rule_of_two_masses(evidence):
    fused, sure = baselines.dempster(evidence)
    for i in range(6):
        mass = None
        for v in range(3):
            e = evidence[v, i].numpy()
            b, u = e / (e.sum() + 4), 4 / (e.sum() + 4)
            assert float(sure[v, i]) == pytest.approx(1 - u)
            if mass is None:
                mass = (b, u)
                continue
            conflict = sum(mass[0][j] * b[k] for j in range(4) for k in range(4) if j != k)
            mass = (
                (mass[0] * b + mass[0] * u + b * mass[1]) / (1 - conflict),
                mass[1] * u / (1 - conflict),
            )
        np.testing.assert_allclose(fused[i], mass[0] * 4 / mass[1], rtol=1e-9)


def test_total_conflict_stays_finite():
    e = torch.tensor([[[1e9, 0.0]], [[0.0, 1e9]]])
    assert torch.isfinite(baselines.dempster(e)[0]).all()


def test_evidential_loss_is_an_expectation_and_a_divergence(evidence):
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    plain, full = (baselines.evidential_loss(evidence, target, a) for a in (0.0, 1.0))
    rng = np.random.default_rng(0)
    alpha, label = evidence[0, 0].numpy() + 1, 0
    draws = stats.dirichlet(alpha).rvs(200_000, random_state=rng)
    one = baselines.evidential_loss(evidence[:1, :1], target[:1], 0.0)
    assert float(one) == pytest.approx(-np.log(draws[:, label]).mean(), abs=0.02)
    other = alpha.copy()
    other[label] = 1
    kl = (
        special.gammaln(other.sum())
        - special.gammaln(4.0)
        - special.gammaln(other).sum()
        + ((other - 1) * (special.digamma(other) - special.digamma(other.sum()))).sum()
    )
    both = baselines.evidential_loss(evidence[:1, :1], target[:1], 1.0)
    assert float(both - one) == pytest.approx(kl)
    assert (full > plain).all()


def test_average_belief_is_taken_in_turn(evidence):
    fused, _ = baselines.average_belief(evidence)
    torch.testing.assert_close(fused, evidence[0] / 4 + evidence[1] / 4 + evidence[2] / 2)


def test_conflict_is_the_papers(evidence):
    total = 0.0
    for i in range(6):
        p = (evidence[:, i] + 1) / (evidence[:, i].sum(-1, keepdim=True) + 4)
        u = 4 / (evidence[:, i].sum(-1) + 4)
        for a in range(3):
            for b in range(3):
                total += float((p[a] - p[b]).abs().sum() / 2 / 2 * (1 - u[a]) * (1 - u[b])) / 6
    assert float(baselines.conflict(evidence)) == pytest.approx(total)
    assert baselines.conflict(evidence[:1]) == 0


def test_collaborative_belief_of_two_views(evidence):
    logits, confidence = evidence[:2], torch.tensor([[0.9] * 6, [0.4] * 6], dtype=torch.float64)
    fused, weights = baselines.collaborative_belief(logits, confidence)
    own = np.array([0.9, 0.4])
    holo = np.log(own[::-1]) / np.log(own).sum()
    certainty = np.abs(special.softmax(logits.numpy(), -1) - 0.25).mean(-1)
    relative = np.minimum(certainty / certainty[::-1], 1)
    expected = special.softmax((own + holo)[:, None] * relative, 0)
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(fused, (expected[..., None] * logits.numpy()).sum(0))
    alone, one = baselines.collaborative_belief(logits[:1], confidence[:1])
    torch.testing.assert_close(alone, logits[0])
    assert (one == 1).all()


def test_the_oracle_looks_at_clean_views_only(evidence):
    corrupted = torch.zeros(3, 6, dtype=torch.bool)
    corrupted[1] = True
    corrupted[:, 5] = True
    fused = baselines.fuse_known(evidence, corrupted)
    torch.testing.assert_close(fused[:5], evidence[[0, 2], :5].softmax(-1).mean(0))
    torch.testing.assert_close(fused[5], evidence[:, 5].softmax(-1).mean(0))


@pytest.mark.parametrize("loss", [baselines.tmc_loss, baselines.rcml_loss])
def test_losses_train(loss):
    torch.manual_seed(0)
    logits = torch.randn(2, 30, 3, requires_grad=True)
    target = torch.arange(30) % 3
    optimizer = torch.optim.Adam([logits], lr=0.2)
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(logits, target, 0.5)
        first = value.item() if first is None else first
        value.backward()
        optimizer.step()
    assert value < 0.5 * first
    assert (baselines.dempster(F.softplus(logits))[0].argmax(-1) == target).all()
