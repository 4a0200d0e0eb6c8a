"""A modality of which nothing counts any more is said, once, and where it can be known; what may be absent is not."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.divergence import LOOK_EVERY

NAMES = ["rgb", "depth"]
TARGET, INDEX = torch.tensor([0, 1, 2, 0]), torch.arange(4)


def rows(*broken):
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.full((4, 3), torch.nan) if name in broken else torch.randn(4, 3, generator=generator)
        for name in NAMES
    }


def criterion(**options):
    return QMFLoss(QualityAwareFusion(NAMES), 4, **options)


def said(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [str(w.message) for w in caught if "modality" in str(w.message)]


@pytest.mark.parametrize("options", [{}, {"ranking_weight": 0.0}])
def test_a_loss_of_nothing_is_said_once_of_each_modality(options):
    loss = criterion(**options)
    assert said(lambda: loss(rows(), TARGET, INDEX)) == []
    first = said(lambda: loss(rows(*NAMES), TARGET, INDEX))
    assert [text.split(":")[0] for text in first] == [
        f"0 of 4 rows of modality {name!r} count in training step 2" for name in NAMES
    ]
    assert "its head has probably diverged" in first[0]
    assert said(lambda: loss(rows(*NAMES), TARGET, INDEX)) == []
    assert said(lambda: pickle.loads(pickle.dumps(copy.deepcopy(loss)))(rows(*NAMES), TARGET, INDEX)) == []


def test_the_line_that_called_is_named(monkeypatch):
    loss, late = criterion(), on_a_device(criterion(), monkeypatch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        late(rows(*NAMES), TARGET, INDEX)
        late.eval()
        monkeypatch.undo()
        loss(rows(*NAMES), TARGET, INDEX)
    assert [w.filename for w in caught] == [__file__] * 4


def test_one_modality_is_told_from_an_absent_one_by_the_mask():
    everywhere = torch.ones(2, dtype=torch.bool)
    assert said(lambda: criterion()(rows("depth"), TARGET, INDEX)) == []  # as FusionModel marks what is absent
    (text,) = said(lambda: criterion()(rows("depth"), TARGET, INDEX, everywhere))
    assert text.startswith("0 of 4 rows of modality 'depth'")
    for present in (torch.tensor([True, False]), torch.tensor([[True] * 4, [False] * 4])):
        assert said(lambda present=present: criterion()(rows("depth"), TARGET, INDEX, present)) == []


def test_what_is_not_expected_is_not_missed():
    ignored, nothing = torch.full((4,), -100), torch.zeros(2, dtype=torch.bool)
    assert said(lambda: criterion()(rows(*NAMES), ignored, INDEX)) == []
    assert said(lambda: criterion()(rows(), TARGET, INDEX, nothing)) == []
    assert said(lambda: criterion().eval()(rows(*NAMES), TARGET, INDEX)) == []
    partly = torch.stack([TARGET, TARGET.where(TARGET == 1, -100)], 1)
    dense = {name: torch.stack([x, x], 1) for name, x in rows(*NAMES).items()}
    present = torch.zeros(2, 4, 2, dtype=torch.bool)
    present[1, :, 1] = True  # where one target is left
    (text,) = said(lambda: criterion()(dense, partly, INDEX, present))
    assert text.startswith("0 of 1 rows of modality 'depth'")


def test_the_model_says_which_head_it_was():
    heads = {name: nn.Linear(3, 3) for name in NAMES}
    model = FusionModel(heads)
    assert said(lambda: model(rows())) == []
    assert said(lambda: model({"rgb": rows()["rgb"]})) == []  # depth is absent
    assert said(lambda: model(rows(), torch.tensor([True, False]))) == []
    nn.init.constant_(model.heads["depth"].weight, torch.nan)
    assert said(lambda: model.eval()(rows())) == []
    with torch.no_grad():
        assert said(lambda: model.train()(rows())) == []
    (text,) = said(lambda: model(rows()))
    assert text.startswith("0 of 4 rows of modality 'depth' count in training step 4")
    assert said(lambda: model(rows())) == []


def on_a_device(loss, monkeypatch):
    """Whose values a step may not look at."""
    monkeypatch.setattr("qmf_fusion.objective.can_look", lambda _: False)
    return loss


def test_on_a_device_an_epoch_is_looked_at(monkeypatch):
    loss = on_a_device(criterion(), monkeypatch)
    for _ in range(3):
        assert said(lambda: loss(rows(), TARGET, INDEX)) == []
    assert said(loss.eval) == said(loss.eval) == said(loss.train) == said(loss.eval) == []  # nothing was to be recorded
    loss.train()
    for _ in range(3):
        assert said(lambda: loss(rows("depth"), TARGET, INDEX)) == []
    (text,) = said(loss.eval)
    assert text.startswith("no row of modality 'depth' counts of the last 3 training steps, after 12 that did: its")
    loss.train()
    loss(rows(*NAMES), TARGET, INDEX)
    (text,) = said(loss.eval)
    assert text.startswith("no row of modality 'rgb' counts of the last 1 training steps, after 24 that did")


def test_on_a_device_a_long_epoch_is_looked_at_in_between(monkeypatch):
    loss = on_a_device(criterion(), monkeypatch)
    messages = said(lambda: [loss(rows(*NAMES), TARGET, INDEX) for _ in range(LOOK_EVERY)])
    assert len(messages) == 2


def test_visits_that_are_too_early_are_not_missed(monkeypatch):
    loss = on_a_device(criterion(start_epoch=3), monkeypatch)
    for _ in range(2):
        loss.train()(rows(), TARGET, INDEX)
        assert said(loss.eval) == []
    loss.train()(rows("rgb"), TARGET, INDEX)
    (text,) = said(loss.eval)
    assert "'rgb'" in text


def test_compiled_steps_are_looked_at_when_training_stops():
    loss = criterion()
    compiled = torch.compile(loss, fullgraph=True, backend="eager")
    messages = []
    for broken in ((), NAMES, NAMES):
        loss.train()
        assert said(lambda broken=broken: compiled(rows(*broken), TARGET, INDEX)) == []
        messages.append(len(said(loss.eval)))
    assert messages == [0, 2, 0]


@pytest.mark.parametrize("options", [{"sampling_count": 1}, {}])
def test_what_need_not_be_recorded_is_not_missed(options):
    loss, fresh = criterion(**options), copy.deepcopy(criterion(**options).state_dict())
    absent = torch.tensor([True, False])
    ignored = torch.full((4,), -100)
    for given in ((rows(), TARGET, INDEX), (rows(), TARGET, INDEX, absent), (rows(), ignored, INDEX)):
        for _ in range(2):
            assert said(lambda given=given: loss.train()(*given)) == said(loss.eval) == []
    loss = criterion(**options)
    for _ in range(2):  # as many losses each time, of a history that begins anew
        loss.load_state_dict(fresh)
        assert said(lambda: loss.train()(rows(), TARGET, INDEX)) == said(loss.eval) == []


def test_what_a_device_has_not_seen_is_said_with_a_doubt(monkeypatch):
    loss = on_a_device(criterion(), monkeypatch)
    loss(rows(), TARGET, INDEX, torch.tensor([True, False]))
    (text,) = said(loss.eval)
    assert "'depth'" in text
    assert text.endswith("If it was absent from all of them, nothing is wrong")
