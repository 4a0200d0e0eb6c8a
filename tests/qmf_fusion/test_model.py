"""The wrapper: inputs by name, absent heads, freezing and parameter groups."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion


class WithLogits(nn.Module):
    """As Transformers' models: keyword arguments in, an object with ``.logits`` out."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, input_ids, attention_mask=None):
        x = self.linear(input_ids)
        return SimpleNamespace(logits=x if attention_mask is None else x * attention_mask)


@pytest.fixture
def model():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rgb = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
        return FusionModel({"rgb": rgb, "text": WithLogits()})


def inputs():
    generator = torch.Generator().manual_seed(1)
    return {"rgb": torch.randn(4, 6, generator=generator), "text": torch.randn(4, 4, generator=generator)}


def test_fuses_what_the_heads_say(model):
    given = inputs()
    model.eval()
    out = model(given)
    logits = [model.heads["rgb"](given["rgb"]), model.heads["text"](given["text"]).logits]
    assert torch.equal(out.logits, QualityAwareFusion(2)(logits).logits)
    assert all(torch.equal(x, y) for x, y in zip(out.unimodal_logits, logits, strict=True))
    assert model.names == ("rgb", "text")


def test_inputs_may_be_tuples_and_mappings(model):
    model.eval()
    given, scale = inputs(), torch.full((4, 1), 2.0)
    expected = model({**given, "text": (given["text"], scale)})
    by_name = model({**given, "text": {"input_ids": given["text"], "attention_mask": scale}})
    assert torch.equal(by_name.logits, expected.logits)
    assert not torch.equal(expected.logits, model(given).logits)


@pytest.mark.parametrize("absent", [{}, {"text": None}], ids=["missing", "None"])
def test_an_absent_head_is_not_run(model, absent):
    model.eval()
    calls = []
    model.heads["text"].register_forward_hook(lambda *_: calls.append(1))
    out = model({"rgb": inputs()["rgb"], **absent})
    assert not calls
    alone = QualityAwareFusion(1)([model.heads["rgb"](inputs()["rgb"])])
    torch.testing.assert_close(out.logits, alone.logits)
    assert not out.weights[1].any()
    assert out.unimodal_logits[1].isnan().all()
    assert out.present.tolist() == [[True] * 4, [False] * 4]


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_present_reaches_the_fusion_and_the_loss(class_dim):
    heads = {"a": nn.Identity(), "b": nn.Identity()}
    model = FusionModel(heads, class_dim=class_dim)
    shape = (3, 4, 2) if class_dim == 1 else (3, 2, 4)
    x = {name: torch.randn(shape, generator=torch.Generator().manual_seed(m)) for m, name in enumerate(heads)}
    mask = torch.tensor([[True, True, False], [True, False, True]])
    out = model(x, present=mask)
    assert not out.weights[~mask].any()
    assert [[bool(y.isnan().all()) for y in rows] for rows in out.unimodal_logits] == (~mask).tolist()
    target = torch.randint(0, 4, (3, 2), generator=torch.Generator().manual_seed(5))
    by_nan = QMFLoss(model.fusion, 3)(out.unimodal_logits, target, torch.arange(3))
    by_mask = QMFLoss(model.fusion, 3)(list(x.values()), target, torch.arange(3), mask)
    torch.testing.assert_close(by_nan.loss, by_mask.loss)


def test_an_absent_head_learns_nothing(model):
    criterion = QMFLoss(model.fusion, num_samples=4)
    out = model({"rgb": inputs()["rgb"]})
    loss = criterion(out.unimodal_logits, torch.tensor([0, 1, 2, 0]), torch.arange(4)).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert all(p.grad is None for p in model.heads["text"].parameters())
    assert all(torch.isfinite(p.grad).all() for p in model.heads["rgb"].parameters())


def test_freezing_stops_gradients_and_statistics(model):
    assert model.freeze("rgb") is model
    before = copy.deepcopy(model.heads["rgb"].state_dict())
    model.train()
    assert model.training
    assert model.heads["text"].training
    assert not model.heads["rgb"].training
    model(inputs()).logits.sum().backward()
    assert all(p.grad is None for p in model.heads["rgb"].parameters())
    assert all(p.grad is not None for p in model.heads["text"].parameters())
    assert all(torch.equal(x, before[name]) for name, x in model.heads["rgb"].state_dict().items())
    assert [group["name"] for group in model.parameter_groups()] == ["text"]

    model.unfreeze("rgb")
    assert model.heads["rgb"].training
    model(inputs())
    assert any(not torch.equal(x, before[name]) for name, x in model.heads["rgb"].state_dict().items())

    model.freeze()
    assert model.parameter_groups() == []
    assert not any(head.training for head in model.train().heads.values())
    model.eval().unfreeze()
    assert not model.heads["rgb"].training  # as the model itself
    assert len(model.parameter_groups()) == 2


