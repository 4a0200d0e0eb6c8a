"""TMC and RCML against their papers' formulas, one sample and two views at a time."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import special, stats
from scipy.special import digamma, gammaln
from torch import nn

from qmf_examples.models.evidential import Reliable, Trusted, average_in_turn, combine, evidential_loss, opinion
from qmf_examples.models.evidential import conflict as conflict_of
from qmf_examples.models.evidential import evidence as evidence_of
from qmf_examples.models.learners import Head


@pytest.fixture
def evidence():
    return 5 * torch.rand(3, 6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def test_total_conflict_stays_finite():
    e = torch.tensor([[[1e9, 0.0]], [[0.0, 1e9]]])
    assert torch.isfinite(combine(e[0], e[1])).all()


def test_evidential_loss_is_an_expectation_and_a_divergence(evidence):
    target = torch.tensor([0, 1, 2, 3, 0, 1])
    plain, full = (evidential_loss(evidence, target, a) for a in (0.0, 1.0))
    rng = np.random.default_rng(0)
    alpha, label = evidence[0, 0].numpy() + 1, 0
    draws = stats.dirichlet(alpha).rvs(200_000, random_state=rng)
    one = evidential_loss(evidence[:1, :1], target[:1], 0.0)
    assert float(one) == pytest.approx(-np.log(draws[:, label]).mean(), abs=0.02)
    other = alpha.copy()
    other[label] = 1
    kl = (
        special.gammaln(other.sum())
        - special.gammaln(4.0)
        - special.gammaln(other).sum()
        + ((other - 1) * (special.digamma(other) - special.digamma(other.sum()))).sum()
    )
    both = evidential_loss(evidence[:1, :1], target[:1], 1.0)
    assert float(both - one) == pytest.approx(kl)
    assert (full > plain).all()


def test_average_belief_is_taken_in_turn(evidence):
    fused = average_in_turn(evidence)
    torch.testing.assert_close(fused, evidence[0] / 4 + evidence[1] / 4 + evidence[2] / 2)


def test_conflict_is_the_papers(evidence):
    total = 0.0
    for i in range(6):
        p = (evidence[:, i] + 1) / (evidence[:, i].sum(-1, keepdim=True) + 4)
        u = 4 / (evidence[:, i].sum(-1) + 4)
        for a in range(3):
            for b in range(3):
                total += float((p[a] - p[b]).abs().sum() / 2 / 2 * (1 - u[a]) * (1 - u[b])) / 6
    assert float(conflict_of(evidence)) == pytest.approx(total)
    assert conflict_of(evidence[:1]) == 0


amounts = st.lists(st.floats(0, 50), min_size=3, max_size=3).map(lambda x: torch.tensor(x, dtype=torch.float64))


def dempster(first, second):
    """Definition 4 of the ICLR paper as printed: beliefs, uncertainties, and the conflict between them."""
    (b1, u1), (b2, u2) = opinion(first), opinion(second)
    conflict = b1.sum() * b2.sum() - (b1 * b2).sum()
    b = (b1 * b2 + b1 * u2 + b2 * u1) / (1 - conflict)
    u = u1 * u2 / (1 - conflict)
    return b, u


@given(amounts, amounts)
@settings(max_examples=60, deadline=None)
def test_combination_is_dempsters(first, second):
    beliefs, uncertainty = opinion(combine(first, second))
    b, u = dempster(first, second)
    torch.testing.assert_close(beliefs, b)
    torch.testing.assert_close(uncertainty, u)


@given(amounts, amounts, amounts)
@settings(max_examples=60, deadline=None)
def test_combination_commutes_associates_and_only_gains(first, second, third):
    both = combine(first, second)
    torch.testing.assert_close(both, combine(second, first), rtol=0, atol=0)
    torch.testing.assert_close(combine(both, third), combine(first, combine(second, third)))
    assert torch.equal(combine(first, torch.zeros(3, dtype=torch.float64)), first)
    assert opinion(both)[1] <= torch.minimum(opinion(first)[1], opinion(second)[1]) * (1 + 1e-12)


def test_evidential_loss_is_the_expected_cross_entropy():
    logits = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([0, 1, 2, 3, 0])
    alpha = np.logaddexp(0, logits.numpy()) + 1
    rows = np.arange(5)
    expected = digamma(alpha.sum(1)) - digamma(alpha[rows, target])
    wrong = alpha.copy()
    wrong[rows, target] = 1
    total = wrong.sum(1)
    shift = digamma(wrong) - digamma(total)[:, None]
    divergence = gammaln(total) - gammaln(wrong).sum(1) - gammaln(4) + ((wrong - 1) * shift).sum(1)
    for annealing in (0.0, 0.5, 1.0):
        got = evidential_loss(evidence_of(logits), target, annealing).item()
        assert abs(got - (expected + annealing * divergence).mean()) < 1e-5


def heads(classes=3):
    return {name: Head(nn.Linear(width, 8), nn.Linear(8, classes)) for name, width in (("rgb", 4), ("depth", 6))}


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {"rgb": torch.randn(5, 4, generator=generator), "depth": torch.randn(5, 6, generator=generator)}


def test_trusted_answers_with_the_dirichlets_mean():
    torch.manual_seed(0)
    method = Trusted(heads())
    answer = method(inputs())
    views = [evidence_of(method.classifiers[name](method.parts[name](x))) for name, x in inputs().items()]
    for view, x in zip(views, answer.unimodal_logits, strict=True):
        torch.testing.assert_close(x.softmax(-1), (view + 1) / (view + 1).sum(-1, keepdim=True))
    for row in range(5):
        beliefs, uncertainty = dempster(views[0][row].double(), views[1][row].double())
        torch.testing.assert_close(answer.scores.softmax(-1)[row].double(), beliefs + uncertainty / 3)


@pytest.mark.parametrize("learner", [Trusted, Reliable])
def test_a_views_weight_is_its_belief_mass(learner):
    answer = learner(heads())(inputs())
    alpha = torch.stack(answer.unimodal_logits).exp()
    torch.testing.assert_close(answer.weights, 1 - 3 / alpha.sum(-1))
    assert not answer.weights.requires_grad


def test_the_pseudo_view_adds_evidence_of_both_features():
    torch.manual_seed(0)
    learner = Trusted(heads(), nn.Linear(16, 3))
    answer = learner(inputs())
    assert len(answer.unimodal_logits) == 3
    loss = learner.loss(answer, torch.tensor([0, 1, 2, 0, 1]), torch.arange(5), annealing=0.3)
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in learner.parameters())


@pytest.mark.parametrize("learner", [Trusted, Reliable])
def test_losses_train(learner):
    logits = nn.ParameterDict({name: nn.Parameter(torch.randn(30, 3)) for name in ("rgb", "depth")})
    method = learner({name: Head(nn.Identity(), nn.Identity()) for name in logits})
    target = torch.arange(30) % 3
    optimizer = torch.optim.Adam(logits.parameters(), lr=0.2)
    first = None
    for _ in range(40):
        optimizer.zero_grad()
        answer = method(dict(logits))
        loss = method.loss(answer, target, torch.arange(30), annealing=0.5)
        first = loss.item() if first is None else first
        loss.backward()
        optimizer.step()
    assert loss < 0.5 * first
    assert (answer.scores.argmax(-1) == target).all()


def test_rcml_counts_conflict_besides_the_mean_of_its_losses():
    torch.manual_seed(0)
    method, target = Reliable(heads()), torch.tensor([0, 1, 2, 0, 1])
    answer = method(inputs())
    views = torch.expm1(torch.stack(answer.unimodal_logits))
    losses = [evidential_loss(x, target, 0.5) for x in (*views, average_in_turn(views))]
    expected = sum(losses) / 3 + conflict_of(views)
    torch.testing.assert_close(method.loss(answer, target, torch.arange(5), annealing=0.5), expected)
