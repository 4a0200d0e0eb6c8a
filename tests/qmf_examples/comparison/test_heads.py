"""How heads are trained: the order of each epoch's batches, and how far the late parts of a loss have come in."""

import pytest
import torch

from qmf_examples.comparison.heads import Config, train_heads
from qmf_examples.comparison.prepared import Prepared
from qmf_examples.models.methods import METHODS, Training

NUM = 20


def trained(seed=0, **options):
    """The annealing and the samples of each step."""
    seen = []

    generator = torch.Generator().manual_seed(0)
    views = {name: torch.randn(NUM, 3, generator=generator) for name in ("a", "b")}
    data = Prepared(views, torch.arange(NUM) % 2, [], torch.arange(2), 2)
    build = METHODS["tmc"].training.build

    def spied(parts):
        learner = build(parts)
        loss, rule = learner.loss, learner.model.fusion.rule

        def spy(answer, target, index):
            seen.append((float(rule.steps / rule.annealing_steps), index.tolist()))
            return loss(answer, target, index)

        learner.loss = spy
        return learner

    train_heads(Training("spy", spied), data, Config(batch_size=5, hidden=4, **options), seed)
    return [step[0] for step in seen], [step[1] for step in seen]


@pytest.mark.parametrize("options", [{"epochs": 10}, {"epochs": None, "steps": 40}], ids=["epochs", "steps"])
def test_evidential_losses_are_whole_after_a_tenth_of_the_training(options):
    # 50 of 500 epochs in the code of TMC and of RCML.
    annealing, _ = trained(**options)
    assert annealing == [step / 4 for step in range(40)]


@pytest.mark.parametrize("options", [{"epochs": 3}, {"epochs": None, "steps": 12}], ids=["epochs", "steps"])
def test_the_order_is_another_in_every_epoch_and_with_every_seed(options):
    orders = []
    for seed in (0, 1):
        _, batches = trained(seed, **options)
        orders += [[i for batch in batches[start : start + 4] for i in batch] for start in (0, 4, 8)]
    assert all(sorted(order) == list(range(NUM)) for order in orders)
    assert len({tuple(order) for order in orders}) == 6
    assert trained(0, **options)[1] == trained(0, **options)[1]
