"""The loss history against sums kept in Python, below and above the size from which its range is kept."""

import math

import pytest
import torch

from qmf_kernels import PAIRS, find_range, kappa, ops, record
from qmf_kernels.eager import history as module
from qmf_kernels.eager.ranking import ranking


@pytest.fixture(params=["scanned", "kept"])
def kept(request, monkeypatch):
    if request.param == "kept":
        monkeypatch.setattr(module, "SCAN", 0)


def empty(num, samples):
    history, low, span = (torch.zeros(shape, dtype=torch.float64) for shape in ((2, num, samples), (num, 1), (num, 1)))
    find_range(history, low, span)
    return history, low, span


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("operator", [False, True])
def test_scaled_means_of_all_visits(operator):
    generator = torch.Generator().manual_seed(0)
    state, visits = empty(2, 30), [[[] for _ in range(30)] for _ in range(2)]
    add = ops.record.default if operator else record
    for step in range(60):
        index = torch.randint(30, (4,), generator=generator)  # repeats included
        losses = torch.rand(2, 4, generator=generator)
        if step % 3 == 0:
            losses[1, 2] = [math.nan, math.inf][step % 2]
        add(*state, None, 1, losses, index)
        for m in range(2):
            for i, loss in zip(index.tolist(), losses[m].tolist(), strict=True):
                if math.isfinite(loss):
                    visits[m][i].append(loss)
        means = torch.tensor([[math.fsum(v) / len(v) if v else math.nan for v in row] for row in visits])
        means = means.double()
        low = means.nan_to_num(nan=math.inf).amin(1, keepdim=True)
        high = means.nan_to_num(nan=-math.inf).amax(1, keepdim=True)
        expected = torch.where(high > low, (means - low) / (high - low), means - low)
        got = kappa(*state, torch.arange(30), True)
        torch.testing.assert_close(got, expected, equal_nan=True, rtol=0, atol=1e-6)
        torch.testing.assert_close(kappa(*state, index, False), means[:, index], equal_nan=True, rtol=1e-6, atol=0)


@pytest.mark.usefixtures("kept")
def test_equal_means_scale_to_zero():
    state = empty(1, 4)
    record(*state, None, 1, torch.tensor([[2.0, 2.0]]), torch.tensor([0, 3]))
    got = kappa(*state, torch.arange(4), True)
    torch.testing.assert_close(got, torch.tensor([[0.0, math.nan, math.nan, 0.0]]).double(), equal_nan=True)


def test_first_visits_are_left_out():
    state, visits = empty(1, 3), torch.zeros(3, dtype=torch.int64)
    for loss in (5.0, 1.0, 2.0):
        record(*state, visits, 2, torch.tensor([[loss]]), torch.tensor([1]))
    assert visits.tolist() == [0, 3, 0]
    assert state[0][:, 0, 1].tolist() == [3.0, 2.0]


@pytest.mark.usefixtures("kept")
@pytest.mark.parametrize("start_epoch", [2, 3, 5])
def test_a_sample_that_stands_in_a_batch_several_times_visits_as_often(start_epoch):
    """One batch is the same as its samples one by one, whichever of their visits are the first that count."""
    generator = torch.Generator().manual_seed(start_epoch)
    together, alone = (empty(2, 4), torch.zeros(4, dtype=torch.int64)), (empty(2, 4), torch.zeros(4, dtype=torch.int64))
    for _ in range(3):
        index, losses = torch.randint(4, (7,), generator=generator), torch.rand(2, 7, generator=generator)
        record(*together[0], together[1], start_epoch, losses, index)
        for b in range(7):
            record(*alone[0], alone[1], start_epoch, losses[:, b : b + 1], index[b : b + 1])
        torch.testing.assert_close(together, alone)
    assert together[0][0][1].sum() > 0


@pytest.mark.parametrize("visits", [None, torch.zeros(5, dtype=torch.int64, device="meta")])
def test_no_value_on_a_device_is_looked_at(visits):
    """Which would mean waiting for it; a meta tensor has none."""
    state = [torch.empty(shape, dtype=torch.float64, device="meta") for shape in ((2, 2, 5), (2, 1), (2, 1))]
    losses, index = torch.empty(2, 3, device="meta"), torch.empty(3, dtype=torch.int64, device="meta")
    module.record(*state, visits, 2, losses, index)
    for pairs in PAIRS:
        ranking(losses, module.kappa(*state, index, True).float(), "paper", pairs)


def test_opcheck():
    torch.library.opcheck(ops.record.default, (*empty(2, 5), None, 1, torch.rand(2, 3), torch.tensor([0, 4, 4])))
