"""``calibrate``: Eq. 5 by Lemma 1, Eq. 6 or the static weight, monotone, idempotent, order-free, saved, undone."""

import copy
import warnings
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import nn

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.calibration import positive_correlation

RULES = {
    "energy": lambda m: QualityAwareFusion(m),
    "nonnegative": lambda m: QualityAwareFusion(m, nonnegative=True),
    "normalize": lambda m: QualityAwareFusion(m, normalize=True),
    "entropy": lambda m: QualityAwareFusion(m, uncertainty="entropy", temperature=2.0),
    "learnable": lambda m: QualityAwareFusion(m, learnable=True, temperature=0.7),
    "probabilities": lambda m: QualityAwareFusion(m, combine="probabilities", normalize_logits=0.1),
    "robust": lambda m: QualityAwareFusion.robust(m, 4),
}


def data(seed=0, m=3, n=200, k=4, wrong=None, size=1.0):
    """Logits of which ``wrong`` is large where it errs, as a head under noise is."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(k, (n,), generator=g)
    right = torch.rand(m, n, generator=g) < 0.8
    guess = torch.where(right, target, torch.randint(k, (m, n), generator=g))
    scale = torch.where(guess == target, 4.0, 1.0)
    if wrong is not None:
        scale[wrong] = torch.where(guess[wrong] == target, 2.0, 9.0)
    logits = scale.unsqueeze(-1).double() * nn.functional.one_hot(guess, k)
    return size * (logits + 0.5 * torch.randn(m, n, k, generator=g, dtype=torch.float64)), target


def loud_where_right():
    """Two heads that are right of every sample, most of them loudly."""
    g = torch.Generator().manual_seed(0)
    target = torch.randint(4, (300,), generator=g)
    size = torch.rand(2, 300, generator=g) * 14 + 0.5
    noise = 0.1 * torch.randn(2, 300, 4, generator=g)
    return (size.unsqueeze(-1) * nn.functional.one_hot(target, 4) + noise).double(), target


def fishers_z(x, y):
    """The score of the test of Eq. 6 on its own: z over the larger of Fisher's standard error and a sandwich's."""
    if np.ptp(x) < 1e-6 * np.abs(x).max():
        return 0.0
    n, r = len(x), np.corrcoef(x, y)[0, 1]
    a, b = ((v - v.mean()) / v.std() for v in (x, y))
    sandwich = np.sqrt(((a * b - r * (a**2 + b**2) / 2) ** 2).mean()) / (1 - r**2) / np.sqrt(n - 3)
    return np.arctanh(r) / max(sandwich, 1 / np.sqrt(n - 3))


def quietly(fusion, *args, **kwargs):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        return fusion.calibrate(*args, **kwargs)


@settings(max_examples=30, deadline=None)
@given(
    rule=st.sampled_from(sorted(RULES)),
    seed=st.integers(0, 10**6),
    wrong=st.sampled_from([None, 0, 2]),
    size=st.sampled_from([0.1, 1.0, 20.0]),
)
@example(rule="normalize", seed=307789, wrong=None, size=20.0)  # whose shares jump, at shifts of the weights' size
def test_both_conditions_hold_afterwards(rule, seed, wrong, size):
    logits, target = data(seed, wrong=wrong, size=size)
    fusion = RULES[rule](3)
    static = None if rule == "robust" else torch.tensor([0.2, 0.3, 0.5])
    quietly(fusion, logits, target, static)
    weights = fusion(logits).weights.detach().double()
    assert (weights >= 0).all()
    if rule == "probabilities":  # of whose weights only the shares act
        weights = weights / weights.sum(0)
    torch.testing.assert_close(weights.mean(1), fusion.calibration.static, rtol=0, atol=1e-6)
    if static is not None:
        torch.testing.assert_close(fusion.calibration.static, static.double(), rtol=1e-6, atol=1e-6)
    losses = fusion.clean_data(logits, target).losses
    scores = [fishers_z(w.numpy(), loss.numpy()) for w, loss in zip(weights, losses, strict=True)]
    # The most positive one has the strictest level; of 200 samples, Student's t is all but normal.
    assert max(scores) <= 1.02 * NormalDist().inv_cdf(1 - 0.05 / 3)


@pytest.mark.filterwarnings("ignore:alpha is multiplied")
@pytest.mark.parametrize("rule", sorted(set(RULES) - {"robust", "probabilities"}))  # which look at more than size
def test_a_violating_modality_is_held_with_a_warning(rule):
    logits, target = data(wrong=1)
    fusion = RULES[rule](3)
    with pytest.warns(UserWarning, match=r"'1'.*Eq. 6") as told:
        fusion.calibrate(logits, target)
    assert told[0].filename == __file__, "the warning points at the caller"
    if rule != "normalize":
        other, _ = data(seed=5)
        weights = fusion(other).weights
        assert (weights[1] == weights[1, 0]).all()
        assert not (weights[0] == weights[0, 0]).all()


def test_robust_holds_a_modality_too():
    """Held modalities of the mixture keep their vote, at constant odds."""
    logits, target = data(m=2)
    fusion = QualityAwareFusion.robust(2, 4).calibrate(logits, target)
    fusion.calibration.held[1] = 0.4
    out = fusion(logits)
    torch.testing.assert_close(out.weights[1], torch.full((200,), 0.4, dtype=torch.float64))
    z, statistics = fusion.rule.likelihood(logits), fusion.rule.statistics()
    probs, u = fusion.rule.evidence(fusion.rule.stack(logits), z, statistics)
    odds = torch.stack([fusion.rule.odds_of(u)[0], torch.full((200,), 1.5)])
    votes = torch.log1p(logits.shape[-1] * probs / odds.unsqueeze(-1))
    torch.testing.assert_close(out.logits, votes.sum(0).log_softmax(-1))


@settings(max_examples=30, deadline=None)
@given(rule=st.sampled_from(["energy", "nonnegative", "normalize", "entropy"]), seed=st.integers(0, 10**6))
def test_weights_still_never_rise_with_the_uncertainty(rule, seed):
    logits, target = data(seed)
    fusion = RULES[rule](3)
    quietly(fusion, logits, target, torch.tensor([0.2, 0.3, 0.5]))
    g = torch.Generator().manual_seed(seed)
    changed = logits.clone()
    changed[0] = logits[0][torch.randperm(200, generator=g)]
    u, v = fusion.uncertainties(logits)[0], fusion.uncertainties(changed)[0]
    w, x = fusion(logits).weights[0], fusion(changed).weights[0]
    assert ((v < u) | (x <= w + 1e-9)).all()


@pytest.mark.parametrize("rule", RULES)
def test_idempotent_order_free_saved_and_undone(rule):
    logits, target = data(wrong=0)
    fusion = RULES[rule](3)
    before, fresh = copy.deepcopy(fusion.state_dict()), fusion(logits)
    quietly(fusion, logits, target)
    once, out = copy.deepcopy(fusion.state_dict()), fusion(logits)
    quietly(fusion, logits, target)
    torch.testing.assert_close(fusion.state_dict(), once, rtol=0, atol=0, equal_nan=True)
    order = torch.randperm(200, generator=torch.Generator().manual_seed(1))
    quietly(fusion, logits[:, order], target[order])
    torch.testing.assert_close(fusion.state_dict(), once, rtol=1e-9, atol=1e-9, equal_nan=True)

    loaded = RULES[rule](3)
    loaded.load_state_dict(once)
    assert torch.equal(loaded(logits).logits, out.logits)
    loaded.load_state_dict(before)
    assert torch.equal(loaded(logits).logits, fresh.logits)
    fusion.reset_calibration()
    assert fusion.state_dict().keys() == before.keys()
    assert torch.equal(fusion(logits).logits, fresh.logits)


def test_beta_is_lemma_1s():
    logits, target = data()
    fusion = QualityAwareFusion(3, alpha=-0.2).calibrate(logits, target, [1.0, 2.0, 3.0])
    mean_u = -logits.logsumexp(-1).mean(1)
    torch.testing.assert_close(fusion.beta, torch.tensor([1.0, 2, 3], dtype=torch.float64) + 0.2 * mean_u)
    assert (fusion.alpha == -0.2).all()


def test_default_static_weights_keep_the_scale():
    logits, target = data()
    fusion = QualityAwareFusion(3)
    mean = fusion(logits).weights.mean()
    fusion.calibrate(logits, target)
    torch.testing.assert_close(fusion.calibration.static, mean.expand(3))


def test_fitted_temperature_is_the_likeliest_and_alpha_helps():
    logits, target = data(size=5.0)
    fusion = quietly(QualityAwareFusion(3), logits, target, 0.5, fit=("temperature", "alpha"))

    def loss(m, t):
        return float(nn.functional.cross_entropy(logits[m] / t, target))

    for m, t in enumerate(fusion.temperature.tolist()):
        assert loss(m, t) <= min(loss(m, 0.98 * t), loss(m, 1.02 * t))
    torch.testing.assert_close(fusion(logits).weights.mean(1), torch.full((3,), 0.5, dtype=torch.float64))
    fused = nn.functional.cross_entropy(fusion(logits).logits, target)
    plain = quietly(QualityAwareFusion(3), logits, target, 0.5, fit=["temperature"])
    assert fused <= nn.functional.cross_entropy(plain(logits).logits, target)


def test_absent_and_ignored_samples_do_not_count():
    logits, target = data()
    present = torch.ones(3, 200, dtype=torch.bool)
    present[1, 50:] = False
    for name in sorted(set(RULES) - {"normalize"}):
        rule = RULES[name]
        noisy = torch.where(present.unsqueeze(-1), logits, torch.nan)
        a = quietly(rule(3), noisy, target)
        b = quietly(rule(3), logits, target, present=present)
        torch.testing.assert_close(a.state_dict(), b.state_dict(), equal_nan=True)
        ignored = target.clone()
        ignored[100:] = 7
        c = quietly(rule(3), logits, ignored, ignore_index=7)
        d = quietly(rule(3), logits[:, :100], target[:100])
        torch.testing.assert_close(c.state_dict(), d.state_dict(), equal_nan=True)


@pytest.mark.parametrize(
    ("rule", "arguments", "match"),
    [
        ("robust", {"static_weights": 0.5}, "static_weights must be None"),
        ("robust", {"fit": ["alpha"]}, "fit"),
        ("energy", {"fit": ["beta"]}, "fit"),
        ("energy", {"static_weights": -1.0}, "static_weights"),
        ("energy", {"static_weights": [1.0, 2.0]}, "static_weights"),
        ("energy", {"confidence": 1.5}, "confidence"),
        ("energy", {"confidence": "a"}, "confidence"),
        ("energy", {"fit": 5}, "fit"),
        ("normalize", {"static_weights": 0.5}, "sum to 1"),
    ],
)
def test_bad_arguments_are_named(rule, arguments, match):
    logits, target = data()
    with pytest.raises((TypeError, ValueError), match=match):
        RULES[rule](3).calibrate(logits, target, **arguments)
    with pytest.raises(IndexError, match="target"):
        RULES[rule](3).calibrate(logits, target + 2)


def test_a_failing_call_leaves_the_layer_as_it_was():
    logits = 5 * torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(0))
    target = logits.sum(0).argmax(-1)
    fusion = QualityAwareFusion(2, normalize=True)
    fusion.calibrate(logits, target, static_weights=[0.5, 0.5], fit=["temperature"])
    weights, state = fusion(logits).weights, copy.deepcopy(fusion.state_dict())
    with pytest.raises(ValueError, match="static_weights"):
        fusion.calibrate(logits, target, static_weights=[1 - 1e-12, 1e-12])
    assert torch.equal(fusion(logits).weights, weights)
    assert fusion.state_dict().keys() == state.keys()


def test_a_warning_turned_into_an_error_leaves_robust_as_it_was():
    logits, target = data(0)
    fusion = QualityAwareFusion.robust(3, 4).calibrate(logits, target)
    weights = fusion(logits).weights
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="positively"):
            fusion.calibrate(5 * logits.flip(0), target.roll(1), confidence=1e-9)
    assert torch.equal(fusion(logits).weights, weights)


@pytest.mark.parametrize("seed", range(4))
def test_holding_a_modality_of_robust_keeps_eq_5_of_all_and_eq_6_of_the_others(seed):
    logits, target = data(seed, n=600)
    first, second = logits[:2].argmax(-1)
    # The first modality is right where it is outvoted, and wrong at random where the second agrees.
    target = torch.where(first == second, target.roll(1), first)
    fusion = quietly(QualityAwareFusion.robust(3, 4), logits, target)
    held = fusion.calibration.held > 0
    weights = fusion(logits).weights
    assert held.any()
    torch.testing.assert_close(weights.mean(1), fusion.calibration.static, rtol=0, atol=1e-6)
    assert not positive_correlation(weights, fusion.clean_data(logits, target), 0.95)[~held].any()


@pytest.mark.parametrize("share", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("combine", ["logits", "probabilities"])
def test_shares_are_calibrated_to_the_static_rules_where_modalities_are_absent(combine, share):
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, 300, 4, generator=g), torch.randint(4, (300,), generator=g)
    present = torch.rand(2, 300, generator=g) < share
    fusion = QualityAwareFusion(2, normalize=True, combine=combine)
    for static, first in ((None, 0.5), ([0.3, 0.7], 0.3)):
        quietly(fusion, logits, target, static, present=present)
        weights = fusion(logits, present=present).weights.double()
        # The static rule's shares: its weights' where both are there, 1 for a modality alone.
        both = present.all(0)
        expected = [torch.where(both, w, 1.0)[p].mean() for w, p in zip((first, 1 - first), present, strict=True)]
        torch.testing.assert_close(weights.sum(1) / present.sum(1), torch.stack(expected).double(), rtol=0, atol=1e-6)


@pytest.mark.parametrize("combine", ["logits", "probabilities"])
@pytest.mark.parametrize("asked", [None, [0.2, 0.3, 0.5]])
def test_held_shares_meet_eq_5_where_modalities_are_absent(combine, asked):
    logits, target = data(wrong=1)
    present = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    fusion = QualityAwareFusion(3, normalize=True, combine=combine)
    # Near-certain heads that err loudly: their weights rise with their loss.
    with pytest.warns(UserWarning, match="Eq. 6"):
        fusion.calibrate(logits, target, asked, present=present)
    weights = fusion(logits, present=present).weights
    static = present * torch.tensor(asked or [1.0, 1.0, 1.0], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(weights, static / static.sum(0).clamp(min=1e-9))


def test_no_weight_becomes_negative_in_silence():
    """Lemma 1's beta alone would bring weights down to -0.65 here, and accuracy from 100 to about 50 %."""
    logits, target = loud_where_right()
    fusion = QualityAwareFusion(2)
    with pytest.warns(UserWarning, match=r"alpha is multiplied by \{'0': 0\.\d+, '1': 0\.\d+\}") as told:
        fusion.calibrate(logits, target, 0.05)
    assert told[0].filename == __file__
    out = fusion(logits.float())
    assert (out.weights > 0).all()
    torch.testing.assert_close(out.weights.mean(1), torch.full((2,), 0.05), rtol=0, atol=1e-6)
    assert (out.logits.argmax(-1) == target).all()
    assert (fusion.alpha < 0).all()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert (QualityAwareFusion(2).calibrate(logits, target, 5.0).alpha == -0.1).all(), "enough of it: as given"


