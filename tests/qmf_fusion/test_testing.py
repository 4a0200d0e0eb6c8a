"""Each check passes on sound fusions and fails on a fusion broken in the way that it watches for."""

import copy
from types import SimpleNamespace

import hypothesis
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from qmf_fusion import FusionModel, QualityAwareFusion, testing
from qmf_fusion.affine import AffineRule

from .test_calibration import data, quietly

FEW = hypothesis.settings(testing.DEFAULTS, max_examples=8)
UNSHRUNK = hypothesis.settings(testing.DEFAULTS, phases=[hypothesis.Phase.generate])
ALL = ["weight_monotonicity", "permutation", "absent", "equations", "single_modality", "repeatable"]


def spread_of_logits(x):
    """An uncertainty of a user's own: flat logits are uncertain ones."""
    return (x.mean(-1) - x.amax(-1)).exp()


COEFFICIENTS = {"alpha": [-0.1, -0.5, -1.0], "beta": [0.0, 1.0, 0.5], "temperature": [1.0, 2.0, 0.5]}
SOUND = [
    *({"uncertainty": u} for u in ("energy", "msp", "entropy", "evidence", spread_of_logits)),
    *({"uncertainty": u, "normalize": True, **COEFFICIENTS} for u in ("energy", "msp", "entropy", "evidence")),
    {"nonnegative": True, **COEFFICIENTS},
    {"learnable": True, **COEFFICIENTS},
    {"learnable": True, "normalize": True, "uncertainty": "entropy", **COEFFICIENTS},
    {"class_dim": 1, "detach_weights": True, **COEFFICIENTS},
]


def describe(options):
    return ", ".join(f"{name}={getattr(value, '__name__', value)}" for name, value in options.items())


@pytest.mark.parametrize("options", SOUND, ids=describe)
def test_sound_layers_pass(options):
    assert testing.check_all(QualityAwareFusion(3, **options), settings=FEW) == ALL


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_sound_layers_pass_in_every_dtype(dtype):
    assert testing.check_all(QualityAwareFusion(2), settings=FEW, dtype=dtype) == ALL


def test_a_wrapped_model_passes():
    model = FusionModel({"rgb": nn.Identity(), "depth": nn.Identity()}, alpha=[-0.1, -0.2])
    assert testing.check_all(model, settings=FEW) == ALL


def of_every_rule():
    """Layers of each rule, before and after calibration."""
    logits, target = data()
    for rule in (
        QualityAwareFusion.robust(3, 4),
        QualityAwareFusion.robust(3, 4, normalize_logits=0.1),
        QualityAwareFusion.robust(3, 4, agreement=False),
        QualityAwareFusion(3, combine="probabilities", **COEFFICIENTS),
        QualityAwareFusion(3, normalize_logits=0.1, **COEFFICIENTS),
        QualityAwareFusion(3, uncertainty="entropy", **COEFFICIENTS),
    ):
        yield rule
        fit = ["temperature"] if "combine=" not in repr(rule) and isinstance(rule.rule, AffineRule) else ()
        yield quietly(copy.deepcopy(rule), logits, target, fit=fit)
    yield quietly(QualityAwareFusion(3, normalize=True, alpha=[-0.1, -0.5, -1.0]), logits, target)
    trained = QualityAwareFusion.robust(3, 4)
    trained.observe(list(logits), target, None)
    trained.observe(list(logits), target, None)
    yield trained


@pytest.mark.parametrize("which", range(14))
def test_sound_layers_of_other_rules_and_calibrated_ones_pass(which):
    layer = list(of_every_rule())[which]
    assert testing.check_all(layer, settings=FEW) == ALL


def test_a_wrapped_robust_model_passes():
    model = FusionModel(
        {"rgb": nn.Identity(), "depth": nn.Identity()}, fusion=QualityAwareFusion.robust(["rgb", "depth"], 4)
    )
    assert testing.check_all(model, settings=FEW) == ALL


class BrokenRule(QualityAwareFusion):
    """Wrong in what is asked of every rule."""

    def forward(self, logits, present=None):
        out = super().forward(logits, present)
        return out._replace(weights=out.weights * 1.5, logits=out.logits * 1.5)


def test_other_rules_fail_where_they_are_broken():
    for layer in of_every_rule():
        layer.__class__ = BrokenRule
        with pytest.raises(AssertionError):
            testing.check_all(layer, settings=UNSHRUNK, exclude=["weight_monotonicity", "permutation", "absent"])


def test_robust_whose_odds_fall_with_u_fails():
    fusion = QualityAwareFusion.robust(3, 4).calibrate(*data())
    fusion.rule.odds_of = lambda u: torch.exp(-u)
    with pytest.raises(AssertionError, match="never rise"):
        testing.check_weight_monotonicity(fusion, settings=UNSHRUNK)


