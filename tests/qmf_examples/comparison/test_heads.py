"""What training hands to the losses of small heads."""

import pytest
import torch

from qmf_examples.comparison.digits import DIGITS
from qmf_examples.comparison.heads import Config, train_heads
from qmf_examples.comparison.prepared import prepare
from qmf_examples.data.digits import load_digits
from qmf_examples.models.learners import UnimodalHeads
from qmf_examples.models.methods import Training


def test_evidential_losses_are_whole_after_a_tenth_of_the_training():
    # 50 of 500 epochs in the code of TMC and of RCML.
    seen = []

    class Watched(UnimodalHeads):
        def loss(self, answer, target, index, annealing):
            seen.append(annealing)
            return super().loss(answer, target, index, annealing)

    data = prepare(load_digits(), DIGITS, 0, torch.device("cpu"))
    config = Config(seeds=(0,), epochs=None, steps=40)
    train_heads(Training("watched", lambda parts: Watched(parts.heads())), data, config, seed=0)
    assert seen[:5] == pytest.approx([0, 0.25, 0.5, 0.75, 1])
    assert set(seen[4:]) == {1.0}
    assert len(seen) == 40
