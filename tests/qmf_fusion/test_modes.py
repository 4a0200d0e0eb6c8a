"""Nothing is learned without gradients or in evaluation, and modes that disagree are told once."""

import copy
import warnings

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, TrajectoryRankingLoss

NAMES = ("a", "b")
RULES = {
    "energy": lambda: QualityAwareFusion(NAMES),
    "learnable": lambda: QualityAwareFusion(NAMES, learnable=True),
    "probabilities": lambda: QualityAwareFusion(NAMES, combine="probabilities", uncertainty="entropy"),
    "robust": lambda: QualityAwareFusion.robust(NAMES, 3, features=[4, None]),
}
X, TARGET, INDEX = torch.randn(2, 6, 4), torch.arange(6) % 3, torch.arange(6)


def build(rule):
    class Head(nn.Linear):
        def forward(self, x):
            return super().forward(x), x

    model = FusionModel({"a": Head(4, 3), "b": nn.Linear(4, 3)}, RULES[rule]())
    return model, QMFLoss(model.fusion, 6, start_epoch=2)


def said(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [w for w in caught if "mode" in str(w.message)]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "model.eval", "fusion.eval", "criterion.eval", "all"])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.filterwarnings("ignore:the criterion is in")
def test_nothing_is_learned(rule, how, soft):
    model, criterion = build(rule)
    for _ in range(2):
        criterion(model(list(X)), TARGET, INDEX)
    before = copy.deepcopy([model.state_dict(), criterion.state_dict()])
    if how in ("model.eval", "all"):
        model.eval()
    if how == "fusion.eval":
        model.fusion.eval()
    if how in ("criterion.eval", "all"):
        criterion.eval()
    guard = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    target = nn.functional.one_hot(TARGET).float() if soft else TARGET
    with guard():
        assert torch.isfinite(criterion(model(list(X)), target, INDEX).loss)
    for old, new in zip(before, [model.state_dict(), criterion.state_dict()], strict=True):
        torch.testing.assert_close(dict(new), dict(old), rtol=0, atol=0, equal_nan=True)


def test_the_ranking_alone_learns_nothing_either():
    ranking = TrajectoryRankingLoss(6, 2)
    losses = torch.rand(2, 6)
    with torch.no_grad():
        ranking(losses, losses, INDEX)
    ranking.eval()(losses, losses, INDEX)
    assert ranking.trajectory.count.sum() == 0


@pytest.mark.parametrize("forgotten", ["criterion", "model"])
def test_modes_that_disagree_are_told_once(forgotten):
    model, criterion = build("energy")
    parts = {"criterion": criterion, "model": model}

    def step():
        criterion(model(list(X)), TARGET, INDEX)

    assert said(step) == []
    for part in parts.values():
        part.eval()
    with torch.no_grad():
        assert said(step) == []
    for name, part in parts.items():
        part.train(name != forgotten)
    with torch.no_grad():
        assert said(step) == []  # a validation
    (told,) = said(step)
    own, other = ("evaluation", "training") if forgotten == "criterion" else ("training", "evaluation")
    assert f"the criterion is in {own} mode and its fusion in {other} mode" in str(told.message)
    assert told.filename == __file__
    assert said(step) == []
