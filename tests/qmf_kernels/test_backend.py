"""``backend="triton"`` behind the public interface: the numbers of PyTorch, and what to do where it can't run."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.functional import qmf_objective
from qmf_kernels import operators

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, TRITON_INTERPRET=1"
)

OPTIONS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": ({}, {}),
    "many": ({"nonnegative": True}, {"pairs": "all", "form": "margin", "start_epoch": 2}),
    "learnable": ({"learnable": True, "temperature": 2.0}, {"label_smoothing": 0.1}),
    "normalize": ({"normalize": True, "detach_weights": True}, {"form": "released", "rescale": None}),
    "msp": (
        {"uncertainty": "msp", "learnable": True, "temperature": 0.5},
        {"weight": torch.tensor([1.0, 0.5, 2.0, 0.0])},
    ),
    "dense entropy": ({"uncertainty": "entropy", "class_dim": 1, "nonnegative": True}, {"ignore_index": 3}),
    "callable": ({"uncertainty": lambda x: -x.square().mean(-1), "detach_weights": True}, {}),
    "dense": ({"class_dim": 1}, {"ignore_index": 3}),
    "lognorm": ({"normalize_logits": 1.0}, {}),
    "probabilities": ({"combine": "probabilities", "learnable": True}, {"label_smoothing": 0.1}),
    "robust": ({}, {"pairs": "all"}),
    "dense robust": ({"normalize_logits": 0.5, "class_dim": 1}, {"label_smoothing": 0.1}),
}


def make_fusion(name: str) -> QualityAwareFusion:
    if name.endswith("robust"):
        return QualityAwareFusion.robust(3, num_classes=4, **OPTIONS[name][0])
    return QualityAwareFusion(3, **OPTIONS[name][0])


def run(backend: str | None, name: str, dtype: torch.dtype, return_logits: bool = True) -> list[torch.Tensor]:
    """Three training steps, and a fourth whose backward starts elsewhere."""
    loss_options = OPTIONS[name][1]
    fusion = make_fusion(name)
    criterion = QMFLoss(fusion, 12, 0.5, backend=backend, return_logits=return_logits, **loss_options)
    generator = torch.Generator().manual_seed(3)
    found = []
    for step in range(4):
        shape = (7, 4, 3) if name.startswith("dense") else (7, 4)
        rows = [torch.randn(*shape, generator=generator).to(dtype).requires_grad_() for _ in range(3)]
        target = torch.randint(4, (shape[0], *shape[2:]), generator=generator)
        index = torch.randint(12, (7,), generator=generator)
        present = torch.rand(3, 7, generator=generator) > 0.2
        out = criterion(rows, target, index, present if step % 2 else None)
        if step < 3:
            out.loss.backward()
        else:
            (out.unimodal_losses[0] + 3 * out.energy.nan_to_num(posinf=0).mean() + out.weights.sum()).backward()
        found += [x.detach() for x in out] + [x.grad for x in rows]
    learned = [*criterion.state_dict().values(), *fusion.state_dict().values(), *(p.grad for p in fusion.parameters())]
    return [*found, *learned]


# In both dtypes by default what the kernels themselves do; of the others, one covers both.
STEPS = [
    pytest.param(name, dtype, marks=pytest.mark.slow if slow else ())
    for name in OPTIONS
    for dtype in (torch.float64, torch.float32)
    for slow in [dtype == torch.float32 and name not in ("plain", "many", "dense")]
]


@needs_interpreter
@pytest.mark.parametrize(("name", "dtype"), STEPS)
def test_same_steps_as_pytorch(name: str, dtype: torch.dtype) -> None:
    tolerance = 1e-10 if dtype == torch.float64 else 2e-5
    for x, y in zip(run("triton", name, dtype), run("torch", name, dtype), strict=True):
        torch.testing.assert_close(x, y, atol=tolerance, rtol=tolerance, equal_nan=True)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("name", ["plain", "dense", "robust"])
def test_without_fused_logits_all_else_is_the_same(name: str, backend: str) -> None:
    full, lean = (run(backend, name, torch.float32, return_logits) for return_logits in (True, False))
    assert sum(x.shape != y.shape for x, y in zip(full, lean, strict=True)) == 4
    for x, y in zip(full, lean, strict=True):
        if y.numel():
            torch.testing.assert_close(x, y, rtol=0, atol=0, equal_nan=True)


def test_robust_leaves_fused_logits_out_too() -> None:
    criterion = QMFLoss(QualityAwareFusion.robust(2, num_classes=4), 3, return_logits=False)
    out = criterion([torch.randn(3, 4) for _ in range(2)], torch.arange(3), torch.arange(3))
    assert out.logits.shape == (0,)


@needs_interpreter
@pytest.mark.parametrize("rows", [5, 600])
def test_backward_twice_and_scaled(rows: int) -> None:
    """Both where one launch makes the gradients and where the backward does."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(rows, 5, generator=generator).requires_grad_() for _ in range(2)]
    target, kappa = torch.arange(rows) % 5, torch.rand(2, rows, generator=generator)
    expected = torch.autograd.grad(qmf_objective(heads, target, kappa, backend="torch").loss, heads)
    loss = qmf_objective(heads, target, kappa, backend="triton").loss
    for scale in (1.0, 1024.0, 0.5):
        grads = torch.autograd.grad(loss * scale, heads, retain_graph=True)
        for x, y in zip(grads, expected, strict=True):
            torch.testing.assert_close(x / scale, y, atol=1e-6, rtol=1e-5)
    with pytest.raises(RuntimeError, match="differentiated again"):
        torch.autograd.grad(loss, heads, create_graph=True)[0].sum().backward()


