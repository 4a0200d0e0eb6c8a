"""Features: what shows in them only is found, in every way of giving them; errors; and what is learned of them."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

from .test_mixture import clean_data

WIDTHS = [8, None, 6]


def clean_features(n=240, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [3 + torch.randn(n, width, generator=g, dtype=torch.float64) if width else None for width in WIDTHS]


def calibrated(**options):
    logits, target = clean_data()
    fusion = QualityAwareFusion.robust(3, 5, features=WIDTHS, **options)
    return fusion.calibrate(logits, target, features=clean_features()), logits


def test_what_shows_in_the_features_only_costs_weight():
    fusion, logits = calibrated()
    for change in (lambda f: 20 + f, lambda f: 3 + 0 * f, lambda f: 3 + 9 * (f - 3)):
        broken = clean_features()
        broken[0] = change(broken[0])
        before, after = (fusion(logits, features=f) for f in (clean_features(), broken))
        assert (after.weights[0] < before.weights[0]).double().mean() > 0.9
        assert (fusion.uncertainties(logits, broken)[0] > 3).double().mean() > 0.9
        u, clean = fusion.uncertainties(logits, broken), fusion.uncertainties(logits, clean_features())
        torch.testing.assert_close(u[1:], clean[1:])


def test_without_features_it_works_from_logits():
    fusion, logits = calibrated()
    target = clean_data()[1]
    plain = QualityAwareFusion.robust(3, 5).calibrate(logits, target)
    expected = plain(logits)
    for features in (None, [None] * 3, {"0": None, "1": None, "2": None}):
        torch.testing.assert_close(fusion(logits, features=features).logits, expected.logits)
    only = fusion.uncertainties(logits, [clean_features()[0], None, None])
    torch.testing.assert_close(only[1:], plain.uncertainties(logits)[1:])


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_with_features_that_are_not_finite_is_absent(value):
    fusion, logits = calibrated()
    features = clean_features()
    features[0][5, 2] = value
    present = torch.ones(3, 240, dtype=torch.bool)
    present[0, 5] = False
    out, expected = fusion(logits, features=features), fusion(logits, present, clean_features())
    torch.testing.assert_close(out.logits, expected.logits)
    assert out.weights[0, 5] == 0
    assert out.energy[0, 5] == torch.inf
    criteria = [QMFLoss(QualityAwareFusion.robust(3, 5, features=WIDTHS), 240, 0) for _ in range(2)]
    for criterion, given, mask in zip(criteria, (features, clean_features()), (None, present), strict=True):
        losses = [criterion(logits, clean_data()[1], None, mask, given).loss for _ in range(3)]
        assert torch.isfinite(losses[-1])
    torch.testing.assert_close(*(c.fusion.state_dict() for c in criteria))


def test_absent_rows_count_in_no_statistics():
    logits, target = clean_data()
    present = torch.rand(3, 240, generator=torch.Generator().manual_seed(1)) > 0.3
    states = []
    for filler in (0.0, 1e6, torch.nan):
        features = [
            f if f is None else torch.where(p[:, None], f, filler)
            for f, p in zip(clean_features(), present, strict=True)
        ]
        fusion = QualityAwareFusion.robust(3, 5, features=WIDTHS)
        criterion = QMFLoss(fusion, 240, 0)
        for _ in range(3):
            criterion(logits, target, None, present, features)
        fusion.calibrate(logits, target, present=present, features=features)
        states.append(fusion.state_dict())
    torch.testing.assert_close(states[0], states[1], rtol=0, atol=0)
    torch.testing.assert_close(states[0], states[2], rtol=0, atol=0)


def test_gathered_come_near_fitted_and_survive_calibration_without_features():
    logits, target = clean_data(n=4000, k=4)
    features = clean_features(4000)
    fusion = QualityAwareFusion.robust(3, 4, features=WIDTHS)
    criterion = QMFLoss(fusion, 4000, 0)
    for index in torch.randperm(4000, generator=torch.Generator().manual_seed(0)).split(50):
        criterion(logits[:, index], target[index], None, None, [f if f is None else f[index] for f in features])
    gathered = fusion.uncertainties(logits, features)
    kept = QualityAwareFusion.robust(3, 4, features=WIDTHS)
    kept.load_state_dict(fusion.state_dict())
    fusion.calibrate(logits, target, features=features)
    torch.testing.assert_close(gathered, fusion.uncertainties(logits, features), rtol=0.3, atol=0.5)
    broken = [f if f is None else f + 20 for f in features]
    assert (kept.calibrate(logits, target).uncertainties(logits, broken)[0] > 6).all()


def test_no_gradient_reaches_the_features():
    fusion, logits = calibrated()
    features = [f if f is None else f.requires_grad_() for f in clean_features()]
    x = logits.clone().requires_grad_()
    out = fusion(x, features=features)
    out.logits.square().sum().backward()
    assert features[0].grad is None
    assert x.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("features", "error", "match"),
    [
        ([torch.zeros(240, 9), None, None], ValueError, r"features\['0'\] must be \(240, 8\).*got \(240, 9\)"),
        ([torch.zeros(10, 8), None, None], ValueError, r"features\['0'\] must be \(240, 8\).*got \(10, 8\)"),
        ([torch.zeros(240, 8)], ValueError, "features must hold 3 modalities.*got 1"),
        ({"0": None}, ValueError, "features must hold the modalities"),
        ([torch.zeros(240, 8, dtype=torch.int64), None, None], TypeError, r"features\['0'\] must be a floating.*int64"),
        ([[1.0], None, None], TypeError, r"features\['0'\] must be a floating point tensor, got list"),
        (3, TypeError, "features must be a sequence"),
    ],
)
def test_errors_name_features(features, error, match):
    fusion, logits = calibrated()
    calls = [
        lambda: fusion(logits, features=features),
        lambda: fusion.uncertainties(logits, features),
        lambda: QMFLoss(fusion, 240, 0)(logits, clean_data()[1], features=features),
        lambda: fusion.calibrate(logits, clean_data()[1], features=features),
    ]
    for call in calls:
        with pytest.raises(error, match=match):
            call()


@pytest.mark.parametrize("make", [lambda: QualityAwareFusion(3), lambda: QualityAwareFusion.robust(3, 5)])
def test_a_rule_that_takes_none_says_so(make):
    logits, target = clean_data()
    for call in (
        lambda: make()(logits, features=clean_features()),
        lambda: QMFLoss(make(), 240, 0)(logits, target, features=clean_features()),
        lambda: make().calibrate(logits, target, features=clean_features()),
    ):
        with pytest.raises(ValueError, match="features must be None for a rule that takes none"):
            call()
    torch.testing.assert_close(make()(logits, features=[None] * 3).logits, make()(logits).logits)


class Head(nn.Module):
    def __init__(self, width, kind):
        super().__init__()
        self.encoder, self.last, self.kind = nn.Linear(4, width), nn.Linear(width, 5), kind

    def forward(self, x):
        features = self.encoder(x)
        logits = self.last(features)
        if self.kind == "tuple":
            return logits, features
        return SimpleNamespace(logits=logits, features=features) if self.kind == "object" else logits


def model_of(fusion=None):
    heads = {"a": Head(8, "tuple"), "b": Head(7, "plain"), "c": Head(6, "object")}
    return FusionModel(heads, fusion or QualityAwareFusion.robust(list(heads), 5, features=WIDTHS))


def test_a_model_takes_them_from_its_heads():
    model = model_of()
    criterion = QMFLoss(model.fusion, 40)
    x = torch.randn(40, 4, generator=torch.Generator().manual_seed(0))
    inputs = dict.fromkeys("abc", x)
    for _ in range(4):
        out = model(inputs)
        criterion(out.unimodal_logits, torch.arange(40) % 5, torch.arange(40), features=out.features).loss.backward()
    assert [None if f is None else f.shape[-1] for f in out.features] == WIDTHS
    model.eval()
    out = model(inputs)
    assert model.fusion.rule.statistics().known[:, 3].tolist() == [True, False, True]
    torch.testing.assert_close(out.logits, model.fusion(out.unimodal_logits, features=out.features).logits)
    assert not torch.allclose(out.weights, model.fusion(out.unimodal_logits).weights)
    assert model({**inputs, "a": None}).features[0] is None
    other = model_of(QualityAwareFusion(["a", "b", "c"]))
    out = other(inputs)
    assert out.features is None  # so that the line that trains is the same for every rule
    QMFLoss(other.fusion, 40)(out.unimodal_logits, torch.arange(40) % 5, torch.arange(40), features=out.features)
    with pytest.raises(TypeError, match=r"heads\['a'\] must return logits or an object with .logits, got tuple"):
        FusionModel({"a": nn.LSTM(4, 5)})({"a": x})


@pytest.mark.filterwarnings("ignore")
def test_training_under_compile_of_the_criterion_too():
    """The backward of a compiled forward may need the statistics that the criterion has replaced since."""
    torch.compiler.reset()
    results = []
    for compiled in (False, True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = model_of()
        criterion = QMFLoss(model.fusion, 40)
        run, loss_of = model, criterion
        if compiled:
            run = torch.compile(model, backend="aot_eager")
            loss_of = torch.compile(criterion, backend="aot_eager")
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        for step in range(4):
            x = torch.randn(40, 4, generator=torch.Generator().manual_seed(step))
            out = run(dict.fromkeys("abc", x))
            result = loss_of(out.unimodal_logits, torch.arange(40) % 5, torch.arange(40), features=out.features)
            optimizer.zero_grad()
            (result.loss + out.logits.square().mean()).backward()
            optimizer.step()
        results.append([*model.state_dict().values(), *criterion.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_vmap_and_bfloat16():
    fusion, logits = calibrated()
    fusion.eval()
    features = [f if f is None else f.float() for f in clean_features()]
    x = logits.float()
    expected = fusion(x, features=features)

    def one(a, b, c, f, g):
        out = fusion([a, b, c], features=[f, None, g])
        return out.logits, out.weights

    got = torch.func.vmap(one, out_dims=(0, 1))(*x, features[0], features[2])
    torch.testing.assert_close(got[0], expected.logits)
    torch.testing.assert_close(got[1], expected.weights)
    half = fusion(x.bfloat16(), features=[f if f is None else f.bfloat16() for f in features])
    assert half.logits.dtype == torch.float32
    torch.testing.assert_close(half.logits, expected.logits, rtol=0.1, atol=0.3)


def test_dense_features_lie_as_the_logits_do():
    fusion, logits = calibrated()
    dense = QualityAwareFusion.robust(3, 5, features=WIDTHS, class_dim=1)
    dense.load_state_dict(fusion.state_dict())
    shaped = [x.view(4, 6, 10, 5).movedim(-1, 1) for x in logits]
    features = [f if f is None else f.view(4, 6, 10, -1).movedim(-1, 1) for f in clean_features()]
    expected = fusion(logits, features=clean_features()).logits
    torch.testing.assert_close(dense(shaped, features=features).logits.movedim(1, -1).reshape(240, 5), expected)
    with pytest.raises(ValueError, match=r"features\['0'\] must be \(4, 8, 6, 10\)"):
        dense(shaped, features=[features[0].movedim(1, -1), None, None])


def test_energies_are_of_the_logits_as_given():
    fusion, logits = calibrated()
    expected = -logits.logsumexp(-1)
    torch.testing.assert_close(fusion(logits, features=clean_features()).energy, expected)
    out = QMFLoss(fusion, 240, 0)(logits, clean_data()[1], features=clean_features())
    torch.testing.assert_close(out.energy, expected)


def test_training_without_the_features_that_the_rule_has_widths_for_is_told_once():
    logits, target = clean_data()
    criterion = QMFLoss(QualityAwareFusion.robust(3, 5, features=WIDTHS), 240)
    with pytest.warns(UserWarning, match="features are not given, though the rule has widths") as told:
        criterion(logits, target, torch.arange(240))
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        criterion(logits, target, torch.arange(240))
        QMFLoss(QualityAwareFusion.robust(3, 5), 240)(logits, target, torch.arange(240))
        with torch.no_grad():
            QMFLoss(QualityAwareFusion.robust(3, 5, features=WIDTHS), 240).eval()(logits, target)


def test_a_batch_without_the_modality_that_has_features_lacks_none():
    class Head(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = FusionModel({"a": Head(8, 5), "b": nn.Linear(4, 5)}, "robust", num_classes=5, features=[8, None])
    criterion = QMFLoss(model.fusion, 6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for a in (torch.randn(6, 8), None):
            criterion(model({"a": a, "b": torch.randn(6, 4)}), torch.arange(6) % 5, torch.arange(6))
