"""The contaminated product of experts against a float64 computation from its definition, and its properties."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, testing
from qmf_fusion.evidential import evidential
from qmf_fusion.mixture import ContaminatedProduct


def clean_data(m=3, n=240, k=5, seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    target = torch.arange(n) % k
    logits = 3 * nn.functional.one_hot(target, k) + torch.randn(m, n, k, generator=g, dtype=torch.float64)
    return logits.to(dtype), target


def from_definition(odds, ratio):
    """Sum over all 2^M patterns of clean and broken modalities: posteriors of the class and of each being clean."""
    num, k = ratio.shape
    joint, clean = torch.zeros(k, dtype=torch.float64), torch.zeros(num, dtype=torch.float64)
    for pattern in itertools.product([True, False], repeat=num):
        mass = torch.ones(k, dtype=torch.float64)
        for m, is_clean in enumerate(pattern):
            mass = mass * (ratio[m] / (1 + odds[m]) if is_clean else odds[m] / (1 + odds[m]))
        joint += mass
        clean += torch.tensor(pattern) * mass.sum()
    return joint / joint.sum(), clean / joint.sum()


def test_posteriors_are_those_of_the_model_by_enumeration():
    logits, target = clean_data()
    fusion = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    test = 3 * torch.randn(3, 20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    out = fusion(test)
    probs, u = evidence(fusion, test)
    ratio, odds = 5 * probs, fusion.rule.odds_of(u)
    for i in range(20):
        fused, clean = from_definition(odds[:, i], ratio[:, i])
        torch.testing.assert_close(out.logits[i].exp(), fused)
        torch.testing.assert_close(out.weights[:, i], clean)


def evidence(fusion, logits):
    return fusion.rule.evidence(fusion.rule.stack(logits), fusion.rule.likelihood(logits), fusion.rule.statistics())


def expected_statistics(x, target, k, features):
    """Row by row, in float64, without itself: means, and the three logarithms' means and deviations."""
    n = len(x)
    others = torch.stack([x[target != c, c].mean() for c in range(k)])
    own = torch.stack([x[target == c, c].mean() for c in range(k)])

    def distance(v, c, of_class):
        mean = others.clone()
        mean[c] = of_class
        return (v - mean).square().sum()

    to_own, nearest = [], []
    for i in range(n):
        rest = x[(target == target[i]) & (torch.arange(n) != i), target[i]].mean()
        each = [distance(x[i], c, rest if c == target[i] else own[c]) for c in range(k)]
        to_own.append(each[target[i]])
        nearest.append(min(each))
    center, variance = features.mean(0), features.var(0, unbiased=False)
    variance = (n * variance + variance.mean()) / (n + 1)
    apart = ((features - center).square() / variance).mean(-1)
    logs = [x.norm(dim=1).log(), torch.stack(nearest).log(), apart.log()]
    moments = [(v.mean(), v.std(unbiased=False)) for v in logs]
    return lambda v, c: distance(v, c, own[c]), torch.stack(to_own).mean(), moments, (center, variance)


def test_statistics_and_evidence_are_the_documented_formulas():
    logits, target = clean_data(m=1, n=60, k=3)
    g = torch.Generator().manual_seed(4)
    features = torch.randn(60, 7, generator=g, dtype=torch.float64) * torch.arange(1, 8)
    fusion = QualityAwareFusion.robust(1, 3, features=[7]).calibrate(logits, target, features=[features])
    distance, scale, moments, (center, variance) = expected_statistics(logits[0], target, 3, features)
    for v, seen in (
        (torch.tensor([9.0, -4.0, 2.0]), 0 * center),
        (torch.tensor([3.0, 0.1, 0.2]), center + 2 * variance.sqrt()),
        (torch.tensor([0.01, 0.0, 0.02]), None),
    ):
        v = v.double()
        d = torch.stack([distance(v, c) for c in range(3)])
        tail = (1 + d / scale) ** -5
        evident = 1 + nn.functional.softplus(v)
        ratio = 3 * (0.75 * evident / evident.sum() + 0.25 * tail / tail.sum())
        values = [v.norm().log(), d.min().log()]
        z = [(value - mean) / max(std, 0.3) for value, (mean, std) in zip(values, moments, strict=False)]
        u = max(abs(z[0]), z[1], 0)
        if seen is not None:
            apart = ((seen - center).square() / variance).mean().log()
            u = max(u, abs(apart - moments[2][0]) / max(moments[2][1], 0.02))
        batch = fusion.rule.stack([v.view(1, 3)], None, [None if seen is None else seen.view(1, 7)])
        z = fusion.rule.likelihood(batch.x)
        found, untypical = fusion.rule.evidence(batch, z, fusion.rule.statistics())
        torch.testing.assert_close(3 * found[0, 0], ratio, rtol=1e-6, atol=1e-9)
        assert float(untypical) == pytest.approx(float(u), rel=1e-6)
        rho = 0.3 * (1 + torch.exp(torch.tensor(min(float(u), 6) - 3)))
        assert float(fusion.rule.odds_of(untypical)) == pytest.approx(float(rho), rel=1e-6)


