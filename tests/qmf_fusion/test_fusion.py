"""The layer (Eq. 13, 9, 11) against the reference, over shapes, dtypes, strides, masks and broken values."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmf_fusion import QualityAwareFusion, functional, testing
from qmf_fusion.uncertainty import UNCERTAINTIES, energy_score

from . import reference

COEFFICIENTS = {"alpha": [-0.1, -0.5, -1.0], "beta": [0.0, 1.0, 0.5], "temperature": [1.0, 2.0, 0.5]}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def heads(num=3, *shape, dtype=torch.float64, grad=False):
    shape = shape or (5, 4)
    return [(randn(*shape, seed=m) * 3).to(dtype).requires_grad_(grad) for m in range(num)]


@pytest.mark.parametrize("name", UNCERTAINTIES)
@pytest.mark.parametrize("classes", [1, 2, 7, 40])
def test_uncertainties_match_their_formulas(name, classes):
    x = randn(6, 2, classes) * 5
    torch.testing.assert_close(UNCERTAINTIES[name](x), reference.UNCERTAINTIES[name](x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", UNCERTAINTIES)
def test_uncertainties_pass_gradcheck(name):
    x = randn(3, 4).requires_grad_()
    assert torch.autograd.gradcheck(UNCERTAINTIES[name], x)


@pytest.mark.parametrize("name", UNCERTAINTIES)
def test_uncertainties_stay_in_range(name):
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [0.0, -torch.inf, 1.0]])
    u = UNCERTAINTIES[name](x)
    assert torch.isfinite(u).all()
    if name != "energy":
        assert (u >= 0).all()
        assert (u <= 1 + 1e-6).all()


def test_energy_takes_a_temperature_per_row():
    x, t = randn(3, 4), torch.tensor([0.5, 1.0, 2.0], dtype=torch.float64)
    expected = torch.stack([reference.energy(x[i], t[i].item()) for i in range(3)])
    torch.testing.assert_close(energy_score(x, t), expected)
    with pytest.raises(ValueError, match="temperature must be positive, got 0"):
        energy_score(x, 0)


def own_uncertainty(x):
    return (x.mean(-1) - x.amax(-1)).exp()


@pytest.mark.parametrize("uncertainty", ["energy", "msp", "entropy", "evidence", own_uncertainty])
@pytest.mark.parametrize("options", [{}, {"nonnegative": True}, {"normalize": True}], ids=str)
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("shape", [(5, 4), (4,), (2, 3, 2, 6)], ids=str)
def test_matches_the_equations(uncertainty, options, learnable, shape):
    logits = [x - 2 for x in heads(3, *shape)]
    fusion = QualityAwareFusion(3, uncertainty=uncertainty, learnable=learnable, **COEFFICIENTS, **options).double()
    rtol = 1e-6 if learnable else 1e-12  # parameters start in float32
    out = fusion(logits)
    expected = reference.weights(logits, uncertainty, **COEFFICIENTS, **options)
    torch.testing.assert_close(out.weights, expected, rtol=rtol, atol=rtol)
    torch.testing.assert_close(out.logits, reference.fuse(logits, expected), rtol=rtol, atol=10 * rtol)
    energies = [reference.energy(x, t) for x, t in zip(logits, COEFFICIENTS["temperature"], strict=True)]
    torch.testing.assert_close(out.energy, torch.stack(energies), rtol=rtol, atol=rtol)
    assert out.present is None
    assert all(x is y for x, y in zip(out.unimodal_logits, logits, strict=True))


def test_published_defaults():
    logits = heads(2)
    out = QualityAwareFusion(2)(logits)
    torch.testing.assert_close(out.weights, reference.weights(logits, alpha=-0.1, beta=0.0, temperature=1.0))
    out = QualityAwareFusion(2, uncertainty="msp")(logits)
    torch.testing.assert_close(out.weights, reference.weights(logits, "msp", alpha=-1.0, beta=1.0))


def test_energy_weights_go_negative_unless_asked_not_to():
    low = [torch.full((1, 3), -50.0), torch.zeros(1, 3)]
    assert QualityAwareFusion(2)(low).weights[0] < 0
    assert QualityAwareFusion(2, nonnegative=True)(low).weights[0] == 0
    shares = QualityAwareFusion(2, normalize=True)([low[0], low[0]]).weights
    assert shares.tolist() == [[0.5], [0.5]]  # every weight is 0: equal shares


def test_normalize_shares_among_those_present():
    mask = torch.tensor([[True, True, False], [True, False, False], [True, False, False]])
    w = QualityAwareFusion(3, normalize=True)(heads(3, 3, 4), present=mask).weights
    torch.testing.assert_close(w.sum(0), torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64))
    assert not w[~mask].any()
    low = [x - 100 for x in heads(3, 3, 4)]
    w = QualityAwareFusion(3, normalize=True)(low, present=mask).weights
    assert w.tolist() == [[1 / 3, 1.0, 0.0], [1 / 3, 0.0, 0.0], [1 / 3, 0.0, 0.0]]


@given(st.data())
def test_matches_the_equations_in_any_dtype_and_layout(data):
    logits = data.draw(testing.logits(dtype=testing.floating_dtypes()))
    mask = data.draw(st.none() | testing.present_masks(len(logits), tuple(logits[0].shape[:-1])))
    out = QualityAwareFusion(len(logits))(logits, mask)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
    assert (out.logits.dtype, out.weights.dtype, out.energy.dtype) == (wide, wide, wide)
    expected = reference.weights(logits, present=mask)
    fused = reference.fuse(logits, expected, mask)
    size = max(1, max((w.unsqueeze(-1) * x).abs().max() for w, x in zip(expected, logits, strict=True)))
    eps = torch.finfo(wide).eps
    assert (out.weights - expected).abs().max() <= 32 * eps * (1 + expected.abs().max())
    assert (out.logits - fused).abs().max() <= 64 * eps * size * len(logits)


@given(st.data())
def test_a_broken_row_touches_nothing_else(data):
    """Other rows are bit-equal to a batch from which the bad rows' modality is absent; no NaN; no gradient."""
    logits = data.draw(testing.logits(dtype=testing.floating_dtypes(), extreme=True))
    options = data.draw(
        st.sampled_from(
            [
                {},
                {"normalize": True},
                {"temperature": 2.0},
                {"uncertainty": "msp", "nonnegative": True},
                {"uncertainty": "entropy"},
                {"uncertainty": "evidence", "normalize": True},
                {"uncertainty": own_uncertainty},
            ]
        )
    )
    leaves = [x.clone().requires_grad_() for x in logits]
    fusion = QualityAwareFusion(len(logits), **options)
    out = fusion(leaves)
    bad = torch.stack([~torch.isfinite(torch.logsumexp(x.double(), -1)) for x in logits])
    assert not out.weights[bad].any()
    assert (out.energy[bad] == torch.inf).all()
    assert not out.logits.isnan().any()
    assert torch.isfinite(out.weights).all()
    out.weights.sum().backward(retain_graph=True)
    torch.where(torch.isfinite(out.logits), out.logits, 0).sum().backward()
    for x, rows in zip(leaves, bad, strict=True):
        assert not x.grad.isnan().any()
        assert not x.grad[rows].any()
    tidy = [torch.where(rows.unsqueeze(-1), 0, x) for x, rows in zip(logits, bad, strict=True)]
    expected = fusion(tidy, present=~bad)
    assert torch.equal(out.logits, expected.logits)
    assert torch.equal(out.weights, expected.weights)
    assert torch.equal(out.energy, expected.energy)