@needs_interpreter
def test_a_loss_scale_reaches_small_half_precision_gradients() -> None:
    heads = [torch.tensor([[20.0, 0.0]], dtype=torch.float16, requires_grad=True) for _ in range(2)]
    loss = qmf_objective(heads, torch.tensor([0]), None, backend="triton").loss
    grad = torch.autograd.grad(loss * 2.0**16, heads)[0]
    assert grad.dtype == torch.float16
    assert grad[0, 1] > 0


@needs_interpreter
@pytest.mark.parametrize(
    ("name", "dynamic"),
    [
        ("plain", False),
        ("learnable", True),
        ("dense", True),
        pytest.param("plain", True, marks=pytest.mark.slow),
        pytest.param("learnable", False, marks=pytest.mark.slow),
        pytest.param("dense", False, marks=pytest.mark.slow),
    ],
)
def test_compiled_steps(name: str, dynamic: bool) -> None:
    """As on a device, but for the interpreter: fakes, kept tensors and the history's own operator."""
    torch.compiler.reset()
    options, loss_options = OPTIONS[name]
    found = []
    for compiled in (False, True):
        criterion = QMFLoss(QualityAwareFusion(2, **options), 8, backend="triton", **loss_options)
        call = torch.compile(criterion, fullgraph=True, backend="aot_eager", dynamic=dynamic) if compiled else criterion
        generator = torch.Generator().manual_seed(0)
        values = []
        for batch in (6, 6, 5) if dynamic else (6, 6):
            shape = (batch, 4, 3) if name == "dense" else (batch, 4)
            rows = [torch.randn(*shape, generator=generator).requires_grad_() for _ in range(2)]
            out = call(rows, torch.randint(3, (batch, *shape[2:]), generator=generator), torch.arange(batch))
            out.loss.backward()
            values += [out.loss.detach(), out.logits.detach(), *(x.grad for x in rows)]
        found.append([*values, criterion.ranking.trajectory.history])
    torch.compiler.reset()
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y)


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
@pytest.mark.parametrize("rows", [6, 600])
def test_compiled_steps_without_fused_logits(rows: int, backend: str) -> None:
    """Whose gradient, under torch.compile, is a tensor all the same: an empty one."""
    torch.compiler.reset()
    grads = []
    for compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        criterion = QMFLoss(QualityAwareFusion(2), rows, backend=backend, return_logits=False)
        call = torch.compile(criterion, fullgraph=True, backend="aot_eager") if compiled else criterion
        heads = [torch.randn(rows, 5, generator=generator).requires_grad_() for _ in range(2)]
        call(heads, torch.arange(rows) % 5, torch.arange(rows)).loss.backward()
        grads.append([x.grad for x in heads])
    torch.compiler.reset()
    for x, y in zip(*grads, strict=True):
        torch.testing.assert_close(x, y)


