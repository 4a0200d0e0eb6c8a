"""Test-time adaptation: its loss against the definition, what moves, what never breaks it, and how it is undone."""

import copy
import itertools
import math

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QualityAwareFusion
from qmf_fusion.adaptation import TestTimeAdaptation, adaptation_loss

NAMES = ("a", "b", "c")
FUSIONS = {
    "default": lambda: QualityAwareFusion(NAMES),
    "learnable": lambda: QualityAwareFusion(NAMES, learnable=True, beta=0.3),
    "entropy, shares": lambda: QualityAwareFusion(NAMES, uncertainty="entropy", normalize=True),
    "probabilities": lambda: QualityAwareFusion(NAMES, combine="probabilities"),
    "classes first": lambda: QualityAwareFusion(NAMES, class_dim=1),
    "robust": lambda: QualityAwareFusion.robust(NAMES, 4, features=[3, None, None]),
}


def stream(batches=6, size=32, seed=0):
    """Logits of three heads of which the last sees noise alone: ``[batches, 3, size, 4]``."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(4, (batches, 1, size), generator=g)
    signal = 4 * nn.functional.one_hot(target, 4) * torch.tensor([1.0, 1.0, 0.0]).view(3, 1, 1)
    return signal + torch.randn(batches, 3, size, 4, generator=g)


def given(fusion, x):
    """A batch ``[3, B, 4]`` as the fusion takes it: classes first, or with features."""
    features = [x[0, ..., :3], None, None] if fusion.rule.feature_widths else None
    return list(x), None, features


def run(adaptation, batches):
    return [adaptation.step(*given(adaptation.fusion, x)) for x in batches]


def definition(fused, counted, balance):
    probs = [p for p, c in zip(fused.double().softmax(-1).tolist(), counted.tolist(), strict=True) if c]
    confidence = sum(-max(p) * math.log(max(p)) for p in probs) / len(probs)
    mean = [sum(column) / len(probs) for column in zip(*probs, strict=True)]
    return confidence + balance * sum(q * math.log(q) for q in mean if q > 0)


def test_loss_is_the_definition():
    fused = 3 * torch.randn(9, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fused[2, 3] = -torch.inf
    counted = torch.arange(9) % 4 != 0
    for balance in (0.0, 0.7):
        expected = definition(fused, counted, balance)
        assert float(adaptation_loss(fused, counted, balance)) == pytest.approx(expected, rel=1e-12)
    rows = fused.clone().requires_grad_()
    adaptation_loss(rows, counted).backward()
    assert torch.isfinite(rows.grad).all()
    assert not rows.grad[~counted].any()
    assert torch.autograd.gradcheck(lambda x: adaptation_loss(x, counted[3:]), fused[3:].clone().requires_grad_())
    assert float(adaptation_loss(fused, torch.zeros(9, dtype=torch.bool))) == 0


@pytest.mark.parametrize("name", FUSIONS)
def test_a_step_descends_the_loss_of_the_fusions_own_numbers(name):
    """By finite differences of a fusion that is built with the numbers; free factors' logarithms sum to 0."""
    fusion = FUSIONS[name]().double()
    x = stream(1)[0].double()
    adaptation = TestTimeAdaptation(fusion, lr=0.01)
    adaptation.step(*given(fusion, x))
    step = 1e-6
    expected = torch.zeros_like(adaptation.log_factors)
    for p, m in itertools.product(range(len(expected)), range(3)):
        losses = []
        for sign in (-1, 1):
            other, log_factors = copy.deepcopy(fusion), torch.zeros_like(expected)
            log_factors[p, m] = sign * step
            other.rule.load_state_dict(other.rule.adapted(log_factors.exp()), strict=False)
            fused = other(*given(other, x)).logits.detach()
            losses.append(float(adaptation_loss(fused.movedim(other.class_dim, -1), torch.ones(32, dtype=torch.bool))))
        expected[p, m] = -0.01 * (losses[1] - losses[0]) / (2 * step)
    torch.testing.assert_close(adaptation.log_factors, expected - expected.mean(1, keepdim=True), rtol=1e-4, atol=1e-9)
    assert adaptation.log_factors.abs().max() > 1e-6