def test_a_fitted_alpha_leaves_no_weight_negative():
    logits, target = loud_where_right()
    fusion = quietly(QualityAwareFusion(2), logits, target, 0.05, fit=["alpha"])
    assert (fusion(logits).weights > 0).all()


@pytest.mark.parametrize("fit", ["alpha", "temperature"])
def test_fused_probabilities_are_fitted_by_their_own_likelihood(fit):
    logits, target = data()
    fusion = quietly(QualityAwareFusion(3, combine="probabilities"), logits, target, fit=[fit])
    if fit == "temperature":
        assert (fusion.temperature != 1).all()
        return
    loss = nn.functional.cross_entropy(fusion(logits).logits, target)
    found = float(fusion.alpha[0])
    assert loss < 0.075, "by the likelihood of a sum of logits, it would be 0.081"
    for alpha in (-0.1, 5 * found):
        other = quietly(QualityAwareFusion(3, combine="probabilities", alpha=alpha), logits, target)
        assert loss < nn.functional.cross_entropy(other(logits).logits, target)


def test_calibration_tests_each_modality_at_a_level_of_them_all():
    """Of six modalities without any correlation one in four data sets had one held, at 95 % each."""
    held = 0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        logits, target = torch.randn(6, 100, 4, generator=g), torch.randint(4, (100,), generator=g)
        fusion = QualityAwareFusion(6, uncertainty=noise_of(seed))
        held += bool(quietly(fusion, logits, target).calibration.held.any())
    assert held <= 7