@pytest.mark.parametrize("value", [1e4, -1e4])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
def test_large_logits_do_not_overflow(value, dtype):
    x = torch.full((2, 3), value, dtype=dtype)
    out = QualityAwareFusion(1)([x])
    torch.testing.assert_close(out.energy.double(), reference.energy(x)[None], rtol=1e-6, atol=0)
    assert torch.isfinite(out.logits).all()


@pytest.mark.parametrize("uncertainty", UNCERTAINTIES)
def test_float64_reaches_beyond_float32(uncertainty):
    x = torch.tensor([[1e39, 0.0, -1e39]], dtype=torch.float64)
    expected = reference.weights([x], uncertainty, alpha=-0.5, beta=1.0)
    torch.testing.assert_close(
        QualityAwareFusion(1, uncertainty=uncertainty, alpha=-0.5, beta=1.0)([x]).weights, expected
    )


def test_minus_infinity_rules_a_class_out():
    out = QualityAwareFusion(2)([torch.tensor([[-torch.inf, 1.0, 2.0]]), torch.tensor([[-90.0, -80.0, -70.0]])])
    assert out.logits[0, 0] == -torch.inf
    assert torch.isfinite(out.logits[0, 1:]).all()
    assert out.weights[1] < 0  # and no weight's sign turns that around
    flipped = QualityAwareFusion(2)([torch.tensor([[1.0, 1.0, 2.0]]), torch.tensor([[-torch.inf, -80.0, -70.0]])])
    assert flipped.logits[0, 0] == -torch.inf