def test_without_statistics_it_is_the_plain_form():
    x = torch.randn(4, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fusion = QualityAwareFusion.robust(4, 6)
    p = (1 + nn.functional.softplus(x)) / (1 + nn.functional.softplus(x)).sum(-1, keepdim=True)
    expected = torch.log1p(6 * p / (0.3 * (1 + torch.exp(torch.tensor(-3.0))))).sum(0).log_softmax(-1)
    torch.testing.assert_close(fusion(x).logits, expected)
    assert fusion.rule.statistics() is None
    batch, z = fusion.rule.stack(x), evidential(x)
    nothing = fusion.rule.posterior(batch, z, fusion.rule.running.sums().statistics([None] * 4, x.dtype))
    torch.testing.assert_close(
        nothing, fusion.rule.posterior(batch, z, None), msg="statistics of nothing change nothing"
    )
    usual = QualityAwareFusion.robust(4, 6, evidential=False)(x).logits
    plain = torch.log1p(6 * x.softmax(-1) / (0.3 * (1 + torch.exp(torch.tensor(-3.0))))).sum(0).log_softmax(-1)
    torch.testing.assert_close(usual, plain)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(1e-3, 1e3), which=st.integers(0, 2))
def test_absent_equals_dropped(seed, size, which):
    logits, target = clean_data()
    test = size * torch.randn(3, 8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    keep = [m for m in range(3) if m != which]
    whole = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    part = QualityAwareFusion.robust(2, 5).calibrate(logits[keep], target)
    present = torch.tensor([m != which for m in range(3)])
    for rows in (test, test.index_fill(0, torch.tensor([which]), torch.nan)):
        out = whole(rows, present)
        torch.testing.assert_close(out.logits, part(test[keep]).logits)
        assert (out.weights[which] == 0).all()
        torch.testing.assert_close(out.weights[keep], part(test[keep]).weights)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10**6), rise=st.floats(0.01, 5))
def test_a_weight_never_rises_with_its_uncertainty(seed, rise):
    g = torch.Generator().manual_seed(seed)
    mixture = ContaminatedProduct(3, 5)
    u = 6 * torch.rand(3, 10, generator=g, dtype=torch.float64)
    x = 4 * torch.randn(3, 10, 5, generator=g, dtype=torch.float64)
    ratio = 5 * mixture.evidence(mixture.stack(x), evidential(x), None)[0]

    def weights(u):
        odds = mixture.odds_of(u).unsqueeze(-1)
        fused = torch.log1p(ratio / odds).sum(0).softmax(-1)
        return (fused * ratio / (ratio + odds)).sum(-1)

    assert (weights(u + torch.tensor([[rise], [0], [0]]))[0] <= weights(u)[0] + 1e-12).all()


def test_untypical_logits_lose_weight_and_votes():
    logits, target = clean_data()
    fusion = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    test, _ = clean_data(seed=1)
    clean = fusion(test).weights[2].mean()
    for broken in (30 * test[2], 0.01 * test[2]):
        given = torch.stack([test[0], test[1], broken.roll(1, 0)])
        out = fusion(given)
        assert out.weights[2].mean() < 0.5 * clean
        assert (out.logits.argmax(-1) == target).double().mean() > 0.97