def noise_of(seed):
    """An uncertainty that says nothing of the loss."""
    generator = torch.Generator().manual_seed(1000 + seed)
    seen = {}

    def uncertainty(x):
        return seen.setdefault(float(x.sum()), torch.rand(x.shape[:-1], generator=generator, dtype=x.dtype))

    return uncertainty


def fitted_logits(sure, n=60):
    """Of two heads that are right on every row, by one margin."""
    target = torch.arange(n) % 5
    noise = 0.1 * torch.randn(2, n, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return noise + (20.0 if sure else 2.0) * torch.nn.functional.one_hot(target, 5), target


def test_robust_refuses_heads_that_are_perfect():
    logits, target = fitted_logits(sure=True)
    fusion = QualityAwareFusion.robust(2, 5)
    before = copy.deepcopy(fusion.state_dict())
    with pytest.raises(ValueError, match="logits must be of held-out data, got heads that are right on every row"):
        fusion.calibrate(logits, target)
    torch.testing.assert_close(fusion.state_dict(), before, rtol=0, atol=0)
    logits[1, 7] = -logits[1, 7]  # one row is enough to learn from
    with pytest.warns(UserWarning, match=r"the heads of \['0'\] are right on every row"):
        fusion.calibrate(logits, target)
    QualityAwareFusion(2).calibrate(*fitted_logits(sure=True))  # which takes no statistics
    alone = torch.zeros(2, 60, 1, dtype=torch.float64)
    QualityAwareFusion.robust(2, 1).calibrate(alone, torch.zeros(60, dtype=torch.long))


def test_robust_warns_of_data_that_the_heads_have_fitted():
    with pytest.warns(UserWarning, match=r"the heads of \['0', '1'\] are right on every row") as told:
        QualityAwareFusion.robust(2, 5).calibrate(*fitted_logits(sure=False))
    assert told[0].filename == __file__, "the warning points at the caller"
    logits, target = fitted_logits(sure=False, n=2000)
    logits += torch.randn(logits.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QualityAwareFusion.robust(2, 5).calibrate(logits, target)
        QualityAwareFusion.robust(2, 5).calibrate(*fitted_logits(sure=True, n=20))  # too few to tell


def test_a_head_without_an_opinion_is_not_right():
    logits, target = fitted_logits(sure=False)
    logits[0] = torch.randn(logits[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    logits[1] = 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        QualityAwareFusion.robust(2, 5).calibrate(logits, target)


def test_robust_keeps_what_training_knew_of_a_class_that_calibration_data_lack():
    g = torch.Generator().manual_seed(0)
    target = torch.arange(600) % 5
    logits = 3 * nn.functional.one_hot(target, 5) + torch.randn(2, 600, 5, generator=g, dtype=torch.float64)
    fusion = QualityAwareFusion.robust(2, 5)
    criterion = QMFLoss(fusion, 600)
    for _ in range(5):
        criterion(logits, target, torch.arange(600))
    before = fusion.uncertainties(logits)
    some = target != 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fusion.calibrate(logits[:, some], target[some])
    torch.testing.assert_close(fusion.uncertainties(logits)[:, ~some], before[:, ~some], rtol=0.2, atol=0.3)
    with pytest.warns(UserWarning, match=r"target has no row of the classes \[4\]") as told:
        QualityAwareFusion.robust(2, 5).calibrate(logits[:, some], target[some])
    assert told[0].filename == __file__
