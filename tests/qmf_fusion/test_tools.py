"""The recommended rule under PyTorch's tools, with features and without, gathered and calibrated."""

import copy
import io
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

NAMES = ("a", "b")


class Head(nn.Module):
    def __init__(self, gives_features):
        super().__init__()
        self.encoder, self.last, self.gives_features = nn.Linear(6, 8), nn.Linear(8, 5), gives_features

    def forward(self, x):
        features = self.encoder(x)
        return (self.last(features), features) if self.gives_features else self.last(features)


def batch(step=0, n=40):
    g = torch.Generator().manual_seed(step)
    target = torch.randint(5, (n,), generator=g)
    x = torch.randn(2, n, 6, generator=g) + nn.functional.one_hot(target, 6)
    return dict(zip(NAMES, x, strict=True)), target, torch.arange(n)


def build(with_features):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        heads = {"a": Head(with_features), "b": Head(False)}
        fusion = QualityAwareFusion.robust(NAMES, 5, features=[8, None] if with_features else None)
        return FusionModel(heads, fusion)


def train(model, run=None, criterion=None, steps=4, of_fused=True):
    """Train, with a loss of the fused logits too, whose backward goes through the statistics, where asked."""
    criterion = criterion or QMFLoss(model.fusion, 40)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(steps):
        inputs, target, index = batch(step)
        out = (model if run is None else run)(inputs)
        loss = criterion(out.unimodal_logits, target, index, features=out.features).loss
        optimizer.zero_grad()
        (loss + out.logits.square().mean() if of_fused else loss).backward()
        optimizer.step()
    return criterion


@pytest.fixture(params=[False, True], ids=["logits", "features"])
def with_features(request):
    return request.param


@pytest.fixture(params=["gathered", "calibrated"])
def model(request, with_features):
    """In evaluation, with statistics."""
    model = build(with_features)
    train(model)
    if request.param == "calibrated":
        inputs, target, _ = batch(9, 200)
        out = model(inputs)
        model.fusion.calibrate(out.unimodal_logits, target, features=out.features)
    assert (model.fusion.uncertainties(*seen(model)) > 0).any()
    return model.eval()


def seen(model):
    out = model(batch(7)[0])
    return out.unimodal_logits, out.features


def outputs(model):
    out = model(batch(7)[0])
    return [out.logits.detach(), out.weights.detach(), out.energy.detach()]


def assert_same_state(a, b, **tolerances):
    for name, value in a.state_dict().items():
        torch.testing.assert_close(b.state_dict()[name], value, msg=name, **tolerances)


@pytest.mark.filterwarnings("ignore")
def test_training_under_compile(with_features):
    torch.compiler.reset()
    eager, compiled = build(with_features), build(with_features)
    history = train(eager), train(compiled, torch.compile(compiled, backend="aot_eager", fullgraph=True))
    assert_same_state(eager, compiled, rtol=1e-4, atol=1e-5)
    assert_same_state(*history, rtol=1e-4, atol=1e-5)
    compiled.eval()
    torch.testing.assert_close(outputs(torch.compile(compiled, backend="aot_eager", fullgraph=True)), outputs(compiled))


@pytest.mark.parametrize("reentrant", [False, True])
def test_training_with_activation_checkpointing(with_features, reentrant):
    plain, wrapped = build(with_features), build(with_features)

    def run(inputs):
        def forward(a, b):
            out = wrapped({"a": a, "b": b})
            return (*out.unimodal_logits, *(out.features or ()))  # reentrant checkpointing finds no deeper tensors

        a, b, *features = checkpoint(forward, *(x.requires_grad_() for x in inputs.values()), use_reentrant=reentrant)
        return SimpleNamespace(unimodal_logits=(a, b), features=features or None)

    history = train(plain, of_fused=False), train(wrapped, run, of_fused=False)
    assert_same_state(plain, wrapped)
    assert_same_state(*history)


@pytest.mark.parametrize("how", ["no_grad", "model.eval", "criterion.eval"])
def test_nothing_is_learned_outside_of_training(with_features, how):
    model = build(with_features)
    criterion = train(model)
    before = copy.deepcopy((model, criterion))
    model.train(how != "model.eval")
    criterion.train(how != "criterion.eval")
    inputs, target, index = batch(5)
    with torch.set_grad_enabled(how != "no_grad"):
        out = model(inputs)
        assert torch.isfinite(criterion(out.unimodal_logits, target, index, features=out.features).loss)
    assert_same_state(before[0], model, rtol=0, atol=0)
    assert_same_state(before[1], criterion, rtol=0, atol=0)


def test_averages_of_moments_are_moments(with_features):
    """Statistics of an average follow from averaged sums, as of all that either model has seen."""
    model = build(with_features)
    criterion = train(model, steps=2)
    averages = [
        AveragedModel(model, use_buffers=True),
        AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True),
    ]
    states = []
    for _ in range(2):
        train(model, criterion=criterion, steps=1)
        states.append(copy.deepcopy(model.state_dict()))
        for average in averages:
            average.update_parameters(model)
    for average in averages:
        for name in ("classes", "measured"):
            key = f"fusion.rule.running.{name}"
            expected = (states[0][key] + states[1][key]) / 2
            torch.testing.assert_close(average.module.state_dict()[key], expected)
        fused, weights, _ = outputs(average.module.eval())
        torch.testing.assert_close(fused.exp().sum(-1), torch.ones(40))
        assert ((weights > 0) & (weights < 1)).all()


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_distributed_checkpoint(model, with_features, tmp_path):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    other = build(with_features).eval()
    dcp.save(model.state_dict(), checkpoint_id=tmp_path)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=tmp_path)
    other.load_state_dict(state)
    torch.testing.assert_close(outputs(other), outputs(model))


def test_from_the_meta_device(model, with_features):
    with torch.device("meta"):
        other = build(with_features).eval()
        shapes = [x.shape for x in other({name: torch.empty(40, 6) for name in NAMES})[:3]]
        criterion = QMFLoss(other.fusion, 40)
        out = other.train()({name: torch.empty(40, 6) for name in NAMES})
        index = torch.zeros(40, dtype=torch.long)
        for module in (other, criterion):
            module.to("meta")
        criterion(out.unimodal_logits, index, index, features=out.features).loss.backward()
    assert shapes == [x.shape for x in outputs(model)]
    other.eval().load_state_dict(model.state_dict(), assign=True)
    torch.testing.assert_close(outputs(other), outputs(model))


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "torch.save"])
def test_copies(model, way):
    if way == "torch.save":
        stream = io.BytesIO()
        torch.save(model, stream)
        stream.seek(0)
        other = torch.load(stream, weights_only=False)
    else:
        other = copy.deepcopy(model) if way == "deepcopy" else pickle.loads(pickle.dumps(model))
    torch.testing.assert_close(outputs(other), outputs(model))
    train(other.train())


def test_bfloat16_autocast(model):
    expected = outputs(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = model(batch(7)[0])
    assert out.unimodal_logits[0].dtype == torch.bfloat16
    assert out.logits.dtype == out.weights.dtype == torch.float32
    torch.testing.assert_close(out.logits.detach(), expected[0], rtol=0.05, atol=0.1)
    criterion = QMFLoss(model.train().fusion, 40)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        train(model, criterion=criterion)
    buffers = {name: x for name, x in model.named_buffers() if "rule.running" in name}
    assert all(x.dtype == torch.float64 and torch.isfinite(x).all() for x in buffers.values())