def partly_frozen():
    """Two heads over one encoder whose bias its user froze."""
    torch.manual_seed(0)
    encoder = nn.Linear(4, 4)
    encoder.bias.requires_grad_(False)
    return FusionModel({"a": nn.Sequential(encoder, nn.Linear(4, 3)), "b": nn.Sequential(encoder, nn.Linear(4, 3))})


def learned(model):
    return {name for name, p in model.named_parameters(remove_duplicate=False) if p.requires_grad}


@pytest.mark.parametrize("through", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_unfreezing_restores_what_freezing_changed_and_no_more(through):
    model = partly_frozen()
    keys, before = list(model.state_dict()), learned(model)
    model = through(model.freeze("a").freeze("a"))
    assert learned(model) == {"heads.b.1.weight", "heads.b.1.bias"}
    assert learned(through(model.unfreeze("a"))) == before
    assert list(model.state_dict()) == keys


def test_what_frozen_heads_share_stays_until_the_last_is_unfrozen():
    model = partly_frozen()
    before = learned(model)
    model.freeze("a")
    model.freeze("b").unfreeze("a")
    assert learned(model) == {"heads.a.1.weight", "heads.a.1.bias"}
    assert not model.heads["b"].training
    model.unfreeze("b")
    assert learned(model) == before
    model.unfreeze()  # of heads that are not frozen: nothing
    assert learned(model) == before


def test_freezing_leaves_other_heads_modes_alone(model):
    model.heads["text"].eval()
    model.freeze("rgb").unfreeze("rgb")
    assert model.heads["rgb"].training
    assert not model.heads["text"].training


def test_a_shared_parameter_is_given_once():
    head = nn.Linear(2, 3)
    model = FusionModel({"a": head, "b": head, "c": nn.Sequential(head, nn.Linear(3, 3))})
    groups = model.parameter_groups(lr=0.1)
    assert [(group["name"], len(group["params"])) for group in groups] == [("a", 2), ("c", 2)]
    torch.optim.Adam(groups)  # which refuses duplicates


def test_parameter_groups():
    model = FusionModel({"a": nn.Linear(2, 3), "b": nn.Linear(2, 3)}, learnable=True)
    groups = model.parameter_groups({"a": {"lr": 1e-5}, "fusion": {"weight_decay": 0.0}}, lr=1e-3, weight_decay=0.1)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in groups] == [
        ("a", 1e-5, 0.1),
        ("b", 1e-3, 0.1),
        ("fusion", 1e-3, 0.0),
    ]
    grouped = {id(p) for group in groups for p in group["params"]}
    assert grouped == {id(p) for p in model.parameters()}
    torch.optim.Adam(groups).step()


def test_a_fusion_of_ones_own(model):
    fusion = QualityAwareFusion(["rgb", "text"], uncertainty="msp")
    assert FusionModel(dict(model.heads), fusion).fusion is fusion
    assert FusionModel(dict(model.heads), QualityAwareFusion(2)).names == ("rgb", "text")


def test_state_dict_pickle_and_copies(model):
    model.freeze("text").eval()
    expected = model(inputs()).logits
    fresh = FusionModel({"rgb": copy.deepcopy(model.heads["rgb"]), "text": WithLogits()}).eval()
    fresh.load_state_dict(model.state_dict(), strict=True)
    copied = (copy.deepcopy(model), pickle.loads(pickle.dumps(model)))
    for other in (fresh, *copied):
        assert torch.equal(other(inputs()).logits, expected)
    for other in copied:
        assert not other.train().heads["text"].training


def test_training_lowers_the_loss(model):
    criterion = QMFLoss(model.fusion, num_samples=4)
    optimizer = torch.optim.Adam(model.parameter_groups(lr=0.05))
    losses = []
    for _ in range(30):
        out = model(inputs())
        loss = criterion(out.unimodal_logits, torch.tensor([0, 1, 2, 0]), torch.arange(4)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3
