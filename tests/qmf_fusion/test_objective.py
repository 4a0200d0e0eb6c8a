"""Eq. 18 against autograd through ``F.cross_entropy`` and brute-force ranking, in float64; the criterion's state."""

import copy
import io
import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qmf_fusion import QMFLoss, QualityAwareFusion, functional, testing

from . import reference
from .test_fusion import COEFFICIENTS, heads, own_uncertainty, randn

FIELDS = ("loss", "fused_loss", "unimodal_losses", "ranking_loss", "logits", "weights")
CLASS_WEIGHT = torch.tensor([0.5, 2.0, 0.0, 1.0], dtype=torch.float64)


def kappas(num=3, batch=5):
    """Scaled histories with ties and a sample without."""
    kappa = torch.rand(num, batch, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    kappa[:, 1] = kappa[:, 0]
    kappa[0, 2] = torch.nan
    return kappa


def targets(*shape, seed=5):
    return torch.randint(0, 4, shape or (5,), generator=torch.Generator().manual_seed(seed))


def assert_same_value_and_gradients(out, expected, inputs, rtol=1e-9):
    for name in FIELDS:
        got, want = getattr(out, name), expected[name]
        torch.testing.assert_close(got.double(), want, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"{name}: {m}")
    for name in FIELDS:
        got, want = getattr(out, name), expected[name]
        probe = randn(*got.shape, seed=8)
        pair = []
        for value in (got.double(), want):
            if value.requires_grad:
                grads = torch.autograd.grad((value * probe).sum(), inputs, retain_graph=True, allow_unused=True)
            else:
                grads = [None] * len(inputs)
            pair.append([torch.zeros_like(x) if g is None else g for g, x in zip(grads, inputs, strict=True)])
        for x, y in zip(*pair, strict=True):
            torch.testing.assert_close(x, y, rtol=rtol, atol=rtol, msg=lambda m, name=name: f"gradient of {name}: {m}")


OPTIONS = [
    {},
    {"class_weight": CLASS_WEIGHT},
    {"label_smoothing": 0.3},
    {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.1, "ignore_index": 1},
    {"ignore_index": 2},
    {"normalize": True},
    {"nonnegative": True},
    {"detach_weights": True},
    {"normalize": True, "detach_weights": True, "label_smoothing": 0.2},
    {"ranking_weight": 3.0},
    {"ranking_weight": 0.0},
    COEFFICIENTS,
    {**COEFFICIENTS, "normalize": True, "ranking_weight": 2.0},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("form", ["paper", "margin", "released"])
@pytest.mark.parametrize("pairs", ["adjacent", "all"])
def test_objective_matches_autograd(options, masked, form, pairs):
    mask = randn(3, 5, seed=4) > -0.5 if masked else None
    leaves, target = heads(3, grad=True), targets()
    out = functional.qmf_objective(leaves, target, kappas(), present=mask, form=form, pairs=pairs, **options)
    named = {("weight" if name == "class_weight" else name): value for name, value in options.items()}
    expected = reference.objective(leaves, target, kappas(), mask, form=form, pairs=pairs, **named)
    assert_same_value_and_gradients(out, expected, leaves)
    losses = reference.sample_losses(leaves, target, mask, options.get("ignore_index", -100))
    torch.testing.assert_close(out.sample_losses, losses, equal_nan=True)
    assert not out.sample_losses.requires_grad


@pytest.mark.parametrize("uncertainty", ["energy", "msp", "entropy", "evidence", own_uncertainty])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_criterion_matches_autograd(uncertainty, learnable, masked):
    """For every uncertainty, in every input and in learnable coefficients."""
    mask = randn(3, 5, seed=4) > -0.5 if masked else None
    fusion = QualityAwareFusion(3, uncertainty=uncertainty, learnable=learnable, **COEFFICIENTS).double()
    criterion = QMFLoss(fusion, 20, 0.5, form="margin", pairs="all", label_smoothing=0.1, weight=CLASS_WEIGHT)
    index = torch.tensor([3, 1, 19, 0, 7])
    criterion.ranking.trajectory.record(torch.rand(3, 5, generator=torch.Generator().manual_seed(2)), index)
    kappa = criterion.ranking.kappa(index)
    leaves = heads(3, grad=True)
    out = criterion(leaves, targets(), index, mask)
    ours = {"alpha": fusion.alpha, "beta": fusion.beta, "temperature": fusion.temperature}
    expected = reference.objective(
        leaves,
        targets(),
        kappa,
        mask,
        ranking_weight=0.5,
        form="margin",
        pairs="all",
        label_smoothing=0.1,
        weight=CLASS_WEIGHT,
        uncertainty=uncertainty,
        **ours,
    )
    assert_same_value_and_gradients(out, expected, [*leaves, *fusion.parameters()])


@pytest.mark.parametrize("class_dim", [-1, 1])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("options", [{}, {"normalize": True}], ids=str)
def test_dense_prediction(class_dim, masked, options):
    leaves = heads(2, 3, 2, 4, 4, grad=True)  # [B, H, W, K]
    target, index = targets(3, 2, 4), torch.tensor([4, 0, 2])
    target[0, 1, 2] = target[2] = -100
    mask = randn(2, 3, 2, 4, seed=4) > -0.8 if masked else None
    criterion = QMFLoss(QualityAwareFusion(2, class_dim=class_dim, **options), 5, 0.7, label_smoothing=0.1)
    criterion.ranking.trajectory.record(torch.tensor([[1.0, 2.0, 0.5], [2.0, 1.0, 3.0]]), index)
    kappa = criterion.ranking.kappa(index)
    out = criterion([x.movedim(-1, class_dim) for x in leaves], target, index, mask)
    if class_dim == 1:
        assert out.logits.shape == (3, 4, 2, 4)
        out = out._replace(logits=out.logits.movedim(1, -1))
    expected = reference.objective(leaves, target, kappa, mask, ranking_weight=0.7, label_smoothing=0.1, **options)
    assert_same_value_and_gradients(out, expected, leaves)


@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"class_weight": CLASS_WEIGHT, "label_smoothing": 0.2}], ids=str
)
def test_gradcheck_of_every_output(options):
    kappa, target = kappas(2, 3), targets(3)
    for name in (*FIELDS, "energy"):
        assert torch.autograd.gradcheck(
            lambda *xs, name=name: getattr(
                functional.qmf_objective(xs, target, kappa, form="released", ranking_weight=2.0, **options), name
            ),
            heads(2, 3, 4, grad=True),
        ), name


