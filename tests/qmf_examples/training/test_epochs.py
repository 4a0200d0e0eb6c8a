"""What depends on the epoch: the order of the samples, what dropout and crops draw, and the evidential loss."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qmf_examples.models.learners import Answer
from qmf_examples.training.lightning_module import Batches, TrainingModule
from qmf_examples.training.settings import QUICK, resolve


class Learner(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoders, self.annealing = nn.ModuleDict(), []

    def forward(self, inputs):
        return Answer(inputs)

    def loss(self, answer, target, index, annealing):
        self.annealing.append(annealing)
        return answer.scores.sum()


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


@pytest.mark.parametrize(("epoch", "annealing"), [(0, 0.0), (1, 0.1), (5, 0.5), (10, 1.0), (25, 1.0)])
def test_the_divergence_comes_in_over_ten_epochs(epoch, annealing):
    learner = Learner()
    module = TrainingModule(learner, settings(1), 3, 23)
    module._trainer = SimpleNamespace(current_epoch=epoch, global_rank=0)
    module.log = lambda *_, **__: None
    module.training_step({"inputs": torch.ones(3), "label": torch.arange(3), "index": torch.arange(3)}, 0)
    assert learner.annealing == [annealing]