def test_uncertainty_of_robust_is_its_untypicality():
    logits, target = data()
    fusion = QualityAwareFusion.robust(3, 4)
    assert not fusion.uncertainties(logits).any()
    fusion.calibrate(logits, target)
    u = fusion.uncertainties(logits.index_fill(0, torch.tensor([1]), torch.inf))
    _, expected = fusion.rule.evidence(fusion.rule.stack(logits), logits, fusion.rule.statistics())
    assert torch.equal(u[[0, 2]], expected[[0, 2]])
    assert u[1].isnan().all()
    assert (expected > 0).any()


def late_fusion(logits):
    """A fusion of a user's own, without a mask: the plain mean."""
    weights = torch.full((len(logits), *logits[0].shape[:-1]), 1 / len(logits), dtype=logits[0].dtype)
    return SimpleNamespace(
        logits=sum(w.unsqueeze(-1) * x for w, x in zip(weights, logits, strict=True)), weights=weights
    )


def test_a_callable_passes_what_applies_to_it():
    names = [name for name in ALL if name != "absent"]
    assert testing.check_all(late_fusion, settings=FEW) == names
    assert testing.check_all(late_fusion, settings=FEW, num_modalities=2, num_classes=3) == [
        name for name in names if name != "single_modality"
    ]
    assert testing.check_all(late_fusion, settings=FEW, exclude=ALL[1:]) == ["weight_monotonicity"]


class Broken(nn.Module):
    """A sound layer whose results are changed on their way out."""

    def __init__(self, change, **options):
        super().__init__()
        self.layer = QualityAwareFusion(2, **options)
        self.num_modalities = 2
        self.change = change

    def forward(self, logits, present=None):
        out = self.layer(logits, present)
        return SimpleNamespace(**{**out._asdict(), **self.change(out, logits, present, self.layer)})


def fuse(weights, logits):
    return sum(w.unsqueeze(-1) * x for w, x in zip(weights, logits, strict=True))


def rising(out, logits, present, layer):
    return {"weights": -out.weights, "logits": -out.logits}


def by_position(out, logits, present, layer):
    return {"weights": out.weights * torch.tensor([[1.0], [2.0]]).view(2, *(1,) * (out.weights.dim() - 1))}


def first_counts_twice(out, logits, present, layer):
    return {"logits": out.logits + out.weights[0].unsqueeze(-1) * logits[0]}


def mask_forgotten(out, logits, present, layer):
    out = layer(logits)
    return {"weights": out.weights, "logits": out.logits}


def multiplied_away(out, logits, present, layer):
    """0 * NaN is NaN: a mask must choose, not multiply."""
    full = layer(logits)
    mask = torch.ones_like(full.weights) if present is None else present.to(full.weights)
    return {"weights": out.weights, "logits": fuse(full.weights * mask, logits)}


def nan_gradients(out, logits, present, layer):
    """Right values, whose backward passes through 0 * NaN."""
    if present is None:
        return {}
    raw = torch.stack([torch.logsumexp(x, -1) for x in logits]) * 0.1
    return {"weights": torch.where(present, raw, 0)}


def added_bias(out, logits, present, layer):
    return {"logits": out.logits + 0.01}


def wrong_energy(out, logits, present, layer):
    return {"energy": out.energy * 2}


def noise(out, logits, present, layer):
    return {"logits": out.logits + torch.randn(()) * 1e-3}


def random_but_hidden(out, logits, present, layer):
    torch.rand(1)
    return {}


def scribbles(out, logits, present, layer):
    logits[0].mul_(2)
    return {}


MUTANTS = [
    (testing.check_weight_monotonicity, rising, "never rise"),
    (testing.check_permutation, by_position, "must permute the weights"),
    (testing.check_permutation, first_counts_twice, "must leave the logits"),
    (testing.check_absent, mask_forgotten, "must be exactly 0"),
    (testing.check_absent, multiplied_away, "must change nothing"),
    (testing.check_absent, nan_gradients, "gradient must be exactly 0"),
    (testing.check_equations, added_bias, r"Eq\. 11"),
    (testing.check_equations, wrong_energy, r"Eq\. 13"),
    (testing.check_repeatable, noise, "bit for bit"),
    (testing.check_repeatable, random_but_hidden, "global random state"),
    (testing.check_repeatable, scribbles, "inputs must not change"),
]


@pytest.mark.parametrize(("check", "change", "message"), MUTANTS, ids=lambda x: getattr(x, "__name__", None))
def test_each_check_fails_on_a_broken_fusion(check, change, message):
    check(Broken(lambda *_: {}), settings=FEW)  # the scaffold itself is sound
    with pytest.raises(AssertionError, match=message):
        check(Broken(change), settings=UNSHRUNK)


@pytest.mark.parametrize(
    ("change", "message"), [(lambda f: f * 2, "times its weight"), (lambda f: f.flip(-1), "times its weight")]
)
def test_single_modality_fails_on_a_broken_fusion(change, message):
    def broken(logits):
        out = late_fusion(logits)
        return SimpleNamespace(logits=change(out.logits), weights=out.weights)

    testing.check_single_modality(late_fusion, settings=FEW)
    with pytest.raises(AssertionError, match=message):
        testing.check_single_modality(broken, settings=UNSHRUNK)