def test_gradcheck_of_the_coefficients():
    values = [[-0.1, -0.5], [0.2, 1.0], [1.0, 2.0]]
    leaves = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in values]

    def loss(alpha, beta, temperature):
        out = functional.qmf_objective(
            heads(2, 3, 4), targets(3), kappas(2, 3), form="margin", alpha=alpha, beta=beta, temperature=temperature
        )
        return out.loss, out.ranking_loss, out.fused_loss, out.logits

    assert torch.autograd.gradcheck(loss, leaves)


def test_backward_twice_through_a_kept_graph():
    leaves = heads(3, grad=True)
    out = functional.qmf_objective(leaves, targets(), kappas(), alpha=torch.tensor([-0.1, -0.2, -0.3]))
    first = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    second = torch.autograd.grad(out.loss, leaves, retain_graph=True)
    for x, y in zip(first, second, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)
    parts = torch.autograd.grad(out.fused_loss + out.unimodal_losses.sum() + 0.1 * out.ranking_loss, leaves)
    for x, y in zip(first, parts, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-12, atol=1e-14)


def test_a_loss_scale_scales_the_gradient():
    leaves = heads(2, dtype=torch.float16, grad=True)
    plain = torch.autograd.grad(functional.qmf_objective(leaves, targets(), None).loss, leaves)
    scaled = torch.autograd.grad(functional.qmf_objective(leaves, targets(), None).loss * 1024, leaves)
    for x, y in zip(plain, scaled, strict=True):
        assert y.dtype == torch.float16
        torch.testing.assert_close(y, x * 1024, rtol=0.02, atol=0.05)