@pytest.mark.parametrize(
    "switches",
    [
        {"typicality_norm": False},
        {"typicality_distance": False},
        {"typicality_norm": False, "typicality_distance": False},
        {"distance_evidence": 0.0},
        {"distance_evidence": 1.0},
        {"evidential": False},
        {"floor": 0.0},
        {"odds": 1.0},
        {"onset": 2.0},
        {"ceiling": 4.0},
        {"agreement": False},
        {"normalize_logits": 0.1},
    ],
    ids=str,
)
def test_every_switch_changes_the_rule_and_keeps_it_finite(switches):
    logits, target = clean_data()
    some = (target < 2) | (torch.arange(len(target)) % 4 == 0)  # unequal classes
    logits, target = logits[:, some], target[some]
    test = torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)) * torch.tensor(
        [0.05, 1, 40], dtype=torch.float64
    ).view(3, 1, 1)
    default = QualityAwareFusion.robust(3, 5).calibrate(logits, target)(test)
    out = QualityAwareFusion.robust(3, 5, **switches).calibrate(logits, target)(test)
    assert torch.isfinite(out.logits).all()
    assert ((out.weights >= 0) & (out.weights <= 1)).all()
    assert not torch.allclose(out.logits, default.logits)


@pytest.mark.parametrize("value", [0.0, 1e-30, 1e4, 1e19, 3e38])
def test_extreme_finite_logits_stay_finite(value):
    logits, target = clean_data(dtype=torch.float32)
    fusion = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    test = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    test[1] = value
    test[2] = test[2].sign() * value
    out = fusion(test)
    assert torch.isfinite(out.logits).all()
    assert torch.isfinite(out.weights).all()


@pytest.mark.parametrize("calibrated", [False, True])
def test_state_pickle_and_copy(calibrated):
    logits, target = clean_data()
    fusion, other = QualityAwareFusion.robust(3, 5), QualityAwareFusion.robust(3, 5)
    (fusion if calibrated else other).calibrate(logits, target)
    expected = fusion(logits).logits
    other.load_state_dict(fusion.state_dict())
    for same in (other, pickle.loads(pickle.dumps(fusion)), copy.deepcopy(fusion)):
        assert torch.equal(same(logits).logits, expected)


@pytest.mark.parametrize("wrapped", [False, True])
def test_loading_something_else_keeps_what_was_found_and_loading_a_fresh_layer_does_not(wrapped):
    logits, target = clean_data()
    rule = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    rule.observe(list(logits), target, None)
    plain = QualityAwareFusion(3).calibrate(logits, target)
    for layer, fresh in ((rule, QualityAwareFusion.robust(3, 5)), (plain, QualityAwareFusion(3))):
        whole = nn.ModuleDict({"fusion": layer, "head": nn.Linear(2, 2)}) if wrapped else layer
        before = copy.deepcopy(layer.state_dict())
        assert layer.calibration.found()
        whole.load_state_dict({"head.weight": torch.zeros(2, 2), "head.bias": torch.zeros(2)}, strict=False)
        whole.load_state_dict({}, strict=False)
        torch.testing.assert_close(layer.state_dict(), before, equal_nan=True)
        names = {f"fusion.{k}" if wrapped else k: v for k, v in fresh.state_dict().items()}
        whole.load_state_dict(names, strict=False)
        assert layer.state_dict().keys() == fresh.state_dict().keys()


def test_inputs_of_every_kind():
    logits, target = clean_data()
    image = logits.view(3, 4, 6, 10, 5)
    fusion = QualityAwareFusion.robust(["a", "b", "c"], 5).calibrate(logits, target)
    expected = fusion(logits).logits
    torch.testing.assert_close(fusion(dict(zip("abc", logits, strict=True))).logits, expected)
    torch.testing.assert_close(fusion(list(image)).logits, expected.view(4, 6, 10, 5))
    wide = QualityAwareFusion.robust(3, 5, class_dim=1).calibrate(image.movedim(-1, 2), target.view(4, 6, 10))
    torch.testing.assert_close(wide(image.movedim(-1, 2)).logits, expected.view(4, 6, 10, 5).movedim(-1, 1))
    one = QualityAwareFusion.robust(1, 5).calibrate(logits[:1], target)
    assert (one(logits[:1]).logits.argmax(-1) == logits[0].argmax(-1)).double().mean() > 0.9
    with torch.autocast("cpu", torch.bfloat16):
        out = fusion(list(logits.bfloat16()))
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, fusion(list(logits.bfloat16().float())).logits)


