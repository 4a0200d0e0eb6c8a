"""Every rule: fusion and Eq. 18 against PyTorch's own losses, and what is asked of all of them alike."""

import copy
from fractions import Fraction

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.logit_norm import normalize_logits

RULES = {
    "robust": lambda m, k=5: QualityAwareFusion.robust(m, k),
    "probabilities": lambda m, k=5: QualityAwareFusion(m, combine="probabilities"),
    "normalised": lambda m, k=5: QualityAwareFusion(m, normalize_logits=0.1),
    "both": lambda m, k=5: QualityAwareFusion(m, combine="probabilities", normalize_logits=0.1, uncertainty="entropy"),
}


def batch(m=3, n=12, k=5, seed=0, shape=()):
    g = torch.Generator().manual_seed(seed)
    x = 2 * torch.randn(m, n, *shape, k, generator=g, dtype=torch.float64)
    return x, torch.randint(k, (n, *shape), generator=g)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weighted", [False, True])
def test_losses_are_pytorchs(rule, smoothing, weighted):
    x, target = batch(shape=(2, 3))
    target[0, 0] = -100
    weight = torch.tensor([0.5, 1, 2, 0, 3.0], dtype=torch.float64) if weighted else None
    fusion = RULES[rule](3)
    fused = fusion(x).logits
    out = QMFLoss(fusion, 12, ranking_weight=0, weight=weight, label_smoothing=smoothing)(x, target)
    seen = [fusion.rule.likelihood(normalize_logits(v, 0.1) if fusion.normalize_logits else v) for v in x]
    options = {"weight": weight, "label_smoothing": smoothing}
    expected = [F.cross_entropy(v.flatten(0, -2), target.flatten(), **options) for v in seen]
    torch.testing.assert_close(out.unimodal_losses, torch.stack(expected))
    torch.testing.assert_close(out.fused_loss, F.cross_entropy(fused.flatten(0, -2), target.flatten(), **options))
    torch.testing.assert_close(out.loss, out.fused_loss + sum(expected))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("form", ["paper", "margin", "released"])
def test_gradients_are_those_of_the_loss(rule, form):
    x, target = batch(m=2, n=6, k=3)
    fusion = RULES[rule](2, 3)
    criterion = QMFLoss(fusion, 6, ranking_weight=0.3, form=form)
    index = torch.arange(6)
    criterion(batch(m=2, n=6, k=3, seed=5)[0], target, index)

    def loss(*rows):
        return copy.deepcopy(criterion)(rows, target, index).loss

    assert torch.autograd.gradcheck(loss, [v.clone().requires_grad_() for v in x])


@pytest.mark.parametrize("rule", RULES)
def test_absent_modalities_and_samples_count_nowhere(rule):
    x, target = batch()
    present = torch.ones(3, 12, dtype=torch.bool)
    present[0, :4] = False
    present[:, 11] = False
    index = torch.arange(12)
    outs = []
    for filler in (torch.nan, torch.inf, 7.0):
        criterion = QMFLoss(RULES[rule](3), 12)
        criterion(x, target, index)
        given = torch.where(present.unsqueeze(-1), x, filler).requires_grad_()
        out = criterion(given, target, index, present)
        out.loss.backward()
        assert torch.isfinite(given.grad).all()
        assert (given.grad[~present] == 0).all()
        assert (out.weights[~present] == 0).all()
        outs.append(out.loss)
    assert outs[0] == outs[1] == outs[2]
    criterion = QMFLoss(RULES[rule](3), 12, ranking_weight=0)
    whole, part = criterion(x, target, present=present), criterion(x[:, :11], target[:11], present=present[:, :11])
    torch.testing.assert_close(whole.loss, part.loss)
    nothing = QMFLoss(RULES[rule](3), 12)(x, target, index, present=torch.zeros(3, dtype=torch.bool))
    assert nothing.loss == 0


@pytest.mark.parametrize("form", ["paper", "margin", "released"])
def test_same_semantics_as_the_operator(form):
    """A static pool of probabilities differs from the operator in its fused loss only."""
    target = batch(shape=(4,))[1]
    target[3] = -100
    present = torch.rand(3, 12, 4, generator=torch.Generator().manual_seed(1)) > 0.3
    results = []
    for fusion in (QualityAwareFusion(3, nonnegative=True), QualityAwareFusion(3, combine="probabilities")):
        criterion = QMFLoss(fusion, 12, form=form, label_smoothing=0.1)
        for seed in range(3):
            out = criterion(batch(shape=(4,), seed=seed)[0], target, torch.arange(12), present)
        results.append((out, criterion.ranking.state_dict()))
    (a, kept_a), (b, kept_b) = results
    for name in ("unimodal_losses", "ranking_loss", "weights", "energy", "sample_losses"):
        torch.testing.assert_close(getattr(a, name), getattr(b, name), equal_nan=True, msg=name)
    torch.testing.assert_close(kept_a, kept_b)


def test_fused_probabilities_are_the_weighted_mean():
    x, _ = batch()
    out = QualityAwareFusion(3, combine="probabilities", uncertainty="msp")(x)
    mean = (out.weights.unsqueeze(-1) * x.softmax(-1)).sum(0) / out.weights.sum(0).unsqueeze(-1)
    torch.testing.assert_close(out.logits.exp(), mean)


def test_logit_norm():
    x, _ = batch()
    out = QualityAwareFusion(3, normalize_logits=0.1)(x)
    seen = x / (0.1 * x.norm(dim=-1, keepdim=True))
    torch.testing.assert_close(out.logits, (0.1 * seen.logsumexp(-1, keepdim=True) * seen).sum(0))
    torch.testing.assert_close(normalize_logits(normalize_logits(x, 0.1), 0.1), normalize_logits(x, 0.1))
    assert torch.isfinite(normalize_logits(torch.tensor([[0.0, 0.0], [1e30, -3e38]]), 0.04)).all()


