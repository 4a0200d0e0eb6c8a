"""What depends on the epoch: the order of the samples, what dropout and crops draw, and the evidential loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qmf_examples.models.learners import Answer
from qmf_examples.training.lightning_module import Batches, TrainingModule, batches_of_epoch
from qmf_examples.training.networks import build_learner
from qmf_examples.training.run import train_run
from qmf_examples.training.settings import HEADS, QUICK, resolve


class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoders = nn.ModuleDict()

    def forward(self, inputs):
        return Answer(inputs)


def settings(seed):
    return resolve("nyud2", QUICK, {"seed": seed, "batch_size": 5})


def order(seed, epoch):
    batches = Batches(range(23), range(3), torch.tensor, settings(seed))
    batches.trainer = SimpleNamespace(current_epoch=epoch, world_size=1, global_rank=0)
    return torch.cat(list(batches.train_dataloader())).tolist()


def draws(seed, epoch, process=0):
    module = TrainingModule(Learner(), settings(seed), 3, 23)
    module._trainer = SimpleNamespace(current_epoch=epoch, global_rank=process)
    module.on_train_epoch_start()
    return torch.rand(4).tolist()


def test_the_order_is_another_in_every_epoch_and_with_every_seed():
    assert sorted(order(1, 0)) == list(range(23))
    assert order(1, 0) == order(1, 0)
    assert len({tuple(order(seed, epoch)) for seed in (1, 2) for epoch in range(5)}) == 10


def test_what_is_drawn_is_another_in_every_epoch_process_and_with_every_seed():
    assert draws(1, 0) == draws(1, 0)
    assert len({tuple(draws(*of)) for of in ((1, 0, 0), (1, 1, 0), (1, 2, 0), (2, 0, 0), (1, 0, 1))}) == 5


@pytest.mark.parametrize("limit", [None, 2])
@pytest.mark.parametrize("processes", [1, 2, 3])
@pytest.mark.parametrize("num", [1, 4, 5, 6, 11, 23])
def test_batches_of_an_epoch_are_counted_as_they_come(num, processes, limit):
    given = resolve("nyud2", QUICK, {"batch_size": 5, "limit_batches": limit or 1000})
    batches = Batches(range(num), range(3), torch.tensor, given)
    batches.trainer = SimpleNamespace(current_epoch=0, world_size=processes, global_rank=0)
    whole = len(batches.train_dataloader())
    assert batches_of_epoch(num, given, processes) == (min(whole, limit) if limit else whole)


def test_the_divergence_comes_in_over_ten_epochs_or_a_tenth_of_the_heads_training():
    for given, expected in (({}, 70), ({"frozen": True, "epochs": 30}, 21), ({"frozen": True, "epochs": 1}, 1)):
        made = resolve("nyud2", QUICK, HEADS if given else {}, {"method": "tmc", **given})
        widths = {"rgb": 3, "depth": 4} if given else None
        learner = build_learner(made, 3, 23, widths=widths, epoch_batches=7)
        assert getattr(learner, "method", learner).model.fusion.rule.annealing_steps == expected


def test_a_run_counts_its_batches(sample, tmp_path, monkeypatch):
    told = []

    def build(*given, epoch_batches, **named):
        told.append(epoch_batches)
        return build_learner(*given, epoch_batches=epoch_batches, **named)

    monkeypatch.setattr("qmf_examples.training.run.build_learner", build)
    given = {"data_root": str(sample("nyud2")), "method": "tmc", "epochs": 2, "batch_size": 20, "cache": "off"}
    train_run(resolve("nyud2", QUICK, given), tmp_path / "run")
    state = torch.load(tmp_path / "run" / "last.ckpt", weights_only=True)["state_dict"]
    assert told[0] > 1
    assert state["learner.model.fusion.rule.steps"] == 2 * told[0]