@pytest.mark.parametrize("name", FUSIONS)
def test_the_fusion_stays_and_reset_is_exact(name):
    fusion = FUSIONS[name]()
    before = copy.deepcopy(fusion.state_dict())
    plain = [fusion(*given(fusion, x)) for x in stream()]
    adaptation = TestTimeAdaptation(fusion, lr=50.0, limit=3.0)
    outs = run(adaptation, stream())
    assert not torch.equal(outs[-1].weights, plain[-1].weights)
    for factors in adaptation.factors.values():
        assert ((factors > 1 / 3.001) & (factors < 3.001)).all()
        assert float(factors.log().sum()) == pytest.approx(0, abs=1e-9)
    torch.testing.assert_close(adaptation(*given(fusion, stream()[-1])).weights, outs[-1].weights, rtol=0, atol=0)
    assert all(torch.equal(x, before[key]) for key, x in fusion.state_dict().items())
    assert all(p.grad is None for p in fusion.parameters())
    adaptation.reset()
    for x, expected in zip(stream(), plain, strict=True):
        out = adaptation(*given(fusion, x))
        assert torch.equal(out.logits, expected.logits)
        assert torch.equal(out.weights, expected.weights)


@pytest.mark.parametrize("name", FUSIONS)
def test_what_was_learned_can_be_kept_in_the_fusion(name):
    """As docs/adaptation.md says; the adaptation does not multiply by it again."""
    fusion, batches = FUSIONS[name](), stream()
    before = copy.deepcopy(fusion.state_dict())
    adaptation = TestTimeAdaptation(fusion, lr=50.0)
    expected = run(adaptation, batches)[-1]
    factors = torch.stack(list(adaptation.factors.values()))
    fusion.rule.load_state_dict(fusion.rule.adapted(factors), strict=False)
    adaptation.reset()
    for answer in (fusion, adaptation):
        out = answer(*given(fusion, batches[-1]))
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.weights, expected.weights)
    fusion.reset_calibration()
    if name == "robust":
        torch.testing.assert_close(fusion.rule.odds, before["rule.odds"] * factors[0])
    else:
        torch.testing.assert_close(fusion.state_dict(), before, rtol=0, atol=0)


def test_it_turns_to_the_modalities_that_can_be_relied_on():
    for fusion, number, sign in ((QualityAwareFusion(NAMES), "weights", 1), (FUSIONS["robust"](), "odds", -1)):
        adaptation = TestTimeAdaptation(fusion, lr=10.0)
        run(adaptation, stream(20))
        factors = sign * adaptation.factors[number].log()
        assert factors[2] < factors[:2].min()


def test_state_is_all_there_is_and_equal_runs_are_equal():
    batches, state = stream(), torch.random.get_rng_state()
    whole, first = (TestTimeAdaptation(FUSIONS["robust"](), lr=10.0) for _ in range(2))
    expected = run(whole, batches)
    run(first, batches[:3])
    second = TestTimeAdaptation(FUSIONS["robust"](), lr=10.0)
    second.load_state_dict(first.half().state_dict())  # which leaves it at its precision
    for out, other in zip(run(second, batches[3:]), expected[3:], strict=True):
        assert torch.equal(out.logits, other.logits)
    assert set(second.state_dict()) == {"log_factors", "_extra_state"}
    assert torch.equal(state, torch.random.get_rng_state())


def test_state_of_another_fusion_does_not_load_not_even_in_part():
    """As with the fusion's own: the same numbers would multiply others, or those of other modalities."""
    entropy = QualityAwareFusion(["rgb", "depth"], uncertainty="entropy")
    learned = TestTimeAdaptation(QualityAwareFusion(["rgb", "depth"]), lr=10.0)
    learned.step(list(stream(1)[0, 1:]))
    state = learned.state_dict()
    for names in (["rgb", "depth"], 2):
        same = TestTimeAdaptation(QualityAwareFusion(names))
        same.load_state_dict(state)
        assert torch.equal(same.log_factors, learned.log_factors)
    for fusion, match in (
        (
            QualityAwareFusion(["depth", "rgb"]),
            r"of the modalities \['rgb', 'depth'\], and this one is of \['depth",
        ),
        (entropy, r"of another kind of fusion, .*'energy'.*, and this one is .*'entropy'"),
    ):
        other = nn.ModuleDict({"adaptation": TestTimeAdaptation(fusion)})
        with pytest.raises(RuntimeError, match=match):
            other.load_state_dict({f"adaptation.{name}": value for name, value in state.items()})
        assert not other["adaptation"].log_factors.any()


def test_episodic_forgets_every_batch():
    fusion, batches = FUSIONS["default"](), stream()
    adaptation = TestTimeAdaptation(fusion, lr=10.0, episodic=True)
    for x in batches:
        out = adaptation.step(list(x))
        alone = TestTimeAdaptation(fusion, lr=10.0).step(list(x))
        assert torch.equal(out.logits, alone.logits)


