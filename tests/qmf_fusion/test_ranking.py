"""Eq. 14 to 17: each form against a loop over the pairs, and the trajectory behind it."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qmf_fusion import LossTrajectory, QMFLoss, QualityAwareFusion, TrajectoryRankingLoss
from qmf_fusion.functional import ranking_loss

from . import reference

FORMS = ("paper", "margin", "released")
PAIRS = ("adjacent", "all")


def rand(*shape, seed=0):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def compare(w, kappa, form, pairs):
    ours, theirs = (w.clone().requires_grad_() for _ in range(2))
    got, expected = ranking_loss(ours, kappa, form=form, pairs=pairs), reference.ranking(theirs, kappa, form, pairs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    got.backward()
    expected.backward()
    return ours.grad, theirs.grad


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("batch", [1, 2, 3, 4, 7, 16, 33])
def test_matches_brute_force(form, pairs, batch):
    w, kappa = rand(3, batch, seed=1), rand(3, batch, seed=2)
    got, expected = compare(w, kappa, form, pairs)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@given(st.data())
def test_matches_brute_force_with_ties_and_gaps(form, pairs, data):
    """Few distinct values, so that w, kappa and their sums tie; NaN for samples without a history."""
    batch = data.draw(st.integers(1, 12))
    eighths = st.integers(-4, 4).map(lambda k: k / 4)
    rows = st.lists(eighths, min_size=batch, max_size=batch)
    gaps = st.lists(eighths | st.just(float("nan")), min_size=batch, max_size=batch)
    w = torch.tensor([data.draw(rows) for _ in range(2)], dtype=torch.float64)
    kappa = torch.tensor([data.draw(gaps) for _ in range(2)], dtype=torch.float64)
    got, _ = compare(w, kappa, form, pairs)  # at a kink any slope between both sides' is right; see below
    assert torch.isfinite(got).all()
    assert not got[kappa.isnan()].any()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
def test_gradcheck(form, pairs):
    kappa = rand(2, 6, seed=2)
    kappa[1, 3] = torch.nan
    w = rand(2, 6, seed=1).requires_grad_()
    assert torch.autograd.gradcheck(lambda w: ranking_loss(w, kappa, form=form, pairs=pairs), w)


@pytest.mark.parametrize("form", FORMS)
def test_zero_exactly_when_the_table_says(form):
    """One pair; w falls as kappa rises is the right order."""
    kappa = torch.tensor([[0.2, 0.6]], dtype=torch.float64)
    small, large = torch.tensor([[0.5, 0.25]]).double(), torch.tensor([[1.5, 0.25]]).double()
    zero = {"paper": (True, False), "margin": (False, True), "released": (True, True)}[form]
    assert [ranking_loss(w, kappa, form=form).item() == 0 for w in (small, large)] == list(zero)
    wrong = torch.tensor([[0.25, 1.5]]).double()
    assert ranking_loss(wrong, kappa, form=form) > 0


@pytest.mark.parametrize("pairs", PAIRS)
def test_ties_and_single_samples_contribute_nothing(pairs):
    same = torch.full((1, 5), 0.3)
    assert ranking_loss(same, rand(1, 5), form="paper", pairs=pairs) == 0
    for form in ("margin", "released"):
        assert ranking_loss(rand(1, 5), same.double(), form=form, pairs=pairs) == 0
    assert ranking_loss(rand(2, 1), rand(2, 1), pairs=pairs) == 0
    assert ranking_loss(rand(2, 4), torch.full((2, 4), torch.nan), pairs=pairs) == 0


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("where", ["kappa", "weights"])
def test_what_is_not_finite_is_in_no_pair(form, pairs, value, where):
    w, kappa = rand(2, 6, seed=1), rand(2, 6, seed=2)
    unknown = kappa.clone()
    unknown[1, 3] = torch.nan
    expected = ranking_loss(w, unknown, form=form, pairs=pairs)
    (w if where == "weights" else kappa)[1, 3] = value
    w.requires_grad_()
    loss = ranking_loss(w, kappa, form=form, pairs=pairs)
    loss.backward()
    torch.testing.assert_close(loss, expected)
    assert w.grad[1, 3] == 0


def test_one_modality_without_its_dimension():
    w, kappa = rand(6, seed=1), rand(6, seed=2)
    assert torch.equal(ranking_loss(w, kappa), ranking_loss(w[None], kappa[None]))
    half = ranking_loss(w.half(), kappa)
    assert half.dtype == torch.float32


def chunked_all_pairs(w, kappa, form):
    """The loss and its gradient over all pairs, a block of rows at a time."""
    o = w if form == "paper" else kappa
    s = w - kappa if form == "released" else w + kappa
    loss, grad = 0.0, torch.zeros_like(w)
    for start in range(0, len(w), 512):
        block = slice(start, start + 512)
        gap = s[block, None] - s[None, :]
        counts = (o[block, None] > o[None, :]) & (gap > 0)
        loss += torch.where(counts, gap, 0).sum().item()
        grad[block] += counts.sum(1)
        grad -= counts.sum(0)
    num = len(w) * (len(w) - 1) / 2
    return loss / num, grad / num


@pytest.mark.parametrize("form", FORMS)
def test_all_pairs_of_a_large_batch(form):
    """65,536 samples, most of which have no history: the same as the rest alone, which a brute force can check."""
    batch, known = 65_536, 3_000
    w, kappa = rand(1, batch, seed=1), torch.full((1, batch), torch.nan, dtype=torch.float64)
    at = torch.randperm(batch, generator=torch.Generator().manual_seed(5))[:known]
    kappa[0, at] = rand(known, seed=2).mul(64).round().div(64)  # with ties
    w.requires_grad_()
    loss = ranking_loss(w, kappa, form=form, pairs="all")
    loss.backward()
    expected, grad = chunked_all_pairs(w.detach()[0, at], kappa[0, at], form)
    scale = known * (known - 1) / (batch * (batch - 1))
    assert loss.item() == pytest.approx(expected * scale, rel=1e-9)
    torch.testing.assert_close(w.grad[0, at], grad * scale, rtol=1e-9, atol=1e-15)
    assert w.grad.count_nonzero() <= known


def test_all_pairs_of_a_large_batch_in_float32():
    w, kappa = rand(1, 65_536, seed=1), rand(1, 65_536, seed=2)
    exact = ranking_loss(w, kappa, pairs="all")
    assert ranking_loss(w.float(), kappa.float(), pairs="all").item() == pytest.approx(exact.item(), rel=1e-5)


# The trajectory (Eq. 14)


def test_kappa_is_the_mean_of_past_losses():
    trajectory = LossTrajectory(4, 2)
    trajectory.record(torch.tensor([[1.0, 2.0, 4.0], [3.0, 5.0, 7.0]]), torch.tensor([0, 3, 0]))
    trajectory.record(torch.tensor([[4.0], [torch.nan]]), torch.tensor([0]))
    kappa = trajectory.kappa(torch.arange(4), rescale=None)
    expected = torch.tensor([[3.0, torch.nan, torch.nan, 2.0], [5.0, torch.nan, torch.nan, 5.0]], dtype=torch.float64)
    torch.testing.assert_close(kappa, expected, equal_nan=True)
    assert trajectory.count.tolist() == [[3, 0, 0, 1], [2, 0, 0, 1]]


def test_rescaling_is_over_the_samples_seen_per_modality():
    trajectory = LossTrajectory(5, 2)
    losses = torch.tensor([[10.0, 30.0, 20.0], [2.0, 2.0, 2.0]])
    trajectory.record(losses, torch.tensor([0, 1, 4]))
    kappa = trajectory.kappa(torch.tensor([4, 2, 1, 0]))
    expected = torch.tensor([[0.5, torch.nan, 1.0, 0.0], [0.0, torch.nan, 0.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(kappa, expected, equal_nan=True)


def test_rescaling_of_losses_below_zero():
    trajectory = LossTrajectory(4, 1)
    trajectory.record(torch.tensor([[-3.0, -1.0, -2.0]]), torch.tensor([0, 1, 3]))
    assert trajectory.kappa(torch.tensor([0, 1, 3])).tolist() == [[0.0, 1.0, 0.5]]


def test_losses_that_are_not_finite_are_left_out():
    trajectory = LossTrajectory(2, 1)
    trajectory.record(torch.tensor([[torch.inf, torch.nan]]), torch.tensor([0, 1]))
    assert not trajectory.count.any()
    assert trajectory.kappa(torch.arange(2)).isnan().all()


def test_start_epoch_counts_a_samples_own_visits():
    trajectory = LossTrajectory(3, 1, start_epoch=3)
    for epoch in range(5):
        trajectory.record(torch.tensor([[float(epoch), 9.0]]), torch.tensor([0, 1 if epoch == 4 else 2]))
    assert trajectory.count.tolist() == [[3, 0, 2]]
    assert trajectory.kappa(torch.tensor([0]), rescale=None).item() == 3.0  # the mean of 2, 3 and 4


def test_resize_keeps_visits():
    trajectory = LossTrajectory(2, 1, start_epoch=3)
    for _ in range(2):
        trajectory.record(torch.ones(1, 1), torch.tensor([0]))
    trajectory.resize(4)
    trajectory.record(torch.ones(1, 2), torch.tensor([0, 3]))
    assert trajectory.count.tolist() == [[1, 0, 0, 0]]  # the third visit of the first, the first one of the last


def test_resize_keeps_history():
    rank = TrajectoryRankingLoss(3, 2)
    rank(rand(2, 3), rand(2, 3, seed=1), torch.arange(3))
    before = copy.deepcopy(rank.trajectory)
    rank.resize(6)
    assert rank.num_samples == 6
    for name in ("total", "count"):
        assert torch.equal(getattr(rank.trajectory, name)[:, :3], getattr(before, name))
    assert rank.trajectory.count[0].tolist() == [1, 1, 1, 0, 0, 0]
    assert rank.kappa(torch.arange(6))[:, 3:].isnan().all()
    rank(rand(2, 1), rand(2, 1), torch.tensor([5]))
    rank.resize(6)
    with pytest.raises(ValueError, match="num_samples must be at least the present 6, got 5"):
        rank.resize(5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("rescale", ["minmax", None])
def test_module_scores_first_and_records_afterwards(form, pairs, rescale):
    rank = TrajectoryRankingLoss(10, 2, form, pairs, rescale)
    history = torch.zeros(2, 10, dtype=torch.float64)
    visits = torch.zeros(10, dtype=torch.float64)
    for step in range(4):
        index = torch.randperm(10, generator=torch.Generator().manual_seed(step))[:6]
        w, losses = rand(2, 6, seed=step), rand(2, 6, seed=50 + step) * 3
        mean = history / visits
        if rescale:
            seen = mean[:, visits > 0]
            if seen.numel():
                low, high = seen.amin(1, keepdim=True), seen.amax(1, keepdim=True)
                mean = (mean - low) / (high - low)
        expected = reference.ranking(w, mean[:, index], form, pairs)
        torch.testing.assert_close(rank(w, losses, index), expected, rtol=1e-12, atol=1e-12)
        history[:, index] += losses
        visits[index] += 1
    assert step == 3


def test_module_in_evaluation_records_nothing_and_takes_broken_rows():
    rank = TrajectoryRankingLoss(4, 1)
    for _ in range(2):
        rank(rand(1, 4), rand(1, 4), torch.arange(4))
    rank.eval()
    before = copy.deepcopy(rank.state_dict())
    w = torch.tensor([[0.5, torch.nan, 0.2, torch.inf]], requires_grad=True)
    loss = rank(w, torch.tensor([[1.0, 1.0, torch.nan, 1.0]]), torch.arange(4))
    assert loss == 0  # of each pair, one is broken
    loss.backward()
    assert not w.grad.any()
    assert all(torch.equal(x, before[name]) for name, x in rank.state_dict().items())


def test_a_history_in_shared_memory_is_shared_whole():
    trajectory = LossTrajectory(4, 1).share_memory()
    assert all(x.is_shared() for x in trajectory.buffers())


def test_no_gradient_flows_into_the_losses():
    rank = TrajectoryRankingLoss(3, 1)
    losses = rand(1, 3).requires_grad_()
    for _ in range(2):
        loss = rank(rand(1, 3, seed=1).requires_grad_(), losses, torch.arange(3))
    loss.backward()
    assert losses.grad is None
    assert not rank.trajectory.total.requires_grad


def test_state_survives_saving_copying_and_casting():
    rank = TrajectoryRankingLoss(5, 2)
    rank(rand(2, 3), rand(2, 3), torch.tensor([0, 0, 4]))
    stream = io.BytesIO()
    torch.save(rank.state_dict(), stream)
    stream.seek(0)
    fresh = TrajectoryRankingLoss(5, 2)
    fresh.load_state_dict(torch.load(stream), strict=True)
    assert set(rank.state_dict()) == {"trajectory.history", "trajectory.low", "trajectory.span"}
    for other in (fresh, copy.deepcopy(rank), pickle.loads(pickle.dumps(rank)), copy.deepcopy(rank).half()):
        assert torch.equal(other.trajectory.total, rank.trajectory.total)
        assert other.trajectory.total.dtype == torch.float64
        assert torch.equal(other.trajectory.count, rank.trajectory.count)
    assert "form='paper'" in repr(rank)
    assert "num_samples=5" in repr(rank)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_in_no_pair(pairs, bad):
    w, kappa = rand(1, 5), rand(1, 5, seed=1)
    unknown = kappa.clone()
    unknown[0, 2] = torch.nan
    expected = ranking_loss(w, unknown, pairs=pairs)
    w[0, 2] = bad
    w.requires_grad_()
    loss = ranking_loss(w, kappa, pairs=pairs)
    assert torch.equal(loss.detach(), expected)
    loss.backward()
    assert torch.isfinite(w.grad).all()
    assert w.grad[0, 2] == 0


def test_sampling_count_keeps_the_first_losses_from_the_start_epoch_on():
    # Eq. 14: the mean over T visits from T_s on.
    trajectory = LossTrajectory(2, 1, start_epoch=2, sampling_count=3)
    for visit in range(1, 8):
        trajectory.record(torch.tensor([[float(visit), 10.0 * visit]]), torch.tensor([0, 1]))
    assert trajectory.count.tolist() == [[3, 3]]
    assert trajectory.kappa(torch.tensor([0, 1]), rescale=None).tolist() == [[3.0, 30.0]]


@pytest.mark.parametrize("update", ["after", "before"])
def test_update_says_whether_this_visit_is_in_kappa(update):
    rank = TrajectoryRankingLoss(4, 1, rescale=None, update=update)
    twin, index = LossTrajectory(4, 1), torch.arange(4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        weights, losses = torch.rand(2, 1, 4, generator=generator, dtype=torch.float64)
        if update == "before":
            twin.record(losses, index)
        expected = ranking_loss(weights, twin.kappa(index, None))
        if update == "after":
            twin.record(losses, index)
        torch.testing.assert_close(rank(weights, losses, index), expected)
        assert torch.equal(rank.trajectory.history, twin.history)
    before = rank.trajectory.history.clone()
    rank.eval()(weights, losses, index)
    assert torch.equal(rank.trajectory.history, before)  # nothing is learned in evaluation


@pytest.mark.parametrize("update", ["after", "before"])
@pytest.mark.parametrize("sampling_count", [None, 2])
def test_the_objective_updates_as_the_ranking_loss_does(update, sampling_count):
    fusion = QualityAwareFusion(2)
    options = {"rescale": None, "sampling_count": sampling_count, "update": update}
    criterion = QMFLoss(fusion, 6, 0.5, **options)
    rank, index = TrajectoryRankingLoss(6, 2, **options), torch.arange(6)
    generator = torch.Generator().manual_seed(0)
    for _ in range(4):
        x = torch.randn(2, 6, 3, generator=generator, dtype=torch.float64, requires_grad=True)
        target = torch.randint(3, (6,), generator=generator)
        losses = torch.stack([F.cross_entropy(each, target, reduction="none") for each in x])
        out, weighed = criterion(x, target, index), fusion(x)
        ranking = rank(weighed.weights, losses, index)
        torch.testing.assert_close(out.ranking_loss, ranking)
        plain = F.cross_entropy(weighed.logits, target) + losses.mean(1).sum()
        whole = plain + 0.5 * ranking
        torch.testing.assert_close(out.loss, whole)
        ours, theirs = (torch.autograd.grad(loss, x, retain_graph=True)[0] for loss in (out.loss, whole))
        torch.testing.assert_close(ours, theirs)
        torch.testing.assert_close(criterion.ranking.trajectory.history, rank.trajectory.history)
    assert criterion.ranking.trajectory.count.max() == (sampling_count or 4)