def test_a_sample_with_no_modality_has_logits_of_zero():
    logits = heads(2, 3, 4)
    mask = torch.tensor([[True, False, True], [True, False, True]])
    for options in ({}, {"normalize": True}, {"uncertainty": "msp"}):
        out = QualityAwareFusion(2, **options)(logits, mask)
        assert out.logits[1].tolist() == [0.0] * 4
        assert out.weights[:, 1].tolist() == [0.0, 0.0]


def test_ways_to_hand_in_the_same_logits():
    a, b = heads(2)
    fusion = QualityAwareFusion(["rgb", "depth"])
    expected = fusion([a, b]).logits
    for given_as in ((a, b), {"rgb": a, "depth": b}, {"depth": b, "rgb": a}, torch.stack([a, b])):
        assert torch.equal(fusion(given_as).logits, expected)
    assert fusion.names == ("rgb", "depth")
    assert QualityAwareFusion(2).names == ("0", "1")
    assert fusion.num_modalities == 2


def test_ways_to_say_that_a_modality_is_absent():
    a, b = heads(2, 3, 2, 4)
    fusion = QualityAwareFusion(["rgb", "depth"])
    expected = QualityAwareFusion(1)([a])
    masks = [torch.tensor([True, False]), torch.tensor([[True] * 3, [False] * 3])]
    masks.append(masks[1].unsqueeze(-1).expand(2, 3, 2))
    outs = [fusion([a, b], present=mask) for mask in masks]
    outs += [
        fusion([a, None]),
        fusion({"rgb": a, "depth": None}),
        fusion([a, None], present=torch.tensor([True, True])),
    ]
    for out in outs:
        torch.testing.assert_close(out.logits, expected.logits)
        assert not out.weights[1].any()
        assert (out.energy[1] == torch.inf).all()
        assert out.present.shape == (2, 3, 2)
        assert out.present[0].all()
        assert not out.present[1].any()


@pytest.mark.parametrize("uncertainty", ["energy", "entropy"])
def test_class_dim(uncertainty):
    logits = heads(2, 2, 5, 3, 4)
    last = [x.movedim(1, -1) for x in logits]
    mask = randn(2, 2, 3, 4, seed=9) > -0.5
    out = QualityAwareFusion(2, class_dim=1, uncertainty=uncertainty)(logits, mask)
    expected = QualityAwareFusion(2, uncertainty=uncertainty)(last, mask)
    assert torch.equal(out.logits, expected.logits.movedim(-1, 1))
    assert torch.equal(out.weights, expected.weights)
    assert all(torch.equal(x, y) for x, y in zip(out.unimodal_logits, logits, strict=True))


def scalar(out):
    return (out.logits * torch.linspace(-1, 1, out.logits.numel()).view_as(out.logits)).sum()


