"""torch.compile without a graph break, and torch.export: the same numbers as eager."""

import copy

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

from .test_fusion import COEFFICIENTS, heads, randn
from .test_mixture import clean_data


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize(
    ("options", "backend"),
    [
        ({"normalize": True}, "aot_eager"),
        ({"uncertainty": "msp", "class_dim": 1}, "aot_eager"),
        ({"uncertainty": "evidence", "class_dim": 1}, "aot_eager"),
        ({"uncertainty": "entropy", "normalize": True}, "aot_eager"),
        pytest.param({"uncertainty": "entropy", "normalize": True}, "inductor", marks=pytest.mark.slow),
        pytest.param({"learnable": True, "nonnegative": True, **COEFFICIENTS}, "inductor", marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_layer(options, backend):
    fusion = QualityAwareFusion(3, **options)
    compiled = torch.compile(fusion, fullgraph=True, backend=backend)
    mask = torch.tensor([[True, False], [True, True], [False, True]])
    results = []
    for call in (fusion, compiled):
        leaves = heads(3, 2, 4, dtype=torch.float32, grad=True)
        out = call(leaves, mask)
        out.logits.square().sum().backward()
        results.append([out.logits, out.weights, out.energy, *(x.grad for x in leaves)])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize(
    ("pairs", "backend", "options"),
    [
        ("all", "aot_eager", {}),
        ("adjacent", "inductor", {}),
        ("adjacent", "aot_eager", {"update": "before", "sampling_count": 1}),
    ],
)
def test_training_steps(pairs, backend, options):
    """Loss, gradients and the trajectory, over several steps."""
    options = {"form": "margin", "pairs": pairs, "label_smoothing": 0.1, "start_epoch": 2, **options}
    eager = QMFLoss(QualityAwareFusion(2, learnable=True), 20, 0.5, **options)
    other = copy.deepcopy(eager)
    compiled = torch.compile(other, fullgraph=True, backend=backend)
    target = torch.tensor([0, 1, 2, 3, -100])
    for step in range(4):
        index = torch.randperm(20, generator=torch.Generator().manual_seed(step % 2))[:5]
        grads = []
        for call in (eager, compiled):
            leaves = [(randn(5, 4, seed=10 * step + m)).float().requires_grad_() for m in range(2)]
            out = call(leaves, target, index, torch.tensor([[True, False, True, True, True], [True] * 5]))
            out.loss.backward()
            values = (out.loss, out.ranking_loss, out.weights, out.sample_losses)
            grads.append([*(x.detach() for x in values), *(x.grad for x in leaves)])
        for x, y in zip(*grads, strict=True):
            torch.testing.assert_close(x, y, equal_nan=True)
    assert grads[0][1] > 0
    for (name, x), y in zip(eager.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(x.grad, y.grad, msg=name)
    assert eager.ranking.trajectory.count.sum() > 0
    for name, x in eager.state_dict().items():
        torch.testing.assert_close(x, other.state_dict()[name], msg=name)


def test_a_model_with_an_absent_head():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FusionModel({"rgb": nn.Linear(6, 4), "depth": nn.Linear(3, 4)})
    compiled = torch.compile(model, fullgraph=True)
    full = {"rgb": randn(5, 6).float(), "depth": randn(5, 3).float()}
    for inputs in (full, {"rgb": full["rgb"]}, {"rgb": None, "depth": full["depth"]}):
        out, expected = compiled(inputs), model(inputs)
        torch.testing.assert_close(out.logits, expected.logits)
        torch.testing.assert_close(out.weights, expected.weights)
        grads = [torch.autograd.grad(o.logits.sum(), model.parameters(), allow_unused=True) for o in (out, expected)]
        for x, y in zip(*grads, strict=True):
            assert (x is None) == (y is None)
            if x is not None:
                torch.testing.assert_close(x, y)


def test_dynamic_shapes():
    fusion = QualityAwareFusion(2, normalize=True)
    compiled = torch.compile(fusion, fullgraph=True, dynamic=True, backend="aot_eager")
    for batch in (3, 5, 8):
        logits = heads(2, batch, 4)
        torch.testing.assert_close(compiled(logits).logits, fusion(logits).logits)


class Positional(nn.Module):
    def __init__(self, fusion):
        super().__init__()
        self.fusion = fusion

    def forward(self, a, b):
        out = self.fusion([a, b])
        return out.logits, out.weights


def calibrated():
    logits, target = clean_data(m=2, k=4)
    return QualityAwareFusion.robust(2, 4).calibrate(logits, target)


EXPORTED = {
    "energy": lambda: QualityAwareFusion(2, temperature=2.0),
    "entropy": lambda: QualityAwareFusion(2, uncertainty="entropy", temperature=2.0),
    "probabilities": lambda: QualityAwareFusion(2, combine="probabilities", normalize_logits=0.1),
    "robust": lambda: QualityAwareFusion.robust(2, 4),
    "robust, calibrated": calibrated,
}


@pytest.mark.parametrize("name", EXPORTED)
def test_export(name):
    module = Positional(EXPORTED[name]())
    batch = torch.export.Dim("batch", min=2)
    logits = heads(2, dtype=torch.float32)
    program = torch.export.export(module, tuple(logits), dynamic_shapes=({0: batch}, {0: batch}))
    for size in (5, 9):
        logits = heads(2, size, 4, dtype=torch.float32)
        for x, y in zip(program.module()(*logits), module(*logits), strict=True):
            torch.testing.assert_close(x, y)
