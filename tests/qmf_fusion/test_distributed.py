"""Two processes with half of the samples each end up with the history of one process that saw them all."""

from pathlib import Path

import torch

from qmf_fusion import TrajectoryRankingLoss

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