@pytest.mark.parametrize("output", ["logits", "weights", "energy"])
@pytest.mark.parametrize("uncertainty", ["energy", "msp", "entropy", "evidence"])
@pytest.mark.parametrize("options", [{}, {"nonnegative": True}, {"normalize": True}, {"detach_weights": True}], ids=str)
def test_gradients_match_the_reference(output, uncertainty, options):
    """Of every output, in every input and coefficient."""
    mask = randn(3, 5, seed=4) > -0.7
    leaves = heads(3, grad=True)
    fusion = QualityAwareFusion(3, uncertainty=uncertainty, learnable=True, **COEFFICIENTS, **options).double()
    inputs = [*leaves, *fusion.parameters()]
    value = getattr(fusion(leaves, mask), output)
    probe = randn(*value.shape, seed=7)
    got = torch.autograd.grad((torch.where(torch.isfinite(value), value, 0) * probe).sum(), inputs, allow_unused=True)

    ours = {"alpha": fusion.alpha, "beta": fusion.beta, "temperature": fusion.temperature}
    named = {name: on for name, on in options.items() if name != "detach_weights"}
    w = reference.weights(leaves, uncertainty, present=mask, **ours, **named)
    if output == "logits":
        expected_value = reference.fuse(leaves, w.detach() if "detach_weights" in options else w, mask)
    elif output == "weights":
        expected_value = w
    else:
        energies = [reference.energy(x, t) for x, t in zip(leaves, ours["temperature"], strict=True)]
        expected_value = torch.where(mask, torch.stack(energies), 0)
    expected = torch.autograd.grad((expected_value * probe).sum(), inputs, allow_unused=True)
    for x, y, leaf in zip(got, expected, inputs, strict=True):
        x, y = (torch.zeros_like(leaf) if g is None else g for g in (x, y))
        torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"nonnegative": True}, {"uncertainty": "entropy"}, COEFFICIENTS], ids=str
)
def test_gradcheck(options):
    fusion = QualityAwareFusion(3, **options)
    mask = torch.tensor([[True, False], [True, True], [True, True]])
    for present in (None, mask):
        assert torch.autograd.gradcheck(
            lambda *xs, present=present: tuple(x[..., :] for x in fusion(xs, present)[:2]), heads(3, 2, 3, grad=True)
        )
    energies = lambda *xs: fusion(xs).energy  # noqa: E731
    assert torch.autograd.gradcheck(energies, heads(3, 2, 3, grad=True))


def test_backward_twice_through_a_kept_graph():
    leaves = heads(2, grad=True)
    out = QualityAwareFusion(2)(leaves)
    first = torch.autograd.grad(scalar(out), leaves, retain_graph=True)
    second = torch.autograd.grad(scalar(out), leaves)
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


