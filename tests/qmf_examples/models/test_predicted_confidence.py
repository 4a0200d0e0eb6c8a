"""PDF against its paper's formulas, and its heads against the steps of its code."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import special
from torch import nn

from qmf_examples.models.learners import AveragedHeads, Head
from qmf_examples.models.predicted_confidence import PredictiveFusion, collaborative_belief

TARGET = torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize("calibrated", [True, False])
def test_collaborative_belief_of_two_views(calibrated):
    logits = 5 * torch.rand(2, 6, 4, dtype=torch.float64)
    confidence = torch.tensor([[0.9] * 6, [0.4] * 6], dtype=torch.float64)
    weights = collaborative_belief(logits, confidence, calibrated)
    own = np.array([0.9, 0.4])
    holo = np.log(own[::-1]) / np.log(own).sum()
    certainty = np.abs(special.softmax(logits.numpy(), -1) - 0.25).mean(-1)
    relative = np.minimum(certainty / certainty[::-1], 1) if calibrated else np.ones((2, 6))
    np.testing.assert_allclose(weights, special.softmax((own + holo)[:, None] * relative, 0))
    assert (collaborative_belief(logits[:1], confidence[:1], calibrated) == 1).all()


def heads():
    made = {}
    for name, width in (("a", 4), ("b", 5)):
        encoder = nn.Linear(width, 8)
        encoder.width = 8
        made[name] = Head(encoder, nn.Linear(8, 3))
    return made


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {"a": torch.randn(4, 4, generator=generator), "b": torch.randn(4, 5, generator=generator)}


def test_pdf_is_trained_as_its_code_trains_it():
    torch.manual_seed(0)
    learner, networks = PredictiveFusion(given := heads()), inputs()
    features = [head.encoder(networks[name]) for name, head in given.items()]
    logits = [head.classifier(x) for head, x in zip(given.values(), features, strict=True)]
    predicted = []
    for network, x in zip(learner.confidence, features, strict=True):
        assert [(type(part), getattr(part, "out_features", None)) for part in network] == [
            (nn.Linear, 16),
            (nn.Linear, 8),
            (nn.Linear, 1),
            (nn.Sigmoid, None),
        ]
        predicted.append(network(x.detach()))
    first, second = predicted
    log = (first * second).log()
    beliefs = [first + second.log() / log, second + first.log() / log]
    w = torch.stack(beliefs, 1).softmax(1).detach()
    fused = w[:, 0] * logits[0] + w[:, 1] * logits[1]
    truth = [x.softmax(-1)[torch.arange(4), TARGET].unsqueeze(1).detach() for x in logits]
    heads_loss = F.cross_entropy(fused, TARGET) + sum(F.cross_entropy(x, TARGET) for x in logits)
    expected = heads_loss + sum(F.l1_loss(p, t) for p, t in zip(predicted, truth, strict=True))
    answer = learner(networks)
    torch.testing.assert_close(answer.scores, fused)
    loss = learner.loss(answer, TARGET, torch.arange(4))
    torch.testing.assert_close(loss, expected)
    weight = given["a"].encoder.weight
    ours, plain = (torch.autograd.grad(x, weight, retain_graph=True)[0] for x in (loss, heads_loss))
    torch.testing.assert_close(ours, plain)  # the confidences move no head
    loss.backward()
    assert all(p.grad.abs().sum() > 0 for p in learner.confidence.parameters())


def test_pdf_calibrates_at_test_time_alone():
    torch.manual_seed(0)
    learner = PredictiveFusion(heads())
    training, testing = learner(inputs()), learner.eval()(inputs())
    logits = torch.stack(testing.unimodal_logits)
    confidence = learner.confidences(testing.features)
    torch.testing.assert_close(training.weights, collaborative_belief(logits, confidence, calibrated=False))
    torch.testing.assert_close(testing.weights, collaborative_belief(logits, confidence))
    assert not torch.allclose(training.weights, testing.weights)


def test_averaged_heads_answer_with_the_mean_of_probabilities():
    learner = AveragedHeads(heads())
    answer = learner(inputs())
    a, b = answer.unimodal_logits
    mean = (a.softmax(-1) + b.softmax(-1)) / 2
    torch.testing.assert_close(answer.scores.exp(), mean)
    expected = F.nll_loss(mean.log(), TARGET) + F.cross_entropy(a, TARGET) + F.cross_entropy(b, TARGET)
    torch.testing.assert_close(learner.loss(answer, TARGET, torch.arange(4)), expected)