def test_single_modality_fails_on_weights_of_another_count():
    def broken(logits):
        out = late_fusion(logits)
        return SimpleNamespace(logits=out.logits, weights=torch.cat([out.weights, out.weights]))

    with pytest.raises(AssertionError, match="weights of one modality must be"):
        testing.check_single_modality(broken, settings=UNSHRUNK)


class BrokenLayer(QualityAwareFusion):
    """Broken in what only a layer is asked for."""

    def forward(self, logits, present=None):
        out = super().forward(logits, present)
        if self.broken == "eq 9":
            return out._replace(weights=out.weights * 2, logits=out.logits * 2)
        if self.broken == "temperature":
            return out._replace(energy=QualityAwareFusion(self.num_modalities)(logits).energy)
        if self.broken == "normalised":
            return out._replace(weights=out.weights / 2, logits=out.logits / 2)
        if self.broken == "absent":  # shares are not handed on to those that are there
            share = 1 if out.present is None else out.present.double().mean(0)
            return out._replace(weights=out.weights * share, logits=out.logits * torch.as_tensor(share).unsqueeze(-1))
        return out


@pytest.mark.parametrize(
    ("broken", "check", "message"),
    [
        ("eq 9", testing.check_equations, r"Eq\. 9"),
        ("temperature", testing.check_equations, "energy times"),
        ("normalised", testing.check_single_modality, "normalised weight must be 1"),
        ("absent", testing.check_absent, "without it"),
    ],
)
def test_checks_of_a_layer_fail_on_a_broken_layer(broken, check, message):
    layer = BrokenLayer(2, temperature=2.0, normalize=broken in ("normalised", "absent"))
    layer.broken = None
    check(layer, settings=FEW)
    layer = copy.deepcopy(layer)
    layer.broken = broken
    with pytest.raises(AssertionError, match=message):
        check(layer, settings=UNSHRUNK)


def test_a_fusion_that_fails_now_and_then_is_reported_as_such():
    calls = []

    def moody(logits):
        out = late_fusion(logits)
        calls.append(1)
        return SimpleNamespace(logits=out.logits + (len(calls) == 3), weights=out.weights)

    with pytest.raises(AssertionError, match="repeated calls must agree"):
        testing.check_equations(moody)


def test_check_arguments():
    with pytest.raises(TypeError, match="fusion must be callable"):
        testing.check_all(3)
    with pytest.raises(ValueError, match="exclude must hold names"):
        testing.check_all(late_fusion, exclude=["monotony"])


@given(testing.logits(num_modalities=3, num_classes=4, batch=(2, 3), dtype=testing.floating_dtypes(), extreme=True))
def test_logits_have_the_shape_asked_for(drawn):
    assert [tuple(x.shape) for x in drawn] == [(2, 3, 4)] * 3
    assert all(x.dtype.is_floating_point for x in drawn)


@given(testing.logits())
def test_logits_are_tame_unless_extreme(drawn):
    assert 1 <= len(drawn) <= 4
    assert len({x.shape for x in drawn}) == 1
    assert all(torch.isfinite(x).all() and x.abs().max() <= 1e4 for x in drawn)


@pytest.mark.parametrize(
    "wanted",
    [
        lambda xs: any(x.isnan().any() for x in xs),
        lambda xs: any((x == -torch.inf).any() for x in xs),
        lambda xs: any((x == 1e4).any() for x in xs),
        lambda xs: any((x == -1e4).any() and len(x.unique()) > 2 for x in xs),
        lambda xs: any(not x.is_contiguous() for x in xs),
        lambda xs: any(x.stride(0) == 0 for x in xs),
        lambda xs: xs[0].dtype != xs[1].dtype,
        lambda xs: any(len(x[0].unique()) < x.shape[-1] for x in xs),
    ],
)
def test_logits_reach_the_corners(wanted):
    strategy = testing.logits(num_modalities=2, num_classes=3, batch=2, dtype=testing.floating_dtypes(), extreme=True)
    search = hypothesis.settings(testing.DEFAULTS, max_examples=2000, phases=[hypothesis.Phase.generate])
    assert wanted(hypothesis.find(strategy, wanted, settings=search))


@pytest.mark.parametrize("count", [1, 4])
def test_logits_are_of_one_modality_to_four(count):
    search = hypothesis.settings(testing.DEFAULTS, max_examples=200, phases=[hypothesis.Phase.generate])
    hypothesis.find(testing.logits(), lambda xs: len(xs) == count, settings=search)


@given(st.data(), st.integers(1, 4), st.integers(0, 1))
def test_present_masks(data, num_modalities, min_present):
    mask = data.draw(testing.present_masks(num_modalities, (2, 3), min_present))
    assert mask.shape == (num_modalities, 2, 3)
    assert mask.dtype == torch.bool
    assert (mask.sum(0) >= min_present).all()