def test_learnable_coefficients_keep_their_signs():
    fusion = QualityAwareFusion(2, learnable=True, alpha=-0.1, beta=0.0, temperature=1.0)
    torch.testing.assert_close(fusion.alpha, torch.full((2,), -0.1))
    assert fusion.beta.tolist() == [0.0, 0.0]
    optimizer = torch.optim.SGD(fusion.parameters(), lr=50.0)
    for step in range(4):
        optimizer.zero_grad()
        (scalar(fusion(heads(2, dtype=torch.float32))) * (-1) ** step).backward()
        assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in fusion.parameters())
        torch.nn.utils.clip_grad_norm_(fusion.parameters(), 0.01)
        optimizer.step()
        assert (fusion.alpha < 0).all()
        assert (fusion.beta >= 0).all()
        assert (fusion.temperature > 0).all()
    assert fusion.beta.any()  # it has left 0
    assert not list(QualityAwareFusion(2).parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_keeps_float32(dtype):
    heads_ = [torch.nn.Linear(6, 3) for _ in range(2)]
    x = randn(4, 6, dtype=torch.float32)
    fusion = QualityAwareFusion(2, uncertainty="entropy")
    with torch.autocast("cpu", dtype=dtype):
        logits = [head(x) for head in heads_]
        out = fusion(logits)
    assert logits[0].dtype == dtype
    assert out.logits.dtype == out.weights.dtype == torch.float32
    torch.testing.assert_close(out.logits, fusion([y.float() for y in logits]).logits, rtol=1e-5, atol=1e-5)
    out.logits.sum().backward()
    assert all(torch.isfinite(head.weight.grad).all() for head in heads_)


@pytest.mark.parametrize("learnable", [False, True])
def test_state_dict_pickle_and_copies(learnable):
    fusion = QualityAwareFusion(["a", "b", "c"], learnable=learnable, normalize=True, **COEFFICIENTS)
    expected = fusion(heads()).logits
    fresh = QualityAwareFusion(["a", "b", "c"], learnable=learnable, normalize=True)
    assert not torch.equal(fresh(heads()).logits, expected)
    stream = io.BytesIO()
    torch.save(fusion.state_dict(), stream)
    stream.seek(0)
    fresh.load_state_dict(torch.load(stream), strict=True)
    others = (fresh, pickle.loads(pickle.dumps(fusion)), copy.deepcopy(fusion))
    for other in others:
        assert torch.equal(other(heads()).logits, expected)
        assert other.names == ("a", "b", "c")


def test_casting_leaves_the_constants_alone():
    fusion = QualityAwareFusion(2).half().to(torch.bfloat16)
    assert fusion.alpha.dtype == torch.float64
    assert fusion.alpha.tolist() == [-0.1, -0.1]
    assert QualityAwareFusion(2, learnable=True).half().alpha.dtype == torch.float16
    meta = QualityAwareFusion(2).to("meta")
    assert meta.alpha.device.type == "meta"
    assert meta.to_empty(device="cpu").alpha.device.type == "cpu"


def test_draws_nothing_from_the_global_random_state():
    state = torch.get_rng_state()
    leaves = heads(2, grad=True)
    fusion = QualityAwareFusion(2, learnable=True)
    scalar(fusion(leaves)).backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_functional_forms_agree_with_the_layer():
    logits = heads(3)
    out = QualityAwareFusion(3, **COEFFICIENTS)(logits)
    w = functional.fusion_weights(out.energy, COEFFICIENTS["alpha"], torch.tensor(COEFFICIENTS["beta"]))
    torch.testing.assert_close(w, out.weights)
    torch.testing.assert_close(functional.fuse(logits, w), out.logits)
    torch.testing.assert_close(functional.fuse(torch.stack(logits), w), out.logits)
    mask = torch.tensor([True, False, True])
    torch.testing.assert_close(functional.fuse(logits, w, mask), functional.fuse([logits[0], None, logits[2]], w))
    assert not functional.fuse({"a": logits[0], "b": None}, w[:2])[w[0] == 0].any()


def test_repr_says_what_it_is():
    shown = repr(QualityAwareFusion(["a", "b"], normalize=True, class_dim=1, uncertainty="msp"))
    assert "['a', 'b']" in shown
    assert "normalize=True" in shown
    assert "class_dim=1" in shown
    assert "'msp'" in shown


def test_states_of_fixed_and_learnable_layers_do_not_mix():
    for learnable in (False, True):
        with pytest.raises(RuntimeError, match="Missing key"):
            QualityAwareFusion(2, learnable=learnable).load_state_dict(
                QualityAwareFusion(2, learnable=not learnable).state_dict()
            )


def test_building_under_another_default_device():
    with torch.device("meta"):
        fusion = QualityAwareFusion(2, temperature=2.0)
        learnable = QualityAwareFusion(2, learnable=True)
        robust = QualityAwareFusion.robust(2, 4)
    assert fusion.alpha.tolist() == [-0.1, -0.1]
    assert learnable.to("meta").alpha.is_meta
    assert robust.names == ("0", "1")
    heads = [torch.zeros(3, 4, requires_grad=True) for _ in range(2)]
    with torch.device("meta"):
        functional.qmf_objective(heads, torch.zeros(3, dtype=torch.long, device="cpu"), None, alpha=-0.123)


def test_one_sample_without_a_batch_may_come_stacked():
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    stacked, apart = QualityAwareFusion(2)(rows), QualityAwareFusion(2)(list(rows))
    assert stacked.logits.shape == (4,)
    torch.testing.assert_close(stacked.logits, apart.logits)
    with pytest.raises(ValueError, match="logits"):
        QualityAwareFusion(2)(rows[0])