@given(st.data())
def test_any_dtype_layout_and_mask(data):
    logits = data.draw(
        testing.logits(num_classes=st.integers(2, 6), batch=st.integers(1, 4), dtype=testing.floating_dtypes())
    )
    batch, classes = logits[0].shape
    mask = data.draw(st.none() | testing.present_masks(len(logits), batch))
    target = torch.tensor(data.draw(st.lists(st.integers(0, classes - 1), min_size=batch, max_size=batch)))
    leaves = [x.clone().requires_grad_() for x in logits]
    out = functional.qmf_objective(leaves, target, None, present=mask)
    expected = reference.objective([x.double() for x in logits], target, None, mask)
    wide = torch.float64 if any(x.dtype == torch.float64 for x in logits) else torch.float32
    eps, size = torch.finfo(wide).eps, 1 + max(x.abs().max().double() for x in logits) ** 2
    for name in ("loss", "fused_loss", "unimodal_losses", "logits", "weights"):
        got = getattr(out, name)
        assert got.dtype == wide
        assert (got - expected[name]).abs().max() <= 64 * eps * size, name
    out.loss.backward()
    for m, x in enumerate(leaves):
        assert x.grad.dtype == x.dtype
        assert torch.isfinite(x.grad).all() or x.dtype == torch.float16  # whose own range is small
        if mask is not None:
            assert not x.grad[~mask[m]].any()


@given(st.data())
def test_a_broken_row_touches_nothing_else(data):
    """Bit-equal to the batch from which the bad rows' modality is absent: losses, records and gradients."""
    logits = data.draw(
        testing.logits(num_classes=st.integers(2, 5), batch=3, dtype=testing.floating_dtypes(), extreme=True)
    )
    # Ruling the label's own class out is an infinite loss, as it is in cross_entropy.
    logits = [torch.where(x == -torch.inf, torch.nan, x) for x in logits]
    logits[data.draw(st.integers(0, len(logits) - 1))][data.draw(st.integers(0, 2)), 0] = torch.nan
    target, kappa = torch.tensor([0, 1, 1]), kappas(len(logits), 3)
    options = data.draw(st.sampled_from([{}, {"normalize": True}, {"label_smoothing": 0.1}, {"pairs": "all"}]))
    bad = torch.stack([~torch.isfinite(torch.logsumexp(x.double(), -1)) for x in logits])
    leaves = [x.clone().requires_grad_() for x in logits]
    tidy = [torch.where(rows.unsqueeze(-1), 0, x).requires_grad_() for rows, x in zip(bad, logits, strict=True)]
    out = functional.qmf_objective(leaves, target, kappa, **options)
    expected = functional.qmf_objective(tidy, target, kappa, present=~bad, **options)
    for name, x, y in zip(out._fields, out, expected, strict=True):
        assert torch.equal(torch.nan_to_num(x, nan=-9), torch.nan_to_num(y, nan=-9)), name
        assert name == "sample_losses" or not x.isnan().any(), name
    assert torch.equal(out.sample_losses.isnan(), bad)
    out.loss.backward()
    expected.loss.backward()
    for x, y, rows in zip(leaves, tidy, bad, strict=True):
        assert torch.equal(x.grad, y.grad)
        assert not x.grad[rows].any()


def test_nothing_to_average_is_a_loss_of_zero():
    leaves = heads(2, 3, 4, grad=True)
    for out in (
        functional.qmf_objective(leaves, torch.full((3,), -100), None),
        functional.qmf_objective(leaves, targets(3), kappas(2, 3), present=torch.zeros(2, 3, dtype=torch.bool)),
        functional.qmf_objective(leaves, torch.full((3,), 2), None, class_weight=CLASS_WEIGHT),
        functional.qmf_objective(leaves, torch.full((3,), 2), None, class_weight=CLASS_WEIGHT, label_smoothing=0.2),
    ):
        assert out.loss.item() == 0
        out.loss.backward()
    assert not any(x.grad.any() for x in leaves)


