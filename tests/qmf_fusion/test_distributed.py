"""Two processes with half of the samples each end up with the history, and the statistics, of one that saw them all."""

from pathlib import Path

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion, TrajectoryRankingLoss
from qmf_fusion.dropout import ModalityDropout

from ..two_processes import run_two

WORKER = """
import sys
import torch
import torch.distributed as dist
from qmf_fusion import TrajectoryRankingLoss
from tests.qmf_fusion.test_distributed import epoch_of

dist.init_process_group("gloo")
rank = TrajectoryRankingLoss(11, 2, start_epoch=int(sys.argv[2]))
for epoch in range(3):
    if epoch == 2:  # as after a restart from a checkpoint
        state, rank = rank.state_dict(), TrajectoryRankingLoss(11, 2, start_epoch=int(sys.argv[2]))
        rank.load_state_dict(state)
    for losses, index in epoch_of(epoch)[dist.get_rank() :: 2]:
        rank(losses, losses, index)
    rank.sync()
    rank.sync()  # nothing new, so nothing changes
torch.save(rank.state_dict(), f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def epoch_of(epoch: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Four batches of three that cover eleven samples; a distributed sampler repeats one to make them even."""
    generator = torch.Generator().manual_seed(epoch)
    order = torch.randperm(11, generator=generator)
    order = torch.cat([order, order[:1]])
    losses = torch.rand(2, 12, generator=generator) * 5
    return [(losses[:, i : i + 3], order[i : i + 3]) for i in range(0, 12, 3)]


def run_workers(folder: Path, start_epoch: int) -> list[dict[str, torch.Tensor]]:
    run_two(WORKER, folder, start_epoch)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_have_the_history_of_one(tmp_path: Path) -> None:
    single = TrajectoryRankingLoss(11, 2)
    for epoch in range(3):
        for losses, index in epoch_of(epoch):
            single(losses, losses, index)
    for state in run_workers(tmp_path, 1):
        merged = TrajectoryRankingLoss(11, 2)
        merged.load_state_dict(state)
        assert torch.equal(merged.trajectory.history, single.trajectory.history)
        assert torch.equal(merged.kappa(torch.arange(11)), single.kappa(torch.arange(11)))


def test_visits_are_epochs_in_every_process(tmp_path: Path) -> None:
    for state in run_workers(tmp_path, 3):
        assert state["trajectory.history"][1].sum() == 2 * 12
        assert (state["trajectory.visits"] >= 3).all()


def test_alone_it_changes_nothing() -> None:
    rank = TrajectoryRankingLoss(3, 1)
    rank(torch.rand(1, 2), torch.rand(1, 2), torch.tensor([0, 2]))
    before = rank.trajectory.history.clone()
    rank.sync()
    assert torch.equal(rank.trajectory.history, before)


STATISTICS_WORKER = """
import copy, sys
import torch
import torch.distributed as dist
from qmf_fusion.dropout import ModalityDropout
from qmf_fusion.processes import sum_over_processes
from tests.qmf_fusion.test_distributed import make_criterion, part_of, steps_of_robust

dist.init_process_group("gloo")
rank = dist.get_rank()
everywhere, own = make_criterion(), make_criterion(everywhere=False)
for rows, target, index in steps_of_robust():
    batch = (list(rows[:, part_of(rank)]), target[part_of(rank)], index[part_of(rank)])
    for criterion in (everywhere, own):
        criterion(*batch)
saved = {"everywhere": copy.deepcopy(everywhere.fusion.state_dict()), "own": own.fusion.state_dict()}
for _ in range(2):
    everywhere.ranking.sync()
saved["synced"] = everywhere.fusion.state_dict()
dropout = ModalityDropout(0.4, seed=3)
saved["masks"] = [dropout(torch.ones(3, 50, dtype=torch.bool)) for _ in range(2)]
add_up = torch.compile(sum_over_processes, fullgraph=True, backend="eager")
saved["sums"] = add_up([torch.tensor([1.0 + rank]), torch.tensor([[2.0, 4.0 * rank]])])
torch.save(saved, f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


def make_criterion(**switches: bool) -> QMFLoss:
    return QMFLoss(QualityAwareFusion.robust(2, 4, **switches), 60)


def steps_of_robust() -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches ``[M, B, K]``, of an even size and an odd one, some rows broken; the last repeats a sample as padding."""
    g = torch.Generator().manual_seed(5)
    steps = []
    for size in (12, 12, 9, 12, 3):
        index = torch.randint(60, (size,), generator=g)
        if size == 12:
            index[-1] = index[0]
        rows = 3 * torch.nn.functional.one_hot(index % 4, 4) + torch.randn(2, size, 4, generator=g)
        rows[0, 1] = torch.nan
        steps.append((rows, index % 4, index))
    return steps


