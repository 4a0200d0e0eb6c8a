"""Uncertainties that are no energies, inside the operators: values and slopes against autograd, in float64."""

import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.uncertainty import UNCERTAINTIES
from qmf_kernels import ops
from qmf_kernels.fused import tiling
from qmf_kernels.fusion import WeightRule

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, TRITON_INTERPRET=1"
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
NAMES = pytest.mark.parametrize("name", ["msp", "entropy", "evidence"])
NUM, ROWS = 3, 5
WALKED = {"_ROW": 0, "_WALK": 32}  # what tiles are cut from: rows in steps of 32 classes
CASES = pytest.mark.parametrize(
    ("classes", "kind"), [(1, "plain"), (7, "plain"), (7, "ties"), (40, "ruled out"), (40, "far apart")]
)
LOSS_RULE = (None, 0.1, -100, 0.3, "margin", "all")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def heads(kind: str, classes: int) -> list[Tensor]:
    x = 2 * randn(NUM, ROWS, classes, seed=1)
    if kind == "ties":
        x = x.round()
    elif kind == "ruled out" and classes > 1:
        x[0, :, 0] = x[2, 1, -1] = -torch.inf
        if classes > 2:
            x[1, 3, : classes - 1] = -torch.inf
    elif kind == "far apart":
        x = 500 * x
    return list(x)


def makers(tempered: bool) -> list[Tensor]:
    values = [[-1.0, -0.5, -2.0], [1.5, 1.0, 2.5], [0.5, 1.0, 3.0]]
    return [torch.tensor(row, dtype=torch.float64) for row in values[: 2 + tempered]]


def written_out(name: str, leaves: list[Tensor], coefficients: list[Tensor], normalize: bool) -> tuple[Tensor, ...]:
    """Fused logits (0 where a class is ruled out), weights and energies, as ``qmf_fusion.uncertainty`` has them."""
    alpha, beta, temperature = coefficients if len(coefficients) == 3 else (*coefficients, torch.ones(NUM))
    weights, energy = [], []
    for m, x in enumerate(leaves):
        out = x == -torch.inf
        z = (x.masked_fill(out, 0) / temperature[m]).masked_fill(out, -torch.inf)  # 0 times -inf is no slope of T
        weights.append(alpha[m] * UNCERTAINTIES[name](z) + beta[m])
        energy.append(-temperature[m] * torch.logsumexp(z, -1))
    w = torch.stack(weights)
    w = w / w.sum(0) if normalize else w
    ruled = torch.stack([x == -torch.inf for x in leaves]).any(0)
    fused = sum(w[m].unsqueeze(-1) * x.masked_fill(x == -torch.inf, 0) for m, x in enumerate(leaves))
    return fused.masked_fill(ruled, 0), w, torch.stack(energy)


@BACKENDS
@NAMES
@CASES
@pytest.mark.parametrize(("tempered", "normalize"), [(False, True), (True, False)])
def test_fusion_is_that_of_autograd(
    name: str, classes: int, kind: str, tempered: bool, normalize: bool, backend: str
) -> None:
    """Also where the largest logits are equal, of whose probabilities each has the same share of the slope."""
    x, coefficients = heads(kind, classes), makers(tempered)
    leaves = [y.clone().requires_grad_() for y in (*x, *coefficients)]
    expected = written_out(name, leaves[:NUM], leaves[NUM:], normalize)
    grads = [randn(*out.shape, seed=7 + i) for i, out in enumerate(expected)]
    wanted = torch.autograd.grad(expected, leaves, grads)
    rule = WeightRule(None, *coefficients, *[None] * (not tempered), None, False, normalize, name)
    with mock.patch.multiple(tiling, **WALKED if classes == 40 else {"_ROW": tiling._ROW}):
        fused, weights, energy = ops.fuse(x, None, *rule, backend)
        d_x, d_makers = ops.fuse_backward(*grads, energy, x, None, *rule, False, True, backend)
    tolerance = {"rtol": 1e-9, "atol": 1e-7 if kind == "far apart" else 1e-10}
    for ours, theirs in zip((fused.masked_fill(fused == -torch.inf, 0), weights, energy), expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), **tolerance)
    for ours, theirs in zip([*d_x, *d_makers[1 : 3 + tempered]], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, **tolerance)


