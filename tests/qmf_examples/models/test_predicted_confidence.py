"""PDF against its paper's formulas, and its heads."""

import numpy as np
import torch
import torch.nn.functional as F
from scipy import special
from torch import nn

from qmf_examples.models.learners import Head
from qmf_examples.models.predicted_confidence import ConfidentHeads, collaborative_belief


def test_collaborative_belief_of_two_views():
    logits = 5 * torch.rand(2, 6, 4, dtype=torch.float64)
    confidence = torch.tensor([[0.9] * 6, [0.4] * 6], dtype=torch.float64)
    fused, weights = collaborative_belief(logits, confidence)
    own = np.array([0.9, 0.4])
    holo = np.log(own[::-1]) / np.log(own).sum()
    certainty = np.abs(special.softmax(logits.numpy(), -1) - 0.25).mean(-1)
    relative = np.minimum(certainty / certainty[::-1], 1)
    expected = special.softmax((own + holo)[:, None] * relative, 0)
    np.testing.assert_allclose(weights, expected)
    np.testing.assert_allclose(fused, (expected[..., None] * logits.numpy()).sum(0))
    alone, one = collaborative_belief(logits[:1], confidence[:1])
    torch.testing.assert_close(alone, logits[0])
    assert (one == 1).all()


def test_the_heads_learn_from_cross_entropies_and_the_confidence_beside_them():
    heads = {}
    for name, width in (("a", 4), ("b", 5)):
        encoder = nn.Linear(width, 8)
        encoder.width = 8
        heads[name] = Head(encoder, nn.Linear(8, 3))
    learner, target = ConfidentHeads(heads), torch.tensor([0, 1, 2, 0])
    answer = learner({"a": torch.randn(4, 4), "b": torch.randn(4, 5)})
    a, b = answer.unimodal_logits
    mean = (a.softmax(-1) + b.softmax(-1)) / 2
    torch.testing.assert_close(answer.scores.exp(), mean)
    confidence = learner.confidences(answer.features)
    truth = torch.stack([x.softmax(-1)[torch.arange(4), target] for x in (a, b)])
    expected = F.nll_loss(mean.log(), target) + F.cross_entropy(a, target) + F.cross_entropy(b, target)
    loss = learner.loss(answer, target, torch.arange(4), annealing=0.0)
    torch.testing.assert_close(loss, expected + ((confidence - truth) ** 2).mean())
    ours, plain = (torch.autograd.grad(x, heads["a"].encoder.weight, retain_graph=True)[0] for x in (loss, expected))
    torch.testing.assert_close(ours, plain)  # the confidence moves no head
