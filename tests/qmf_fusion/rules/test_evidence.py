"""TMC's and RCML's rules and losses, against their papers' formulas one sample and two views at a time."""

from functools import reduce

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from scipy.special import digamma, gammaln, softmax
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.conflict import degree_of_conflict
from qmf_fusion.evidential import divergence, evidential_loss
from qmf_fusion.rules import RCML, TMC

NAMES = ("tmc", "rcml")


def softplus(x):
    return np.logaddexp(0, x)


def dempster(first, second):
    """Definition 4 of the ICLR paper as printed, of evidence ``[K]``: beliefs, the conflict between them, evidence."""
    k = len(first)
    (b1, u1), (b2, u2) = ((e / (e.sum() + k), k / (e.sum() + k)) for e in (first, second))
    conflict = b1.sum() * b2.sum() - (b1 * b2).sum()
    b, u = (b1 * b2 + b1 * u2 + b2 * u1) / (1 - conflict), u1 * u2 / (1 - conflict)
    return b * k / u


def in_turn(first, second):
    return (first + second) / 2


COMBINED = {"tmc": dempster, "rcml": in_turn}


def published_loss(evidence, target, annealing):
    """The digamma loss and the divergence, of ``[B, K]`` and ``[B]``, each sample's."""
    alpha, rows = evidence + 1, np.arange(len(target))
    expected = digamma(alpha.sum(1)) - digamma(alpha[rows, target])
    wrong = alpha.copy()
    wrong[rows, target] = 1
    total = wrong.sum(1)
    shift = digamma(wrong) - digamma(total)[:, None]
    divergence = gammaln(total) - gammaln(wrong).sum(1) - gammaln(alpha.shape[1]) + ((wrong - 1) * shift).sum(1)
    return expected + annealing * divergence


def published_conflict(views):
    """Of evidence ``[V, K]`` of one sample, as the authors add it up: over all ordered pairs, by V - 1."""
    k, total = views.shape[1], 0.0
    p, sure = (views + 1) / (views.sum(1, keepdims=True) + k), 1 - k / (views.sum(1) + k)
    for a in range(len(views)):
        for b in range(len(views)):
            total += np.abs(p[a] - p[b]).sum() / 2 * sure[a] * sure[b] / max(len(views) - 1, 1)
    return total