def hold_the_second(fusion):
    """As ``calibrate`` does."""
    held = torch.tensor([0.0, 0.7, 0.0], dtype=torch.float64)
    if hasattr(fusion.rule, "coefficients"):
        fusion.rule.coefficients.hold(held)
    fusion.calibration.set(torch.full((3,), 0.7), held)


def test_what_calibration_holds_does_not_move():
    fusion = QualityAwareFusion(NAMES)
    hold_the_second(fusion)
    adaptation = TestTimeAdaptation(fusion, lr=10.0)
    out = run(adaptation, stream())[-1]
    assert adaptation.log_factors[:, 1].tolist() == [0.0, 0.0]
    assert adaptation.log_factors[0, 0] == -adaptation.log_factors[0, 2] != 0
    torch.testing.assert_close(out.weights[1], torch.full((32,), 0.7))


@pytest.mark.parametrize("name", ["default", "learnable", "robust"])
def test_what_calibration_holds_from_now_on_stands_at_once(name):
    """Though factors of it have been learned; the others' go on from theirs, whose logarithms sum to 0."""
    fusion, batches = FUSIONS[name](), stream()
    adaptation = TestTimeAdaptation(fusion, lr=50.0, limit=3.0)
    run(adaptation, batches)
    learned = {number: factors.log() for number, factors in adaptation.factors.items()}
    assert all(factors[1] != 0 for factors in learned.values())
    hold_the_second(fusion)
    for number, factors in adaptation.factors.items():
        first, last = learned[number][0], learned[number][2]
        expected = torch.stack([(first - last) / 2, torch.zeros_like(first), (last - first) / 2])
        torch.testing.assert_close(factors.log(), expected)
    out = adaptation(*given(fusion, batches[0]))
    torch.testing.assert_close(out.weights[1], torch.full((32,), 0.7))
    alone = TestTimeAdaptation(fusion, lr=50.0, limit=3.0)
    alone.log_factors.copy_(torch.stack([factors.log() for factors in adaptation.factors.values()]))
    for x in batches:
        outs = [each.step(*given(fusion, x)) for each in (adaptation, alone)]
        torch.testing.assert_close(outs[0].logits, outs[1].logits)


def test_factors_stay_within_the_limit_when_some_are_held():
    fusion = QualityAwareFusion(4)
    adaptation = TestTimeAdaptation(fusion, limit=2.0)
    adaptation.log_factors.copy_(math.log(2) * torch.tensor([1.0, -1.0, -1.0, 1.0]))
    held = torch.tensor([0.0, 0.0, 0.0, 0.7])
    fusion.calibration.set(torch.full((4,), 0.7), held)
    factors = adaptation.factors["weights"].tolist()
    assert factors == pytest.approx([2.0, 0.5**0.5, 0.5**0.5, 1.0])


DEGENERATE = {
    "one row": lambda x: (list(x[:, :1]), None),
    "a row without a batch": lambda x: (list(x[:, 0]), None),
    "all of one class": lambda x: (list(torch.zeros_like(x).index_fill(-1, torch.tensor(1), 50.0)), None),
    "equal logits": lambda x: (list(torch.zeros_like(x)), None),
    "huge": lambda x: (list(1e30 * x), None),
    "NaN rows": lambda x: (list(x.index_fill(1, torch.arange(16), torch.nan)), None),
    "all NaN": lambda x: (list(torch.full_like(x, torch.nan)), None),
    "all absent": lambda x: (list(x), torch.zeros(3, x.shape[1], dtype=torch.bool)),
    "one there": lambda x: (list(x), torch.tensor([True, False, False])),
    "None": lambda x: ([x[0], None, x[2]], None),
    "every class ruled out": lambda x: (list(x.masked_fill(torch.eye(3, 4).view(3, 1, 4) > 0, -torch.inf)), None),
}


@pytest.mark.parametrize("name", ["default", "entropy, shares", "robust"])
@pytest.mark.parametrize("case", DEGENERATE)
def test_degenerate_batches_never_break_it(name, case):
    fusion, x = FUSIONS[name](), stream(1)[0]
    logits, present = DEGENERATE[case](x)
    adaptation = TestTimeAdaptation(fusion, lr=10.0)
    run(adaptation, stream(2))
    before = adaptation.log_factors.clone()
    out = adaptation.step(logits, present)
    assert torch.isfinite(adaptation.log_factors).all()
    if case in ("all NaN", "all absent", "one there"):
        torch.testing.assert_close(adaptation.log_factors, before, rtol=0, atol=1e-15)
    there = torch.isfinite(out.energy)
    assert torch.isfinite(out.weights).all()
    assert not out.weights[~there].any()
    run(adaptation, stream(2))
    assert torch.isfinite(adaptation.log_factors).all()


