"""PDF against its formulas in NumPy, and what its networks learn and leave alone."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, testing
from qmf_fusion.rules import PDF
from qmf_fusion.rules.pdf import collaborative_belief, relative_calibration


def layer(m=3, k=4, features=None):
    torch.manual_seed(0)
    return QualityAwareFusion(m, combine=PDF(m, k, features)).double()


def expected(confidence, probs, *, calibrated):
    """Weights of the modalities that are there, ``[M]`` confidences and ``[M, K]`` probabilities, one sample."""
    logs = np.log(confidence)
    far = np.abs(probs - 1 / probs.shape[1]).mean(1)
    beliefs = []
    for m in range(len(logs)):
        belief = confidence[m] + sum(log for j, log in enumerate(logs) if j != m) / logs.sum()
        if calibrated and len(logs) > 1:
            others = np.mean([d for j, d in enumerate(far) if j != m])
            belief = belief * (1 if far[m] >= others else far[m] / others)
        beliefs.append(belief)
    worth = np.exp(beliefs)
    return worth / worth.sum()


@settings(max_examples=60, derandomize=True, deadline=None)
@given(st.data())
def test_collaborative_belief(data):
    m, k = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    score = st.floats(-8, 8)
    scores = torch.tensor([[data.draw(score)] for _ in range(m)], dtype=torch.float64)
    x = torch.stack(data.draw(testing.logits(m, k, 1, torch.float64)))
    there = data.draw(testing.present_masks(m, 1, min_present=1))
    for calibrated in (False, True):
        belief = collaborative_belief(scores, there)
        belief = belief * relative_calibration(x, there) if calibrated else belief
        got = torch.where(there, belief, -torch.inf).softmax(0)[there]
        confidence, probs = torch.sigmoid(scores)[there].numpy(), x.softmax(-1)[there].numpy()
        wanted = expected(confidence, probs, calibrated=calibrated)
        torch.testing.assert_close(got, torch.tensor(wanted))


def test_an_uncalibrated_weight_rises_with_its_confidence():
    scores = torch.linspace(-9, 9, 60, dtype=torch.float64).expand(3, 60).clone()
    scores[1:] = torch.randn(2, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = collaborative_belief(scores, torch.ones(3, 60, dtype=torch.bool)).softmax(0)
    assert (weights[0].diff() > 0).all()


def batch(n=6, m=3, k=4, d=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    logits = [2 * torch.randn(n, k, generator=g, dtype=torch.float64) for _ in range(m)]
    return logits, [torch.randn(n, d, generator=g, dtype=torch.float64) for _ in range(m)], torch.arange(n) % k


def confidences(fusion, seen):
    """By the linear maps of each network, ``[M, N]``."""
    every = []
    for network, x in zip(fusion.rule.networks, seen, strict=True):
        for part in network:
            x = x @ part.weight.T + part.bias
        every.append(1 / (1 + torch.exp(-x[:, 0])))
    return torch.stack(every).detach()


@pytest.mark.parametrize("features", [None, [5, None, 5]])
def test_the_whole_rule(features):
    logits, given, _ = batch()
    fusion = layer(3, 4, features)
    present = torch.tensor([[1, 1, 1, 0, 1, 0], [1, 0, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0]], dtype=torch.bool)
    given[1] = None
    seen = logits if features is None else [given[0], logits[1], given[2]]
    confidence = confidences(fusion, seen)
    out = fusion(logits, present, None if features is None else given)
    for i in range(6):
        kept = present[:, i].nonzero().flatten()
        probs = torch.stack(logits)[kept, i].softmax(-1).numpy()
        weights = torch.zeros(3, dtype=torch.float64)
        if len(kept):
            weights[kept] = torch.tensor(expected(confidence[kept, i].numpy(), probs, calibrated=True))
        torch.testing.assert_close(out.weights[:, i].detach(), weights)
        torch.testing.assert_close(out.logits[i].detach(), sum(w * x[i] for w, x in zip(weights, logits, strict=True)))
    uncertainty = fusion.uncertainties(logits, None if features is None else given)
    torch.testing.assert_close(uncertainty.detach(), 1 - confidence)


def test_training_is_uncalibrated_and_adds_the_distance_of_confidence():
    logits, features, target = batch()
    fusion = layer(3, 4, [5, 5, 5])
    target[2] = -100
    present = torch.ones(3, 6, dtype=torch.bool)
    present[1, :2] = False
    res = QMFLoss(fusion, ranking_weight=0)(logits, target, present=present, features=features)
    confidence, probs = confidences(fusion, features), torch.stack(logits).softmax(-1)
    for i in range(6):
        kept = present[:, i].nonzero().flatten()
        wanted = expected(confidence[kept, i].numpy(), probs[kept, i].numpy(), calibrated=False)
        torch.testing.assert_close(res.weights[kept, i].detach(), torch.tensor(wanted))
    counted = present & (target >= 0)
    true = probs.gather(-1, target.clamp(min=0).expand(3, 6).unsqueeze(-1)).squeeze(-1)
    distance = sum((confidence - true)[m][counted[m]].abs().mean() for m in range(3))
    torch.testing.assert_close(res.loss.detach(), (res.fused_loss + res.unimodal_losses.sum() + distance).detach())
    label = torch.nn.functional.one_hot(target.clamp(min=0), 4).double()
    keep = target >= 0
    soft, hard = (
        QMFLoss(fusion, ranking_weight=0)(
            [x[keep] for x in logits], t[keep], present=present[:, keep], features=[x[keep] for x in features]
        ).loss
        for t in (label, target)
    )
    torch.testing.assert_close(soft, hard)
    torch.testing.assert_close(hard, res.loss)


def test_gradients_stay_where_they_belong():
    """The networks learn from the distance alone; features and logits learn nothing of confidence."""
    logits, features, target = batch(d=4)
    logits = [x.requires_grad_() for x in logits]
    features = [x.requires_grad_() for x in features]
    for widths in ([4, 4, 4], None):
        fusion = layer(3, 4, widths)
        given = None if widths is None else features
        out = fusion(logits, features=given)
        slope = torch.randn(6, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(out.logits, logits, slope)
        for w, grad in zip(out.weights, grads, strict=True):
            torch.testing.assert_close(grad, w.detach().unsqueeze(-1) * slope)
        weighed = fusion.rule.weigh(logits, None, given, plain=True)
        penalty = fusion.rule.penalty(weighed, target, -100)
        assert torch.autograd.grad(penalty, [*logits, *features], allow_unused=True) == (None,) * 6
        for p in fusion.parameters():
            p.grad = None
        QMFLoss(fusion, ranking_weight=0)(logits, target, features=given).loss.backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in fusion.parameters())


def test_a_training_step_runs_each_network_once():
    logits, features, target = batch()
    fusion = layer(3, 4, [5, 5, 5])
    ran = []
    for network in fusion.rule.networks:
        network.register_forward_hook(lambda *_: ran.append(1))
    QMFLoss(fusion, ranking_weight=0)(logits, target, features=features).loss.backward()
    assert len(ran) == 3


def test_state_says_what_its_networks_see():
    """Features as wide as the logits are many make networks of the same shapes."""
    with pytest.raises(RuntimeError, match="another kind of fusion"):
        layer(3, 4).load_state_dict(layer(3, 4, [4, 4, 4]).state_dict())
    layer(3, 4, [4, None, 4]).load_state_dict(layer(3, 4, [4, None, 4]).state_dict())


def test_absence_is_that_of_a_rule_without_the_modality():
    logits, features, _ = batch()
    fusion = layer(3, 4, [5, 5, 5])
    other = QualityAwareFusion(2, combine=PDF(2, 4, [5, 5])).double()
    other.rule.networks = nn.ModuleList([fusion.rule.networks[0], fusion.rule.networks[2]])
    wanted = other([logits[0], logits[2]], features=[features[0], features[2]])
    for gone in ("present", "logits", "features", "NaN in features", "inf in logits"):
        x, f, present = list(logits), list(features), None
        if gone == "present":
            present = torch.tensor([True, False, True])
        elif gone == "logits":
            x[1] = None
        elif gone == "features":
            f[1] = None
        elif gone == "NaN in features":
            f[1] = torch.full_like(f[1], torch.nan)
        else:
            x[1] = torch.where(torch.arange(4) == 2, torch.inf, x[1])
        out = fusion(x, present, f)
        torch.testing.assert_close(out.logits, wanted.logits, msg=gone)
        torch.testing.assert_close(out.weights[[0, 2]], wanted.weights, msg=gone)
        assert not out.weights[1].any()
        assert fusion.uncertainties(x, f)[1].isnan().all() if gone[:3] in ("fea", "NaN", "inf") else True, gone


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.classifier = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x):
        features = self.encoder(x)
        return self.classifier(features), features


def test_training_by_name_learns_who_is_right():
    """The second modality is noise: its confidence comes to what its head gives the true class."""
    g = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    model = FusionModel({"a": Head(), "b": Head()}, "pdf", num_classes=3, features=[5, 5])
    criterion = QMFLoss(model.fusion, ranking_weight=0)
    target = torch.arange(120) % 3
    inputs = {
        "a": 3 * torch.eye(6)[target] + 0.3 * torch.randn(120, 6, generator=g),
        "b": torch.randn(120, 6, generator=g),
    }
    names = [name for name, _ in model.named_parameters()]
    assert sum(name.startswith("fusion.rule.networks") for name in names) == 12
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(150):
        out = model(inputs)
        loss = criterion(out, target).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    with torch.no_grad():
        out = model(inputs)
        confidence = 1 - model.fusion.uncertainties(out)
    own = torch.stack(out.unimodal_logits).softmax(-1).gather(-1, target.expand(2, 120).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(confidence.mean(1), own.mean(1), atol=0.1, rtol=0)
    assert out.weights.mean(1)[0] > 0.6
    again = FusionModel({"a": Head(), "b": Head()}, "pdf", num_classes=3, features=[5, 5]).eval()
    again.load_state_dict(model.state_dict())
    with torch.no_grad():
        assert torch.equal(again(inputs).logits, out.logits)


def test_bad_arguments_are_named():
    ways = r"num_classes must be given .*combine=PDF\(2, num_classes=K\), or FusionModel\(heads, 'pdf', num_classes=K\)"
    heads = [nn.Identity(), nn.Identity()]
    with pytest.raises(TypeError, match=ways):
        QualityAwareFusion(2, combine="pdf")
    with pytest.raises(TypeError, match=ways):
        FusionModel(heads, "pdf")
    with pytest.raises(TypeError, match=r"FusionModel\(heads, 'pdf', num_classes=K\)"):
        FusionModel(heads, combine="pdf", num_classes=4)
    with pytest.raises(
        TypeError, match=r"options of fusion='tmc' must be among \['annealing_steps', .* got \['alpha'\]"
    ):
        FusionModel(heads, "tmc", alpha=-1.0)
    with pytest.raises(ValueError, match="num_classes must be an integer of at least 1, got 0"):
        PDF(2, 0)
    with pytest.raises(ValueError, match="features must be None or 2 widths"):
        PDF(2, 3, [4])
    logits = torch.zeros(3, 2, 4)
    with pytest.raises(ValueError, match="features must be given, of the widths"):
        layer(3, 4, [5, 5, 5]).float()(logits)
    with pytest.raises(ValueError, match="logits must have the 3 classes of the rule, got 4"):
        layer(3, 3)(logits)
    with pytest.raises(ValueError, match="PDF"):
        layer(3, 4).calibrate(torch.randn(3, 40, 4), torch.arange(40) % 4)


def test_extreme_confidence():
    """Scores at which a sigmoid rounds to 0 and 1, in float32: no belief is NaN."""
    scores = torch.tensor([[200.0, -200.0, 200.0], [200.0, -200.0, -200.0]])
    belief = collaborative_belief(scores, torch.ones(2, 3, dtype=torch.bool))
    torch.testing.assert_close(belief, torch.tensor([[1.0, 0.5, 2.0], [1.0, 0.5, 0.0]]))
    x = torch.zeros(2, 1, 4)  # neither is less uniform
    torch.testing.assert_close(relative_calibration(x, torch.ones(2, 1, dtype=torch.bool)), torch.ones(2, 1))