def test_an_absent_modality_counts_in_no_loss():
    a, b = heads(2)
    alone = functional.qmf_objective([a], targets(), kappas(1))
    for out in (
        functional.qmf_objective([a, None], targets(), kappas(1).repeat(2, 1)),
        functional.qmf_objective([a, b], targets(), kappas(1).repeat(2, 1), present=torch.tensor([True, False])),
        functional.qmf_objective({"a": a, "b": torch.full_like(b, torch.nan)}, targets(), kappas(1).repeat(2, 1)),
    ):
        torch.testing.assert_close(out.loss, alone.loss)
        assert out.unimodal_losses[1] == 0
        assert out.sample_losses[1].isnan().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast_trains_in_float32(dtype):
    nets = [torch.nn.Linear(6, 4) for _ in range(2)]
    criterion = QMFLoss(QualityAwareFusion(2), 5)
    with torch.autocast("cpu", dtype=dtype):
        logits = [net(randn(5, 6, dtype=torch.float32)) for net in nets]
        out = criterion(logits, targets(), torch.arange(5))
    assert out.loss.dtype == torch.float32
    expected = QMFLoss(QualityAwareFusion(2), 5)([x.float() for x in logits], targets(), torch.arange(5))
    torch.testing.assert_close(out.loss, expected.loss, rtol=1e-5, atol=1e-5)
    out.loss.backward()
    assert all(torch.isfinite(net.weight.grad).all() for net in nets)


def test_criterion_is_eq_18_of_its_parts():
    criterion = QMFLoss(QualityAwareFusion(2), 5, ranking_weight=0.25)
    for _ in range(2):
        out = criterion(heads(2), targets(), torch.arange(5))
    assert out.ranking_loss > 0
    torch.testing.assert_close(out.loss, out.fused_loss + out.unimodal_losses.sum() + 0.25 * out.ranking_loss)


def test_training_records_and_evaluation_does_not():
    criterion = QMFLoss(QualityAwareFusion(2), 10)
    index = torch.tensor([7, 7, 0, 1, 2])
    out = criterion(heads(2), targets(), index)
    trajectory = criterion.ranking.trajectory
    assert trajectory.count[0].tolist() == [1, 1, 1, 0, 0, 0, 0, 2, 0, 0]
    torch.testing.assert_close(trajectory.total[:, 7], out.sample_losses[:, :2].sum(1))
    before = copy.deepcopy(criterion.state_dict())
    criterion.eval()
    scored = criterion(heads(2, 5, 4), targets(), index)
    assert scored.ranking_loss > 0
    assert criterion(heads(2), targets()).ranking_loss == 0
    assert all(torch.equal(x, before[name]) for name, x in criterion.state_dict().items())


def test_an_absent_modality_is_not_recorded():
    criterion = QMFLoss(QualityAwareFusion(2), 3)
    criterion(heads(2, 3, 4), targets(3), torch.arange(3), present=torch.tensor([[True] * 3, [False, True, False]]))
    assert criterion.ranking.trajectory.count.tolist() == [[1, 1, 1], [0, 1, 0]]


def train(criterion, steps, seed):
    generator = torch.Generator().manual_seed(seed)
    outs = []
    for _ in range(steps):
        logits = [torch.randn(4, 3, generator=generator) for _ in range(2)]
        outs.append(criterion(logits, torch.tensor([0, 1, 2, 0]), torch.randperm(8, generator=generator)[:4]).loss)
    return outs


def test_state_dict_round_trip_resumes_bit_for_bit():
    def build():
        return QMFLoss(QualityAwareFusion(2, learnable=True), 8, weight=torch.tensor([1.0, 2.0, 3.0]))

    criterion = build()
    train(criterion, 3, 0)
    stream = io.BytesIO()
    torch.save(criterion.state_dict(), stream)
    stream.seek(0)
    resumed = build()
    resumed.load_state_dict(torch.load(stream), strict=True)
    others = [resumed, copy.deepcopy(criterion), pickle.loads(pickle.dumps(criterion))]
    expected = train(criterion, 3, 1)
    for other in others:
        assert torch.equal(torch.stack(train(other, 3, 1)), torch.stack(expected))
        for name, x in criterion.state_dict().items():
            assert torch.equal(other.state_dict()[name], x)
    assert any("trajectory.history" in name for name in criterion.state_dict())