def test_no_modality_gives_zeros_and_no_gradient():
    x = torch.randn(2, 3, 4, requires_grad=True)
    present = torch.tensor([[True, False, True], [True, False, False]])
    out = QualityAwareFusion.robust(2, 4)(x, present)
    assert (out.logits[1] == 0).all()
    out.logits.logsumexp(-1).sum().backward()
    assert (x.grad[~present] == 0).all()
    assert torch.isfinite(x.grad).all()


@pytest.mark.filterwarnings("ignore")
def test_compiles_whole():
    logits, target = clean_data(dtype=torch.float32)
    fusion = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    torch.testing.assert_close(torch.compile(fusion, fullgraph=True, backend="aot_eager")(logits), fusion(logits))
    late = QualityAwareFusion.robust(3, 5)
    compiled = torch.compile(late, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logits), late(logits))
    late.calibrate(logits, target)  # what is compiled looks at the statistics anew
    torch.testing.assert_close(compiled(logits), fusion(logits))
    plain, whole = (QMFLoss(QualityAwareFusion.robust(3, 5), 240) for _ in range(2))
    step = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for i in range(0, 240, 80):
        index = torch.arange(i, i + 80)
        expected = plain(logits[:, index], target[index], index)
        torch.testing.assert_close(step(logits[:, index], target[index], index).loss, expected.loss)
    torch.testing.assert_close(whole.state_dict(), plain.state_dict())


def test_running_statistics_come_near_the_fitted_ones():
    logits, target = clean_data(n=4000, k=4)
    fusion = QualityAwareFusion.robust(3, 4)
    criterion = QMFLoss(fusion, len(target))
    order = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    for index in order.split(50):
        criterion(logits[:, index], target[index], index)
    running = fusion.rule.statistics()
    test, _ = clean_data(n=500, k=4, seed=9)
    test[1] *= 8
    gathered = fusion(test)
    fusion.calibrate(logits, target)
    fitted = fusion.rule.statistics()
    torch.testing.assert_close(running.mean[:, :3], fitted.mean[:, :3], rtol=0.1, atol=0.05)
    torch.testing.assert_close(running.deviation[:, :2], fitted.deviation[:, :2], rtol=0.15, atol=0.05)
    torch.testing.assert_close(gathered.weights, fusion(test).weights, rtol=0, atol=0.15)
    criterion.eval()
    before = copy.deepcopy(fusion.rule.running.state_dict())
    criterion(logits[:, :50], target[:50])
    torch.testing.assert_close(fusion.rule.running.state_dict(), before, rtol=0, atol=0)


def test_gathering_can_be_left_to_calibrate():
    logits, target = clean_data()
    fusion = QualityAwareFusion.robust(3, 5, gather=False)
    QMFLoss(fusion, 240, ranking_weight=0)(logits, target)
    assert fusion.rule.statistics() is None
    expected = QualityAwareFusion.robust(3, 5).calibrate(logits, target)(logits)
    torch.testing.assert_close(fusion.calibrate(logits, target)(logits).logits, expected.logits)


def test_a_modality_never_seen_stays_plain():
    logits, target = clean_data()
    fusion = QualityAwareFusion.robust(3, 5)
    criterion = QMFLoss(fusion, len(target), ranking_weight=0)
    for _ in range(3):
        criterion([logits[0], None, logits[2]], target)
    probs, untypical = evidence(fusion, logits)
    torch.testing.assert_close(probs[1], evidential(logits[1]).softmax(-1))
    assert (untypical[1] == 0).all()
    assert (untypical[0] > 0).any()


def test_works_in_a_model_as_the_default_does():
    heads = {"a": nn.Linear(6, 4), "b": nn.Linear(3, 4)}
    model = FusionModel(heads, QualityAwareFusion.robust(["a", "b"], 4))
    criterion = QMFLoss(model.fusion, 20)
    out = model({"a": torch.randn(20, 6), "b": torch.randn(20, 3)})
    result = criterion(out.unimodal_logits, torch.arange(20) % 4, torch.arange(20))
    result.loss.backward()
    torch.testing.assert_close(result.logits, out.logits)
    assert all(p.grad.abs().sum() > 0 for p in model.parameters())