def test_a_bad_target_is_named():
    x, target = batch()
    with pytest.raises(IndexError, match="target must hold classes 0 to 4"):
        QMFLoss(QualityAwareFusion.robust(3, 5), 12, ranking_weight=0)(x, target + 3)


@pytest.mark.parametrize("rule", [*RULES, "default", "shares"])
@pytest.mark.parametrize("training", [False, True])
def test_absent_equals_dropped(rule, training):
    make = {
        **RULES,
        "default": QualityAwareFusion,
        "shares": lambda m, k=5: QualityAwareFusion(m, normalize=True, uncertainty="msp"),
    }[rule]
    x, target = batch()
    index, present = torch.arange(12), torch.tensor([True, False, True])
    whole, part = (QMFLoss(make(m), 12).train(training) for m in (3, 2))
    for seed in range(3):
        rows = batch(seed=seed)[0]
        a, b = whole(rows, target, index, present), part(rows[::2], target, index)
        torch.testing.assert_close(a.loss, b.loss)
        torch.testing.assert_close(a.logits, b.logits)
        torch.testing.assert_close(a.weights[::2], b.weights)
    torch.testing.assert_close(whole.fusion(x, present).logits, part.fusion(x[::2]).logits)


def test_a_row_of_zeros_has_a_finite_gradient_through_logit_norm():
    x = torch.zeros(1, 3, requires_grad=True)
    normalize_logits(x, 0.1).square().sum().add(normalize_logits(x, 0.1)[0, 0]).backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("value", [-torch.inf, torch.nan, torch.inf])
@pytest.mark.parametrize("options", [{"combine": "probabilities"}, {"normalize_logits": 0.5}])
def test_a_callable_uncertainty_never_sees_a_row_that_is_absent(value, options):
    """Whose slope there may be NaN, which no weight of 0 would take back."""

    def entropy(x):
        return -(torch.softmax(x, -1) * torch.log_softmax(x, -1)).sum(-1)

    rows, target = batch(m=2, n=4, k=3)
    rows[0, 1, 2] = value
    heads = [x.clone().requires_grad_() for x in rows]
    fusion = QualityAwareFusion(2, uncertainty=entropy, learnable=True, **options)
    criterion = QMFLoss(fusion, 4)
    out = criterion(heads, target, torch.arange(4))
    out.loss.backward()
    assert out.weights[0, 1] == 0
    assert (heads[0].grad[1] == 0).all()
    assert all(torch.isfinite(x.grad).all() for x in (*heads, *fusion.parameters()))


def test_any_number_is_a_temperature_of_logit_norm():
    for value in (np.float32(0.25), torch.tensor(0.25), Fraction(1, 4), "0.25"):
        assert QualityAwareFusion(2, normalize_logits=value).normalize_logits == 0.25
    for value in (0, -1.0, 1e39, 1e-39, float("nan")):
        with pytest.raises(ValueError, match="normalize_logits must be a positive temperature, 1e-30 to 1e30, or None"):
            QualityAwareFusion(2, normalize_logits=value)
    with pytest.raises(TypeError, match=r"normalize_logits must be a number or None, got \[1\]"):
        QualityAwareFusion(2, normalize_logits=[1])


def test_odds_that_float32_does_not_hold_are_refused():
    for switches in ({"odds": 1e31}, {"odds": 1e-31}, {"odds": 1e5, "onset": -80.0}, {"onset": -1e6}):
        with pytest.raises(ValueError, match="odds and onset must make odds of 1e-30 to 1e30"):
            QualityAwareFusion.robust(2, 5, **switches)


@pytest.mark.parametrize("alone", [1, 2])
def test_modalities_alone_tie_in_the_ranking(alone):
    """Their weight under robust is a constant, without roundings for the ranking to put in an order."""
    x = 3 * torch.randn(alone, 40, 5, generator=torch.Generator().manual_seed(0))
    present = torch.tensor([True, False][:alone])
    criterion = QMFLoss(QualityAwareFusion.robust(alone, 5), 40)
    for _ in range(2):
        out = criterion(x, torch.arange(40) % 5, torch.arange(40), present)
    assert len(out.weights[0].unique()) == 1
    assert out.ranking_loss == 0


@pytest.mark.parametrize("rule", [*RULES, "default", "msp"])
def test_second_derivatives_are_refused(rule):
    """Also where plain operations stand in front of the operator, along which a part of them could be found."""
    others = {"default": QualityAwareFusion(2), "msp": QualityAwareFusion(2, uncertainty="msp")}
    fusion = others[rule] if rule in others else RULES[rule](2)
    x = [torch.randn(8, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    criterion, target = QMFLoss(fusion, 8), torch.arange(8) % 5
    criterion(x, target, torch.arange(8))
    values = [criterion(x, target, torch.arange(8)).loss]
    if rule == "robust":
        assert torch.autograd.gradgradcheck(lambda *x: fusion(x).logits, x), "without an operator, they are right"
    else:
        values.append(fusion(x).logits.square().sum())
    for value in values:
        plain = torch.autograd.grad(value, x[0], retain_graph=True)[0]
        grad = torch.autograd.grad(value, x[0], create_graph=True)[0]
        torch.testing.assert_close(grad, plain, rtol=0, atol=0)
        with pytest.raises(RuntimeError, match="can't be differentiated again"):
            torch.autograd.grad(grad.square().sum(), x[0])