def test_rows_that_are_not_there_teach_as_if_they_were_not_in_the_batch():
    x, present = stream(1)[0], torch.ones(3, 32, dtype=torch.bool)
    present[:2, :10] = False
    for name in ("default", "robust"):
        some, fewer = (TestTimeAdaptation(FUSIONS[name]()) for _ in range(2))
        some.step(list(x), present)
        fewer.step(list(x[:, 10:]))
        torch.testing.assert_close(some.log_factors, fewer.log_factors)


def test_it_takes_a_models_output_in_every_mode():
    model = FusionModel({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)}, "robust", num_classes=4).eval()
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    found = []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        adaptation = TestTimeAdaptation(model.fusion)
        with mode():
            out = adaptation.step(model({"a": x, "b": x.flip(0)}))
        found.append(adaptation.log_factors.clone())
        assert not found[-1].is_inference()
        assert out.logits.requires_grad == (mode is torch.enable_grad)
    assert all(torch.equal(found[0], other) for other in found[1:])
    assert found[0].abs().sum() > 0
    assert all(p.grad is None for p in model.parameters())


def loaded(adaptation, assign):
    adaptation.load_state_dict({name: x.clone() for name, x in adaptation.state_dict().items()}, assign=assign)
    return adaptation


IN_INFERENCE_MODE = {
    "made": lambda fusion: TestTimeAdaptation(fusion, lr=10.0),
    "reset": lambda fusion: TestTimeAdaptation(fusion, lr=10.0).reset(),
    "loaded": lambda fusion: loaded(TestTimeAdaptation(fusion, lr=10.0), assign=False),
    "loaded and taken over": lambda fusion: loaded(TestTimeAdaptation(fusion, lr=10.0), assign=True),
}


@pytest.mark.parametrize("how", IN_INFERENCE_MODE)
def test_it_learns_and_forgets_wherever_it_was_made(how):
    fusion, x = FUSIONS["default"](), list(stream(1)[0])
    expected = TestTimeAdaptation(fusion, lr=10.0)
    expected.step(x)
    for mode in (torch.enable_grad, torch.inference_mode):
        with torch.inference_mode():
            adaptation, forgetful = (IN_INFERENCE_MODE[how](fusion) for _ in range(2))
        with mode():
            adaptation.step(x)
            forgetful.reset().step(x)
        assert torch.equal(adaptation.log_factors, expected.log_factors)
        assert torch.equal(forgetful.log_factors, expected.log_factors)
        assert not adaptation.reset().log_factors.any()
        loaded(adaptation, assign=False)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: TestTimeAdaptation(nn.Linear(2, 2)), TypeError, "fusion must be a QualityAwareFusion"),
        (lambda: TestTimeAdaptation(QualityAwareFusion(2), lr=0.0), ValueError, "lr must be finite and above 0, got 0"),
        (lambda: TestTimeAdaptation(QualityAwareFusion(2), lr="a"), TypeError, "lr must be a number, got 'a'"),
        (lambda: TestTimeAdaptation(QualityAwareFusion(2), limit=1.0), ValueError, "limit must be finite and above 1"),
        (lambda: TestTimeAdaptation(QualityAwareFusion(2), limit=math.inf), ValueError, "limit must be finite"),
        (lambda: TestTimeAdaptation(QualityAwareFusion(2), balance=-1.0), ValueError, "balance must be finite and at"),
        (
            lambda: TestTimeAdaptation(QualityAwareFusion(2, detach_weights=True)),
            ValueError,
            r"fusion must have numbers to adapt that its fused logits send gradients to, got AffineRule\(.*detach_w",
        ),
        (
            lambda: TestTimeAdaptation(QualityAwareFusion(["rgb"])),
            ValueError,
            r"fusion must be of at least 2 modalities, got \['rgb'\]",
        ),
        (
            lambda: TestTimeAdaptation(QualityAwareFusion(2), episodic="no"),
            TypeError,
            "episodic must be True or False, got 'no'",
        ),
        (lambda: TestTimeAdaptation(QualityAwareFusion(2)).step([torch.zeros(3, 4)]), ValueError, "logits must hold"),
    ],
)
def test_bad_arguments_are_named(make, error, match):
    with pytest.raises(error, match=match):
        make()