def part_of(rank: int) -> slice:
    return slice(rank, None, 2)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, dict[str, torch.Tensor]]]:
    folder = tmp_path_factory.mktemp("statistics")
    run_two(STATISTICS_WORKER, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_two_processes_have_the_statistics_of_one(found: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    single = make_criterion()
    for rows, target, index in steps_of_robust():
        single(list(rows), target, index)
    expected = single.fusion.state_dict()
    assert expected["rule.running.measured"][1, 0, 0] == pytest.approx(
        sum(n * 0.99**i for i, n in enumerate((3, 12, 9, 12, 12)))
    )
    for state in found:
        torch.testing.assert_close(state["everywhere"], expected, rtol=1e-10, atol=1e-12)
        assert [x.tolist() for x in state["sums"]] == [[3.0], [[4.0, 4.0]]]
    for name, value in found[0]["everywhere"].items():
        assert torch.equal(value, found[1]["everywhere"][name]), name
        assert all(torch.equal(value, state["synced"][name]) for state in found), name


def test_each_keeps_to_its_own_samples_where_asked(found: list[dict[str, dict[str, torch.Tensor]]]) -> None:
    for rank, state in enumerate(found):
        alone = make_criterion()
        for rows, target, index in steps_of_robust():
            alone(list(rows[:, part_of(rank)]), target[part_of(rank)], index[part_of(rank)])
        torch.testing.assert_close(state["own"], dict(alone.fusion.state_dict()), rtol=0, atol=0)


def test_two_processes_drop_other_modalities_each(found: list[dict[str, list[torch.Tensor]]]) -> None:
    single = ModalityDropout(0.4, seed=3)
    for first, second in zip(*(state["masks"] for state in found), strict=True):
        assert not torch.equal(first, second)
        assert torch.equal(torch.cat([first, second], 1), single(torch.ones(3, 100, dtype=torch.bool)))


WRAPPED_WORKER = """
import gc, sys, warnings
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from qmf_fusion import LossTrajectory

dist.init_process_group("gloo")
rank = dist.get_rank()


class Recorder(torch.nn.Linear):
    def __init__(self):
        super().__init__(1, 1)
        self.trajectory = LossTrajectory(8, 1)

    def forward(self, losses, index):
        self.trajectory.record(losses, index)
        return losses.sum() + self.weight.sum()


saved = []
for copies in (False, True):
    model = DistributedDataParallel(Recorder(), broadcast_buffers=copies)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for epoch in range(2):
            for i in range(rank, 8, 2):
                model(torch.ones(1, 1), torch.tensor([i]))
            model.module.trajectory.sync()
    saved.append((model.module.trajectory.count, [f"{warning.filename}: {warning.message}" for warning in caught]))
torch.save(saved, f"{sys.argv[1]}/{rank}.pt")
# What is wrapped refers to itself; left to the end, it holds threads of the group that may abort the interpreter.
del model
gc.collect()
dist.destroy_process_group()
"""


def test_a_history_that_ddp_overwrites_is_told(tmp_path: Path) -> None:
    run_two(WRAPPED_WORKER, tmp_path)
    for rank in range(2):
        (count, none), (spoilt, some) = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(count, torch.full((1, 8), 2.0, dtype=torch.float64))
        assert none == []
        assert not torch.equal(spoilt, count)
        assert len(some) == rank
        assert all("broadcast_buffers=False" in message for message in some)
        assert not any("_contextlib.py" in message for message in some), "the warning points at the caller"


TRAINING_WORKER = """
import gc, sys, warnings
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from qmf_fusion import FusionModel, QMFLoss
from qmf_fusion.integrations import leave_history_out

dist.init_process_group("gloo")
rank = dist.get_rank()


class Both(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.model = FusionModel({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
        self.criterion = QMFLoss(self.model.fusion, 16)

    def forward(self, inputs, target, index):
        return self.criterion(self.model(inputs), target, index).loss


def train(run, epochs, said):
    for epoch in range(epochs):
        for start in range(rank, 16, 4):
            index = torch.tensor([start, start + 2])
            x = torch.randn(2, 2, 4)
            b = None if rank and start < 8 else x[1]  # which one process has and the other has not
            run({"a": x[0], "b": b}, index % 3, index).backward()
        said.append([f"{w.filename}: {w.message}" for w in caught])
        caught.clear()


saved = []
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for wrap in (DistributedDataParallel, lambda both: both):
        both, said = Both(), []
        run = wrap(both)
        train(run, 3, said)
        grads = {name: p.grad for name, p in both.named_parameters()}
        saved.append((said, grads))
        del run, both
        gc.collect()
    both, said = Both(), []
    run = DistributedDataParallel(leave_history_out(both))
    for epoch in range(3):
        train(run, 1, said)
        both.criterion.ranking.sync()
    saved.append((said, {"count": both.criterion.ranking.trajectory.count}))
    del run, both
    gc.collect()
torch.save(saved, f"{sys.argv[1]}/{rank}.pt")
dist.destroy_process_group()
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[list[list[str]], dict[str, torch.Tensor]]]]:
    folder = tmp_path_factory.mktemp("training")
    run_two(TRAINING_WORKER, folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_a_modality_that_one_process_lacks_does_not_stop_the_others(trained: list) -> None:
    (_, first), (_, second) = (found[0] for found in trained)
    assert set(first) == {f"model.heads.{name}.{part}" for name in "ab" for part in ("weight", "bias")}
    torch.testing.assert_close(first, second, rtol=0, atol=0)  # what DDP promises
    assert all(grad.abs().sum() > 0 for grad in first.values())


def test_the_first_epochs_end_tells_of_a_history_that_ddp_overwrites(trained: list) -> None:
    for rank, found in enumerate(trained):
        first, *later = found[0][0]
        told = [text for text in first if "the loss history was overwritten by another process's" in text]
        assert len(told) == rank
        assert all(text.startswith("<string>: ") for text in told), "it points at the line that called the criterion"
        assert not any("overwritten" in text for epoch in later for text in epoch)


def test_who_never_calls_sync_is_told(trained: list) -> None:
    for found in trained:
        first, second, third = found[1][0]
        assert first == second == []
        (text,) = third
        assert text.startswith("<string>: sync() was not called in two epochs")


def test_a_history_that_is_left_out_of_ddp_is_kept(trained: list) -> None:
    for found in trained:
        said, state = found[2]
        assert said == [[], [], []]
        assert (state["count"][0] == 3).all()
        assert state["count"][1].sum() == 3 * (16 - 4)  # the second process had no b for half of its samples