def test_casting_keeps_the_history_in_float64():
    criterion = QMFLoss(QualityAwareFusion(2), 8)
    train(criterion, 3, 0)
    total = criterion.ranking.trajectory.total.clone()
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        criterion.to(dtype)
        assert criterion.ranking.trajectory.total.dtype == torch.float64
        assert torch.equal(criterion.ranking.trajectory.total, total)


def test_casting_keeps_class_weights():
    """One that float16 doesn't hold would make every loss NaN."""
    weight = torch.tensor([1.0, 70_000.0, 0.1, 1.0])
    criterion = QMFLoss(QualityAwareFusion(2), 5, weight=weight, ranking_weight=0)
    expected = criterion(heads(2), targets()).loss
    assert torch.equal(criterion.half()(heads(2), targets()).loss, expected)
    weight.fill_(0)  # the criterion's are its own
    assert torch.equal(criterion.to(torch.bfloat16)(heads(2), targets()).loss, expected)


def test_loss_draws_nothing_from_the_global_random_state():
    state = torch.get_rng_state()
    criterion = QMFLoss(QualityAwareFusion(2), 5)
    leaves = heads(2, grad=True)
    criterion(leaves, targets(), torch.arange(5)).loss.backward()
    assert torch.equal(torch.get_rng_state(), state)


def test_narrow_targets_and_a_zero_ranking_weight():
    criterion = QMFLoss(QualityAwareFusion(2), 5, ranking_weight=0)
    out = criterion(heads(2), targets().to(torch.int16))
    assert out.ranking_loss == 0
    assert functional.qmf_objective(heads(2), targets(), None, backend="torch").loss == out.loss
    assert "ranking_weight=0" in repr(criterion)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_no_gradient_passes_through_a_class_that_is_ruled_out(smoothing):
    """Its fused logit is -inf whatever the other modality says."""
    x, y = randn(2, 4).requires_grad_(), randn(2, 4, seed=1)
    y[0, 2] = -torch.inf
    y.requires_grad_()
    target = torch.tensor([0, 1])
    out = functional.qmf_objective([x, y], target, None, label_smoothing=smoothing)
    (d_x,) = torch.autograd.grad(out.logits[0, 2], x, retain_graph=True)
    assert not d_x.any()
    (d_x,) = torch.autograd.grad(out.fused_loss, x)
    assert d_x[0, 2] * 0 == 0
    layer = QualityAwareFusion(2)([x, y])
    assert layer.logits[0, 2] == -torch.inf
    (d_x,) = torch.autograd.grad(layer.logits[0, 2], x)
    assert not d_x.any()


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_a_class_that_is_ruled_out_and_weighs_nothing_costs_nothing(smoothing):
    """0 times -inf would be NaN; the loss is that of the classes that are left."""
    x, y, target = randn(2, 4).requires_grad_(), randn(2, 4, seed=1), torch.tensor([0, 3])
    y[0, 2] = -torch.inf  # CLASS_WEIGHT[2] is 0
    y.requires_grad_()
    options = {"label_smoothing": smoothing, "class_weight": CLASS_WEIGHT}
    out = functional.qmf_objective([x, y], target, None, **options)
    out.loss.backward()
    log_probs, weight = y.detach().log_softmax(-1), CLASS_WEIGHT
    smooth = -(weight * log_probs.masked_fill(weight == 0, 0)).sum() / 4 / weight[target].sum()
    hard = -(weight[target] * log_probs[[0, 1], target]).sum() / weight[target].sum()
    torch.testing.assert_close(out.unimodal_losses[1], (1 - smoothing) * hard + smoothing * smooth)
    assert torch.isfinite(out.loss)
    assert all(torch.isfinite(v.grad).all() for v in (x, y))


def test_second_derivatives_raise():
    x = [randn(3, 4, seed=m).requires_grad_() for m in range(2)]
    for out in (functional.qmf_objective(x, torch.arange(3), None).loss, QualityAwareFusion(2)(x).logits.sum()):
        (grad, _) = torch.autograd.grad(out, x, create_graph=True)
        with pytest.raises(RuntimeError, match="can't be differentiated again"):
            grad.square().sum().backward()
