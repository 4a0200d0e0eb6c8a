"""The networks of each method on pairs of images, as its settings say."""

import pytest
import torch

from qmf_examples.training.networks import build_learner
from qmf_examples.training.settings import QUICK, resolve
from qmf_fusion.rules import RULES

TARGET, INDEX = torch.arange(4) % 3, torch.arange(4)


def learner_of(method, **given):
    torch.manual_seed(0)
    return build_learner(resolve("nyud2", QUICK, {"data_root": "x", "method": method, **given}), 3, 8)


def images():
    generator = torch.Generator().manual_seed(1)
    return {name: torch.randn(4, 3, 32, 32, generator=generator) for name in ("rgb", "depth")}


@pytest.mark.parametrize("method", [*RULES, "etmc", "msp", "evidence", "energy", "qmf"])
def test_methods_that_weigh_train_and_answer_with_weights(method):
    learner = learner_of(method)
    for _ in range(2):
        loss = learner.loss(learner(images()), TARGET, INDEX)
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in learner.parameters())
    answer = learner.eval()(images())
    assert answer.weights.shape == (len(answer.unimodal_logits), 4)


@pytest.mark.parametrize(("width", "joined"), [(128, 256), (0, 64)])
def test_concatenation_and_alignment_join_128_features_of_each(width, joined):
    for method in ("concat", "align"):
        learner = learner_of(method, joint_width=width)
        assert torch.cat(learner(images()).features, 1).shape == (4, joined)
    assert learner_of("rgb")(images()).features[0].shape == (4, 32)


def test_the_trainers_rank_in_algorithm_1s_order():
    # With its own visit in kappa, a sample is ranked at its first one.
    for update, ranked in (("before", True), ("after", False)):
        criterion = learner_of("qmf", update=update).criterion
        logits = [torch.randn(4, 3, generator=torch.Generator().manual_seed(m)) for m in range(2)]
        assert (criterion(logits, TARGET, INDEX).ranking_loss > 0).item() is ranked
