"""Exported programs of both rules: saved, loaded where the package is not, compiled ahead of time, in ONNX Runtime."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QualityAwareFusion

from .test_tools import NAMES, batch, build, train

BATCH = torch.export.Dim("batch")


def default():
    model = FusionModel({name: nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 5)) for name in NAMES})
    train(model)
    out = model(batch(9, 200)[0])
    model.fusion.calibrate(out.unimodal_logits, batch(9, 200)[1], fit=["temperature"])
    return model.eval()


def robust(with_features):
    model = build(with_features)
    train(model)
    inputs, target, _ = batch(9, 200)
    out = model(inputs)
    model.fusion.calibrate(out.unimodal_logits, target, features=out.features)
    return model.eval()


pytestmark = pytest.mark.filterwarnings("ignore:the weights of")  # which hold a modality: a calibration like another

MODELS = {"default": default, "robust": lambda: robust(False), "robust, features": lambda: robust(True)}


def damaged(n, seed=1):
    """Inputs of which some rows are broken, and a mask that leaves out others."""
    inputs = batch(seed, n)[0]
    inputs["a"][0, 2] = torch.nan
    inputs["b"][n - 1, 4] = torch.inf
    present = torch.rand(2, n, generator=torch.Generator().manual_seed(seed)) < 0.8
    return inputs, present


def example(masked):
    """Arguments of a whole model, by name, and which of their dimensions may change."""
    inputs, present = batch(n=5)[0], torch.ones(2, 5, dtype=torch.bool)
    shapes = {"inputs": {name: {0: BATCH} for name in NAMES}, "present": {1: BATCH} if masked else None}
    return {"inputs": inputs, "present": present if masked else None}, shapes


def export(model, masked):
    given, shapes = example(masked)
    return torch.export.export(model, (), given, dynamic_shapes=shapes, strict=False)


def leaves(out):
    """What is in an output, None left out, as a loaded program, ONNX and the model order it."""
    return [x.detach() for x in torch.utils._pytree.tree_leaves(tuple(out)) if x is not None]


masks = pytest.mark.parametrize("masked", [False, True], ids=["all", "mask"])


@pytest.mark.slow
@masks
@pytest.mark.parametrize("kind", MODELS)
def test_saved_and_loaded(kind, masked, tmp_path):
    model = MODELS[kind]()
    program = export(model, masked)
    assert "qmf" not in str(program.graph)
    assert "autocast" not in str(program.graph)
    torch.export.save(program, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    for n in (2, 13):
        inputs, present = damaged(n)
        given = {"inputs": inputs, "present": present if masked else None}
        torch.testing.assert_close(leaves(loaded(**given)), leaves(model(**given)), equal_nan=True)


ELSEWHERE = """
import sys, torch

class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("qmf_fusion", "qmf_kernels"):
            raise ImportError(name)

sys.meta_path.insert(0, Hidden())
inputs, present = torch.load("inputs.pt")
for name in sys.argv[1:]:
    logits, weights, energy, unimodal_logits, *_ = torch.export.load(name).module()(inputs=inputs, present=present)
    torch.save([logits, weights, energy, *unimodal_logits], name + ".out")
"""


def test_runs_without_this_package(tmp_path):
    inputs, present = damaged(7)
    torch.save((inputs, present), tmp_path / "inputs.pt")
    expected = {}
    for kind, make in MODELS.items():
        model = make()
        program = export(model, masked=True)
        assert "qmf" not in str(program.graph)
        torch.export.save(program, tmp_path / f"{kind}.pt2")
        expected[f"{kind}.pt2"] = leaves(model(inputs, present)[:4])
    # Isolated: neither the working folder nor PYTHONPATH is looked at.
    subprocess.run([sys.executable, "-I", "-c", ELSEWHERE, *expected], cwd=tmp_path, check=True)
    for name, out in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.out"), out, equal_nan=True)


class Around(nn.Module):
    """What a user has around the model: by name, by place and unpacked."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, a, b):
        out = self.model({"a": a, "b": b})
        logits, weights, *_ = out
        return logits.softmax(-1), weights, out.energy, out[0].argmax(-1), out[:2]


def test_inside_of_another_module():
    module = Around(default())
    inputs = tuple(batch(n=5)[0].values())
    program = torch.export.export(module, inputs, dynamic_shapes=({0: BATCH},) * 2, strict=False)
    inputs = tuple(damaged(9)[0].values())
    torch.testing.assert_close(leaves(program.module()(*inputs)), leaves(module(*inputs)), equal_nan=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["default", "robust, features"])
def test_compiled_ahead_of_time(kind, tmp_path):
    """By Inductor, which needs a compiler for C++."""
    model = MODELS[kind]()
    path = torch._inductor.aoti_compile_and_package(
        export(model, masked=True), package_path=str(tmp_path / "model.pt2")
    )
    inputs, present = damaged(9)
    got = torch._inductor.aoti_load_package(path)(inputs=inputs, present=present)
    torch.testing.assert_close(leaves(got), leaves(model(inputs, present)), equal_nan=True)


def in_onnx_runtime(module, folder, given, shapes, calls):
    """Compare what ONNX Runtime makes of each of the calls' arguments with what the module does."""
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript", reason="exporting to ONNX takes onnx and onnxscript")
    program = torch.onnx.export(module, kwargs=given, dynamic_shapes=shapes, dynamo=True, verbose=False)
    program.save(folder / "model.onnx")
    session = runtime.InferenceSession(folder / "model.onnx")
    names = [i.name for i in session.get_inputs()]
    for call in calls:
        tensors = [x.numpy() for x in torch.utils._pytree.tree_leaves(call) if x is not None]
        got = session.run(None, dict(zip(names, tensors, strict=True)))
        expected = leaves(module(**call))
        for x, y in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(x), y, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("kind", "masked"),
    [
        pytest.param(kind, masked, marks=() if (kind, masked) == ("default", True) else pytest.mark.slow)
        for kind in MODELS
        for masked in (False, True)
    ],
)
def test_model_in_onnx_runtime(kind, masked, tmp_path):
    model = MODELS[kind]()
    calls = []
    for n in (1, 13):
        inputs, present = damaged(n)
        calls.append({"inputs": inputs, "present": present if masked else None})
    in_onnx_runtime(model, tmp_path, *example(masked), calls)


LAYERS = {
    "energy": lambda: QualityAwareFusion(2, temperature=2.0, nonnegative=True),
    "entropy": lambda: QualityAwareFusion(2, uncertainty="entropy", normalize=True),
    "probabilities": lambda: QualityAwareFusion(2, combine="probabilities", normalize_logits=0.1),
    "robust": lambda: robust(False).fusion,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "kind", ["energy", *(pytest.param(kind, marks=pytest.mark.slow) for kind in list(LAYERS)[1:-1]), "robust"]
)
def test_layer_in_onnx_runtime(kind, tmp_path):
    """Rows of which a part is not finite, as heads may return them: ONNX Runtime's maximum leaves NaN out."""
    fusion = LAYERS[kind]().eval()
    logits = list(torch.randn(2, 6, 5))
    given, shapes = {"logits": logits}, {"logits": [{0: BATCH}] * 2}
    broken = [x.clone() for x in logits]
    broken[0][0, 3] = broken[1][1, 0] = torch.nan
    broken[0][2, 1], broken[1][3, 4] = torch.inf, -torch.inf
    in_onnx_runtime(fusion, tmp_path, given, shapes, [given, {"logits": broken}])