@BACKENDS
@NAMES
@pytest.mark.parametrize("classes", [1, 7])
@pytest.mark.parametrize("many", [False, True], ids=["one launch", "three launches"])
@pytest.mark.parametrize("tempered", [False, True])
def test_objective_is_that_of_autograd(name: str, classes: int, many: bool, tempered: bool, backend: str) -> None:
    x, coefficients = heads("ties", classes), makers(tempered)
    if many:  # more samples than one program compares with each other
        x = [y.repeat(26, 1) for y in x]
    target = torch.arange(len(x[0])) % classes
    leaves = [y.clone().requires_grad_() for y in (*x, *coefficients)]
    fused, weights, energy = written_out(name, leaves[:NUM], leaves[NUM:], False)
    loss = sum(torch.nn.functional.cross_entropy(y, target, label_smoothing=0.1) for y in (*leaves[:NUM], fused))
    wanted = torch.autograd.grad(loss, leaves, retain_graph=True)
    rule = WeightRule(None, *coefficients, *[None] * (not tempered), uncertainty=name)
    inputs = (x, target, None, None, *rule, *LOSS_RULE)
    *out, d_x, d_makers, kept = ops.objective(*inputs, False, True, True, True, backend)
    torch.testing.assert_close(out[0], loss.detach())
    torch.testing.assert_close([*d_x, *d_makers[1 : 3 + tempered]], list(wanted), rtol=1e-9, atol=1e-12)
    *_, d_alone, _, _ = ops.objective(*inputs, False, True, False, True, backend)
    torch.testing.assert_close(d_alone, list(wanted[:NUM]), rtol=1e-9, atol=1e-12)

    of_others = [None, None, None, None, *(randn(*y.shape, seed=3) for y in (fused, weights, energy))]
    wanted = torch.autograd.grad((fused, weights, energy), leaves, of_others[4:])
    d_x, d_makers = ops.objective_backward(*of_others, *inputs, False, True, [], [], kept, backend)
    torch.testing.assert_close([*d_x, *d_makers[1 : 3 + tempered]], list(wanted), rtol=1e-9, atol=1e-11)


@BACKENDS
@NAMES
@pytest.mark.parametrize("learnable", [False, True])
def test_rows_that_do_not_count_leave_the_others_as_they_were(name: str, learnable: bool, backend: str) -> None:
    options: dict[str, Any] = {"uncertainty": name, "learnable": learnable, "temperature": 2.0 if learnable else 1.0}

    def step(x: list[Tensor], present: Tensor) -> tuple[Any, list[Tensor]]:
        criterion = QMFLoss(QualityAwareFusion(NUM, **options), ROWS, 0.0, backend=backend)
        leaves = [y.clone().requires_grad_() for y in x]
        out = criterion(leaves, torch.arange(ROWS) % 4, None, present)
        out.loss.backward()
        return out, [*(y.grad for y in leaves), *(p.grad for p in criterion.parameters())]

    x, present = heads("plain", 4), torch.ones(NUM, ROWS, dtype=torch.bool)
    present[0, 0] = present[1, 1] = present[2, 2] = present[0, 3] = present[1, 0] = False
    expected, d_expected = step(x, present)
    broken = [y.clone() for y in x]
    broken[0][0, 1], broken[1][1, 2], broken[2][2] = torch.nan, torch.inf, -torch.inf
    there = present.clone()
    there[0, 0] = there[1, 1] = there[2, 2] = True
    out, found = step(broken, there)
    assert (out.weights[~present] == 0).all()
    assert all((found[m][~present[m]] == 0).all() for m in range(NUM))
    for ours, theirs in zip((*out, *found), (*expected, *d_expected), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@BACKENDS
def test_the_largest_probability_of_many_keeps_its_digits(backend: str) -> None:
    """In float32 ``1 - u`` has none left of a largest probability of 1 in 20,000."""
    x = randn(1, 20_000, seed=2) / 100
    leaf = x.clone().requires_grad_()
    wanted = torch.autograd.grad(UNCERTAINTIES["msp"](leaf).sum(), leaf)[0]
    rule = WeightRule(None, -torch.ones(1), torch.ones(1), None, uncertainty="msp")
    _, _, energy = ops.fuse([x.float()], None, *rule, backend)
    grads = (torch.zeros(1, 20_000), -torch.ones(1, 1), torch.zeros(1, 1))
    found = ops.fuse_backward(*grads, energy, [x.float()], None, *rule, False, False, backend)[0][0]
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=0)


@BACKENDS
def test_an_uncertainty_that_is_not_known(backend: str) -> None:
    x, rule = heads("plain", 3), WeightRule(None, *makers(False), None, uncertainty="enrgy")
    with pytest.raises(ValueError, match=r"uncertainty must be one of .* got 'enrgy'"):
        ops.fuse(x, None, *rule, backend)
    with pytest.raises(ValueError, match=r"uncertainty must be one of .* got 'enrgy'"):
        ops.objective(x, torch.zeros(ROWS, dtype=torch.long), None, None, *rule, *LOSS_RULE, *[True] * 4, backend)