def test_vmap_says_that_it_does_not_work() -> None:
    heads, target = torch.randn(3, 2, 4, 5), torch.zeros(4, dtype=torch.int64)
    with pytest.raises(RuntimeError, match=r"torch\.func"):
        torch.func.vmap(lambda x: qmf_objective(list(x), target, None).loss)(heads)


@needs_interpreter
@pytest.mark.parametrize("rows", [2, 1100])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_beside_float64(rows: int, half: torch.dtype) -> None:
    """Whether one launch makes the gradients or three do."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(rows, 4, generator=generator).to(dtype).requires_grad_() for dtype in (half, torch.float64)]
    grads = {}
    for backend in ("torch", "triton"):
        loss = rows * qmf_objective(heads, torch.arange(rows) % 4, None, backend=backend).loss
        grads[backend] = torch.autograd.grad(loss, heads)
    for x, y, head in zip(grads["triton"], grads["torch"], heads, strict=True):
        assert x.dtype == head.dtype
        torch.testing.assert_close(x, y, atol=1e-2 if head.dtype == half else 1e-12, rtol=1e-2)


def test_without_the_interpreter_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "TRITON_VERSION", operators.NEEDED_TRITON)
    monkeypatch.setattr(operators, "HAS_TRITON", True)
    monkeypatch.setattr(operators, "INTERPRETED", False)
    heads = [torch.randn(2, 3) for _ in range(2)]
    with pytest.raises(RuntimeError, match=r"backend='triton' .*TRITON_INTERPRET=1"):
        qmf_objective(heads, torch.tensor([0, 1]), None, backend="triton")
    with pytest.raises(RuntimeError, match=r"backend='triton'"):
        QMFLoss(QualityAwareFusion(2), 2, backend="triton")(heads, torch.tensor([0, 1]), torch.arange(2))


@pytest.mark.parametrize(
    ("version", "message"),
    [
        (None, "backend='triton' needs Triton: pip install triton"),
        ((3, 2), r"backend='triton' needs Triton 3\.6 or newer, and Triton 3\.2 is installed: upgrade PyTorch"),
    ],
)
def test_without_triton_it_says_so(version: object, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(operators, "TRITON_VERSION", version)
    monkeypatch.setattr(operators, "HAS_TRITON", False)
    with pytest.raises(RuntimeError, match=message):
        qmf_objective([torch.randn(2, 3)] * 2, torch.tensor([0, 1]), None, backend="triton")


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("__version__ = '3.10.0+git1a2b3c'", (3, 10)),
        ('"""Triton."""\n__version__ = "3.2.0"\n', (3, 2)),
        ("my_own_module_of_this_name = True", None),
    ],
)
def test_finds_the_version_without_an_import(
    text: str, version: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(text)
    monkeypatch.delitem(sys.modules, "triton", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    assert operators._triton_version() == version
    assert "triton" not in sys.modules


@pytest.mark.parametrize(("version", "taken"), [("3.2.0", False), ("3.5.1", False), ("3.6.0", True), ("3.10.0", True)])
def test_plain_pytorch_takes_over_below_what_the_kernels_need(version: str, taken: bool, tmp_path: Path) -> None:
    (tmp_path / "triton").mkdir()
    (tmp_path / "triton/__init__.py").write_text(f"__version__ = '{version}'")
    code = (
        "import sys, torch, qmf_kernels\n"
        "assert 'triton' not in sys.modules\n"
        "print(qmf_kernels.takes_triton(torch.device('cuda'), None))"
    )
    path = os.pathsep.join([str(tmp_path), *filter(None, sys.path)])
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == [str(taken)]