@pytest.mark.parametrize(
    ("switches", "match"),
    [
        ({"odds": 0.0}, "odds"),
        ({"distance_evidence": 2.0}, "distance_evidence"),
        ({"normalize_logits": -1.0}, "normal"),
        ({"floor": -1.0}, "floor must be finite and at least 0"),
        ({"features": [3]}, "features must be None or 2 widths"),
        ({"features": [3, 0]}, "features must be an integer of at least 1"),
        ({"num_classes": 0}, "num_classes must be at least 1"),
        ({"num_classes": -3}, "num_classes must be at least 1"),
        *(
            ({name: bad}, f"{name} must be finite")
            for name in ("onset", "ceiling", "odds")
            for bad in (float("nan"), float("inf"), -float("inf"))
        ),
    ],
)
def test_bad_switches_are_named(switches, match):
    with pytest.raises(ValueError, match=match):
        QualityAwareFusion.robust(2, **{"num_classes": 5, **switches})
    with pytest.raises(TypeError, match="nonsense"):
        QualityAwareFusion.robust(2, 5, nonsense=1)


@pytest.mark.filterwarnings("ignore:target has no row of the classes")
@pytest.mark.parametrize(("classes", "samples"), [(1, 5), (3, 2), (5, 5)])
def test_data_with_hardly_any_statistics_stays_finite(classes, samples):
    g = torch.Generator().manual_seed(0)
    logits, target = torch.randn(2, samples, classes, generator=g), torch.arange(samples) % classes
    criterion = QMFLoss(QualityAwareFusion.robust(2, classes), samples)
    for _ in range(4):
        assert torch.isfinite(criterion(logits, target, torch.arange(samples)).loss)
    for fusion in (criterion.fusion, QualityAwareFusion.robust(2, classes).calibrate(logits, target)):
        out = fusion(torch.randn(2, 4, classes, generator=g))
        assert torch.isfinite(out.logits).all()
        assert torch.isfinite(out.weights).all()


@pytest.mark.filterwarnings("ignore:target has no row of the classes")
@pytest.mark.filterwarnings("ignore:the weights of")  # labels that have nothing to do with the logits may violate Eq. 6
def test_constant_logits_and_classes_without_samples_stay_finite():
    g = torch.Generator().manual_seed(0)
    test = torch.randn(2, 4, 6, generator=g, requires_grad=True)
    for logits, num in ((torch.zeros(2, 20, 6), 6), (torch.randn(2, 40, 6, generator=g), 3)):
        out = QualityAwareFusion.robust(2, 6).calibrate(logits, torch.arange(logits.shape[1]) % num)(test)
        assert torch.isfinite(out.logits).all()
        (grad,) = torch.autograd.grad(out.logits.logsumexp(-1).sum() + out.weights.sum(), test)
        assert torch.isfinite(grad).all()


def test_casting_keeps_the_statistics_precise():
    logits, target = clean_data(dtype=torch.float32)
    fusion = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    expected = fusion(logits).logits
    assert fusion.half().rule.fitted.classes.dtype == torch.float64
    assert torch.equal(fusion(logits).logits, expected)


def test_another_number_of_classes_is_refused_and_changes_nothing():
    logits, target = clean_data()
    fusion = QualityAwareFusion.robust(3, 5)
    fusion.observe(list(logits), target, None)
    before = copy.deepcopy(fusion.state_dict())
    fewer = logits[..., :2]
    for call in (lambda: fusion(fewer), lambda: fusion.observe(list(fewer), target % 2, None)):
        with pytest.raises(ValueError, match="logits must have"):
            call()
    torch.testing.assert_close(fusion.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match="logits must have"):
        QualityAwareFusion.robust(3, 5).calibrate(logits, target)(fewer)