def batch(num=3, classes=4, rows=6, scale=3.0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return scale * torch.randn(num, rows, classes, dtype=torch.float64, generator=generator)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(1, 4), st.integers(2, 5), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_fusion_is_the_papers(name, num, classes, seed):
    x = batch(num, classes, seed=seed)
    out = QualityAwareFusion(num, combine=name)(x)
    for i in range(x.shape[1]):
        views = softplus(x[:, i].numpy())
        fused = reduce(COMBINED[name], views)
        np.testing.assert_allclose(np.expm1(out.logits[i].numpy()), fused, rtol=1e-9)
        np.testing.assert_allclose(out.logits[i].softmax(-1), (fused + 1) / (fused + 1).sum())
        np.testing.assert_allclose(out.weights[:, i], 1 - classes / (views.sum(1) + classes))


@pytest.mark.parametrize("name", NAMES)
def test_absence_is_that_of_a_fusion_without_it(name):
    x = batch(4)
    present = torch.rand(4, 6, generator=torch.Generator().manual_seed(1)) < 0.6
    present[:, 0] = False
    x[1, 5, 2], present[1, 5] = torch.nan, True
    out = QualityAwareFusion(4, combine=name)(x, present=present)
    assert not out.logits[0].any()
    for i in range(1, 6):
        there = [m for m in range(4) if present[m, i] and not x[m, i].isnan().any()]
        if there:
            alone = QualityAwareFusion(len(there), combine=name)(x[there, i])
            torch.testing.assert_close(out.logits[i], alone.logits)
            torch.testing.assert_close(out.weights[there, i], alone.weights)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scale", [0.0, 1e4, 1e30])
def test_logits_of_any_size_stay_finite(name, scale):
    x = (scale * batch(12, 10).float()).requires_grad_()
    fusion = QualityAwareFusion(12, combine=name)
    out = QMFLoss(fusion, ranking_weight=0)(list(x), torch.arange(6))
    out.loss.backward()
    assert out.loss.isfinite()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("steps", [0, 100, 1000])
def test_the_objective_is_the_papers(name, steps):
    x, target = batch(3), torch.tensor([0, 1, 2, 3, 0, 1])
    fusion = QualityAwareFusion(3, combine=name)
    fusion.rule.steps.fill_(steps)
    out = QMFLoss(fusion, ranking_weight=0)(list(x.requires_grad_()), target)
    views, annealing = softplus(x.detach().numpy()), min(1.0, steps / 400)
    fused = np.stack([reduce(COMBINED[name], views[:, i]) for i in range(6)])
    losses = [published_loss(e, target.numpy(), annealing).mean() for e in (*views, fused)]
    expected = sum(losses)
    if name == "rcml":
        expected = expected / 4 + np.mean([published_conflict(views[:, i]) for i in range(6)])
    assert out.loss.item() == pytest.approx(expected, rel=1e-6)
    assert torch.autograd.grad(out.loss, x)[0].isfinite().all()
    # What a trajectory records is the cross-entropy of the Dirichlet's mean.
    means = softmax(np.log1p(views), axis=-1)[:, np.arange(6), target]
    np.testing.assert_allclose(out.sample_losses.detach(), -np.log(means), rtol=1e-6)


def test_the_loss_is_an_expectation():
    evidence = 5 * torch.rand(4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    draws = stats.dirichlet(evidence.numpy() + 1).rvs(200_000, random_state=np.random.default_rng(0))
    loss = evidential_loss(torch.log1p(evidence), torch.tensor([1.0, 0, 0, 0]), 0.0)
    assert float(loss) == pytest.approx(-np.log(draws[:, 0]).mean(), abs=0.02)


@pytest.mark.parametrize("name", NAMES)
def test_ignored_and_absent_samples_count_in_no_loss(name):
    x, target = batch(2), torch.tensor([0, -100, 2, 3, -100, 1])
    criterion = QMFLoss(QualityAwareFusion(2, combine=name), ranking_weight=0).eval()
    kept = target != -100
    whole, part = criterion(list(x), target), criterion(list(x[:, kept]), target[kept])
    torch.testing.assert_close(whole.loss, part.loss)
    present = kept.expand(2, 6)
    torch.testing.assert_close(criterion(list(x), target.clamp_min(0), present=present).loss, part.loss)
    nothing = criterion(list(x), torch.full((6,), -100))
    assert nothing.loss == 0


@pytest.mark.parametrize("name", NAMES)
def test_soft_targets_and_smoothing_are_labels(name):
    x, target = batch(2), torch.tensor([0, 1, 2, 3, 0, 1])
    criterion = QMFLoss(QualityAwareFusion(2, combine=name), ranking_weight=0).eval()
    hard = criterion(list(x), target).loss
    torch.testing.assert_close(criterion(list(x), nn.functional.one_hot(target, 4).double()).loss, hard)
    smooth = QMFLoss(criterion.fusion, ranking_weight=0, label_smoothing=0.1).eval()(list(x), target).loss
    label = 0.9 * nn.functional.one_hot(target, 4).double() + 0.1 / 4
    torch.testing.assert_close(smooth, criterion(list(x), label).loss)


@pytest.mark.parametrize("name", NAMES)
def test_training_by_name_learns_anneals_and_resumes(name):
    torch.manual_seed(0)
    heads = {"rgb": nn.Linear(4, 3), "depth": nn.Linear(6, 3)}
    model = FusionModel(heads, name, annealing_steps=20)
    criterion = QMFLoss(model.fusion, 30)
    target = torch.arange(30) % 3
    inputs = {"rgb": torch.randn(30, 4) + target[:, None], "depth": torch.randn(30, 6) - target[:, None]}
    optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
    losses = []
    for _ in range(40):
        out = criterion(model(inputs), target, torch.arange(30))
        losses.append(out.loss.item())
        optimizer.zero_grad()
        out.loss.backward()
        optimizer.step()
    assert model.fusion.rule.steps == 40
    assert losses[-1] < 0.9 * losses[20]
    assert out.ranking_loss > 0
    copy = FusionModel({"rgb": nn.Linear(4, 3), "depth": nn.Linear(6, 3)}, name, annealing_steps=20)
    copy.load_state_dict(model.state_dict())
    torch.testing.assert_close(copy.eval()(inputs).logits, model.eval()(inputs).logits)
    with torch.no_grad():
        criterion.eval()(model(inputs), target, torch.arange(30))
    assert model.fusion.rule.steps == 40


@pytest.mark.parametrize("name", NAMES)
def test_conflict_as_a_diagnostic(name):
    x = batch(3)
    fusion = QualityAwareFusion(["a", "b", "c"], combine=name)
    expected = np.array([published_conflict(softplus(x[:, i].numpy())) for i in range(6)])
    got = degree_of_conflict(fusion, dict(zip("cab", x[[2, 0, 1]], strict=True)))
    np.testing.assert_allclose(got, expected)
    np.testing.assert_allclose(degree_of_conflict(fusion, fusion(list(x))), expected)
    pair = [published_conflict(softplus(x[[0, 2], i].numpy())) for i in range(6)]
    for logits, present in (
        ([x[0], None, x[2]], None),
        (x, torch.tensor([True, False, True])),
        (x, {"a": torch.ones(6) > 0, "b": torch.zeros(6) > 0, "c": torch.ones(6) > 0}),
        (fusion(x, torch.tensor([True, False, True])), None),
    ):
        np.testing.assert_allclose(degree_of_conflict(fusion, logits, present), pair)
    assert not degree_of_conflict(fusion, x, torch.tensor([True, False, False])).any()
    # One sample, three modalities of [K], and pixels.
    np.testing.assert_allclose(degree_of_conflict(fusion, list(x[:, 0])), expected[0])
    pixels = x.view(3, 2, 3, 4).movedim(-1, 2)
    first = QualityAwareFusion(3, combine=name, class_dim=1)
    np.testing.assert_allclose(degree_of_conflict(first, list(pixels)), expected.reshape(2, 3))


def test_conflict_is_of_normalised_logits_and_bad_arguments_are_named():
    x = batch(2)
    fusion = QualityAwareFusion(2, combine="rcml", normalize_logits=0.2)
    rows = x / (0.2 * x.norm(dim=-1, keepdim=True))
    plain = QualityAwareFusion(2, combine="rcml")
    torch.testing.assert_close(degree_of_conflict(fusion, x), degree_of_conflict(plain, rows))
    with pytest.raises(ValueError, match="logits must hold 2 modalities"):
        degree_of_conflict(plain, [x[0]] * 5)
    with pytest.raises(TypeError, match="present must be a bool tensor"):
        degree_of_conflict(plain, x, torch.ones(2))
    with pytest.raises(ValueError, match=r"fusion must be of the rule rcml or tmc, .* got AffineRule"):
        degree_of_conflict(QualityAwareFusion(2), x)
    with pytest.raises(TypeError, match="fusion must be a QualityAwareFusion"):
        degree_of_conflict(plain.rule, x)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="annealing_steps must be at least 1, got 0"):
        TMC(2, annealing_steps=0)
    assert "TMC(\n    annealing_steps=7" in repr(QualityAwareFusion(2, combine=TMC(2, annealing_steps=7)))
    for num in (0, -1, True, 2.0):
        with pytest.raises(ValueError, match="num_modalities must be an integer of at least 1"):
            TMC(num)
    with pytest.raises(ValueError, match="combine must be of 3 modalities, got 2"):
        QualityAwareFusion(3, combine=RCML(2))
    with pytest.raises(ValueError, match=r"combine must be .*'tmc'.* got 'tcm'"):
        QualityAwareFusion(3, combine="tcm")
    with pytest.raises(ValueError, match=r"fusion must be .*'tmc'.* got 'tcm'"):
        FusionModel([nn.Identity()], "tcm")
    with pytest.raises(ValueError, match=r"alpha is of Eq\. 9"):
        QualityAwareFusion(3, combine="tmc", alpha=-1.0)
    with pytest.raises(ValueError, match=r"normalize is of Eq\. 9"):
        QualityAwareFusion(2, combine=TMC(2), normalize=True)
    fusion = QualityAwareFusion(2, combine="tmc")
    with pytest.raises(ValueError, match="weight must be None for the rule TMC"):
        QMFLoss(fusion, ranking_weight=0, weight=torch.ones(4))
    with pytest.raises(ValueError, match="calibrate takes a rule with constants"):
        fusion.calibrate(batch(2), torch.tensor([0, 1, 2, 3, 0, 1]))
    with pytest.raises(RuntimeError, match="another kind of fusion"):
        fusion.load_state_dict(QualityAwareFusion(2, combine="rcml").state_dict())


def exact_loss(z, y, annealing):
    """The loss of rows ``[K]`` and the class y, and its slopes ``[K]``, with 60 digits."""
    with mpmath.workdps(60):
        a = [mpmath.exp(mpmath.mpf(v)) for v in z]
        w = [mpmath.mpf(1) if k == y else v for k, v in enumerate(a)]
        s, t, k = sum(a), sum(w), len(a)
        loss = mpmath.digamma(s) - mpmath.digamma(a[y])
        known = mpmath.loggamma(t) - sum(map(mpmath.loggamma, w)) - mpmath.loggamma(k)
        known += sum((v - 1) * (mpmath.digamma(v) - mpmath.digamma(t)) for v in w)
        slopes = []
        for c, v in enumerate(a):
            slope = v * mpmath.psi(1, s)
            if c == y:
                slope -= v * mpmath.psi(1, v)
            else:
                slope += annealing * v * ((v - 1) * mpmath.psi(1, v) - (t - k) * mpmath.psi(1, t))
            slopes.append(float(slope))
        return float(loss + annealing * known), slopes


@pytest.mark.parametrize("largest", [0.0, 1.0, 8.99, 9.01, 1e4, 1e16, 1e30])
@pytest.mark.parametrize("classes", [2, 4])
def test_the_loss_is_exact_whatever_the_evidence(largest, classes):
    for spread in (torch.linspace(1, 0, classes), torch.eye(classes)[0]):
        z = torch.log1p(largest * spread.double()).requires_grad_()
        for y in (0, 1):
            label = torch.eye(classes, dtype=torch.float64)[y]
            loss = evidential_loss(z, label, 0.7)
            expected, slopes = exact_loss(z.tolist(), y, 0.7)
            assert loss.item() == pytest.approx(expected, rel=1e-12, abs=1e-12)
            # PyTorch's trigamma has nine digits.
            np.testing.assert_allclose(torch.autograd.grad(loss, z)[0], slopes, rtol=1e-8, atol=1e-8)


def test_the_divergence_keeps_float32s_digits():
    """Of which it is computed where a device has no float64."""
    for largest in (1e-3, 1.0, 8.0, 1e3, 1e30):
        alpha = torch.tensor([1.0, 1 + largest, 1 + largest / 3])
        z = alpha.double().log().tolist()
        assert divergence(alpha).item() == pytest.approx(exact_loss(z, 0, 1)[0] - exact_loss(z, 0, 0)[0], abs=2e-5)


def test_sure_views_that_agree_on_a_wrong_class_are_no_gain():
    """Evidence of 1e4 from each of six for one of ten classes, as the others say nothing."""
    x = torch.full((6, 1, 10), -1e3)
    x[..., 0] = 1e4
    x.requires_grad_()
    fusion = QualityAwareFusion(6, combine="tmc")
    fusion.rule.steps.fill_(400)
    out = QMFLoss(fusion, ranking_weight=0)(list(x), torch.tensor([1]))
    fused = fusion(list(x.detach())).logits[0].tolist()
    assert out.fused_loss.item() == pytest.approx(exact_loss(fused, 1, 1.0)[0], rel=1e-6)
    (slope,) = torch.autograd.grad(out.fused_loss, x)
    assert (slope[:, 0, 0] > 0).all()