def test_rows_whose_squares_overflow_do_not_spoil_the_running_statistics():
    logits, target = clean_data()
    sound, spoilt = QualityAwareFusion.robust(3, 5), QualityAwareFusion.robust(3, 5)
    for _ in range(3):
        sound.observe(list(logits), target, None)
        spoilt.observe(list(logits), target, None)
    spoilt.observe([torch.full_like(x, 1e200) for x in logits], target, None)
    torch.testing.assert_close(spoilt(logits).logits, sound(logits).logits)
    mixed = torch.cat([logits, 1e153 * logits], 1)
    spoilt.observe(list(mixed), torch.cat([target, target]), None)
    sound.observe(list(logits), target, None)
    torch.testing.assert_close(spoilt(logits).weights, sound(logits).weights)
    assert all(torch.isfinite(x).all() for x in spoilt.rule.running.buffers())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_sizes_that_do_not_vary_make_no_row_untypical(dtype):
    """LogitNorm gives every row one size: without a floor, its deviation is 0, or that of roundings."""
    for seed in range(4):
        g = torch.Generator().manual_seed(seed)
        x, target = torch.randn(2, 60, 5, generator=g, dtype=dtype), torch.randint(5, (60,), generator=g)
        fusion = QualityAwareFusion.robust(2, 5, floor=0.0, normalize_logits=0.04, typicality_distance=False)
        criterion = QMFLoss(fusion, 60)
        for index in torch.randperm(60, generator=g).split(20):
            criterion(x[:, index], target[index], index)
        fusion.eval()
        given = x.clone().requires_grad_()
        assert fusion.uncertainties(x).max() < 1
        fusion(given).logits.sum().backward()
        assert torch.isfinite(given.grad).all()


def test_batches_of_one_class_leave_finite_statistics():
    """The sum over the samples of other classes, of which there are none, is a difference of sums, and not always 0."""
    g = torch.Generator().manual_seed(0)
    fusion = QualityAwareFusion.robust(2, 2)
    criterion = QMFLoss(fusion, 11)
    for label in (0, 0, 1):
        x = torch.randn(2, 11, 2, generator=g, dtype=torch.float64)
        criterion(x, torch.full((11,), label), torch.arange(11))
        assert all(torch.isfinite(v).all() for v in fusion.rule.running.buffers())
        assert torch.isfinite(fusion.eval()(x).logits).all()
        assert fusion.train().uncertainties(x).max() < 100


def test_odds_of_each_modality():
    """By name, in order, in a calibrated rule and in its state, which ``half`` leaves at their precision."""
    x = 2 * torch.randn(3, 40, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    odds = [0.1, 0.3, 7.0]
    fusion = QualityAwareFusion.robust(["a", "b", "c"], 5, odds=dict(zip("cab", [7.0, 0.1, 0.3], strict=True)))
    assert fusion.rule.odds.tolist() == fusion.half().rule.odds.tolist() == odds
    probs = torch.softmax(fusion.rule.likelihood(x), -1)
    rho = torch.tensor(odds, dtype=torch.float64) * (1 + torch.exp(torch.tensor(-3.0, dtype=torch.float64)))
    for out in (fusion(x), torch.func.functional_call(fusion, dict(fusion.named_buffers()), (x,))):
        for i in range(40):
            fused, clean = from_definition(rho, 5 * probs[:, i])
            torch.testing.assert_close(out.logits[i].exp(), fused)
            torch.testing.assert_close(out.weights[:, i], clean)
    other = QualityAwareFusion.robust(["a", "b", "c"], 5)
    compiled = torch.compile(other, fullgraph=True, backend="eager")
    assert not torch.equal(compiled(x).weights, fusion(x).weights)
    other.load_state_dict(fusion.state_dict())
    torch.testing.assert_close(compiled(x).weights, fusion(x).weights)


def test_odds_of_each_modality_pass_the_checks():
    fusion = QualityAwareFusion.robust(3, 4, odds=[0.05, 0.3, 20.0])
    testing.check_all(fusion, settings=settings(testing.DEFAULTS, max_examples=8))
    with pytest.raises(ValueError, match="odds and onset must make odds of 1e-30 to 1e30"):
        fusion.rule.set_odds([0.3, 1e-31, 0.3])
    for odds in (True, {"a": 0.3}):
        with pytest.raises(TypeError, match="odds must be a number, a sequence or a tensor"):
            fusion.rule.set_odds(odds)
    assert fusion.rule.odds.tolist() == [0.05, 0.3, 20.0]
