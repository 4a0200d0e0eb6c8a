"""The kernels on hardware: as close to float64 as eager PyTorch is, the same bits in every run, and at large sizes."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch import Tensor

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_kernels import FORMS, PAIRS, Losses, LossRule, WeightRule, fuse, objective, rank
from qmf_kernels.eager.fusion import accumulate_dtype

from ..qmf_kernels.triton_kernels.cases import Case, assert_errors_close, bounded, cases, poisoned, same
from . import gpu

pytestmark = gpu.needs_gpu

ROWS = cases((1, 2, 7, 37), (1, 2, 3, 19, 70, 1500))
LARGE = cases((200, 1030), (33, 130))
DENSE = cases((1, 3), (1, 3, 40), ((1,), (5,), (2, 3), (3, 1, 2), (2, 2, 3)))


def leaves_of(case: Case) -> tuple[list[Tensor], WeightRule, list[Tensor]]:
    """Heads and the rule's tensors that want gradients, in their places and in a row."""
    heads = [x.detach().requires_grad_() for x in case.logits]
    given = {name: x.detach().requires_grad_() for name, x in case.rule._asdict().items() if isinstance(x, Tensor)}
    return heads, case.rule._replace(**given), [*heads, *given.values()]


def differentiate(outputs: Any, leaves: list[Tensor], seed: int, dtype: torch.dtype) -> list[Tensor]:
    """Gradients that come into every output: of float64 numbers that do not depend on the device."""
    generator = torch.Generator().manual_seed(seed)
    grads = [torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.device, dtype) for x in outputs]
    return list(torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True))


def run_objective(case: Case, backend: str, seed: int, only_loss: bool) -> dict[str, Tensor]:
    heads, rule, leaves = leaves_of(case)
    inputs = (heads, case.target, case.kappa, case.present, rule, case.loss_rule)
    out = objective(*inputs, backend=backend)
    outputs = [out.loss] if only_loss else list(out[:7])
    found = differentiate(outputs, leaves, seed, accumulate_dtype(case.logits))
    return {**out._asdict(), **{f"gradient {i}": grad for i, grad in enumerate(found)}}


def run_fuse(case: Case, backend: str, seed: int) -> dict[str, Tensor]:
    heads, rule, leaves = leaves_of(case)
    out = fuse(heads, case.present, rule, backend)
    found = differentiate(list(out), leaves, seed, accumulate_dtype(case.logits))
    names = ("fused", "weights", "energy")
    return {**dict(zip(names, out, strict=True)), **{f"gradient {i}": grad for i, grad in enumerate(found)}}


def compare(case: Case, run: Any, *rest: Any) -> None:
    """Our error against float64 with that of PyTorch at the same precision on the same device; and twice the same."""
    there = gpu.move(case)
    with poisoned(float("nan")):
        ours = run(there, "triton", *rest)
    with poisoned(12345.0):
        again = run(there, "triton", *rest)
    eager = run(gpu.move(case.eager), "torch", *rest)
    truth = run(case.wide, "torch", *rest)
    size = 1 + max(x.double().nan_to_num(0, 0, 0).abs().max().item() for x in case.logits)
    for name, value in truth.items():
        assert same(ours[name], again[name]), f"{name}: other bits in a second run"
        found, other = (x[name].detach().cpu() for x in (ours, eager))
        assert_errors_close(name, found, other, value.detach(), size)


@bounded(12)
@given(st.one_of(ROWS, DENSE, LARGE), st.booleans(), st.integers(0, 1000))
def test_objective(case: Case, only_loss: bool, seed: int) -> None:
    compare(case, run_objective, seed, only_loss)


@bounded(8)
@given(st.one_of(ROWS, DENSE), st.integers(0, 1000))
def test_fusion(case: Case, seed: int) -> None:
    compare(case, run_fuse, seed)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("batch", [1, 300])
def test_ranking(form: str, pairs: str, batch: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    weights, kappa = (torch.rand(3, batch, generator=generator) for _ in range(2))
    kappa[torch.rand(3, batch, generator=generator) < 0.2] = torch.nan
    found: list[list[Tensor]] = []
    for device, dtype in ((gpu.DEVICE, torch.float32), ("cpu", torch.float32), ("cpu", torch.float64)):
        leaf = weights.to(device, dtype).requires_grad_()
        loss = rank(leaf, kappa.to(device, dtype), form, pairs)
        found.append([loss.detach().cpu(), torch.autograd.grad(loss, leaf)[0].cpu()])
    for name, ours, eager, truth in zip(("loss", "gradient"), *found, strict=True):
        assert_errors_close(name, ours, eager, truth)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("batch", "classes"), [(64, 10), (700, 101), (33, 4000)])
def test_every_dtype(dtype: torch.dtype, batch: int, classes: int) -> None:
    """One launch, three, and rows that are walked."""
    generator = torch.Generator().manual_seed(0)
    heads = [(2 * torch.randn(batch, classes, generator=generator)).to(dtype) for _ in range(3)]
    target, kappa = torch.randint(classes, (batch,), generator=generator), torch.rand(3, batch, generator=generator)
    rule = WeightRule(None, torch.full((3,), -0.1), torch.zeros(3), None)
    compare(Case(heads, target, kappa, None, rule, LossRule()), run_objective, 0, True)


@pytest.mark.parametrize("batch", [32, 3000])
@pytest.mark.parametrize("start_epoch", [1, 2])
def test_histories_match_the_cpus(batch: int, start_epoch: int) -> None:
    """Repeated indices among them, in one launch and in three."""
    generator = torch.Generator().manual_seed(0)
    criteria = [
        QMFLoss(QualityAwareFusion(2).to(device), 500, start_epoch=start_epoch, backend=backend).to(device)
        for device, backend in ((gpu.DEVICE, None), ("cpu", "torch"))
    ]
    for _ in range(4):
        rows = [torch.randn(batch, 10, generator=generator) for _ in range(2)]
        target, index = (
            torch.randint(10, (batch,), generator=generator),
            torch.randint(500, (batch,), generator=generator),
        )
        ours = criteria[0](*(gpu.move(x) for x in (rows, target, index)))
        theirs = criteria[1](rows, target, index)
        torch.testing.assert_close(ours.loss.cpu(), theirs.loss, rtol=2e-5, atol=1e-6)
        torch.testing.assert_close(ours.ranking_loss.cpu(), theirs.ranking_loss, rtol=1e-4, atol=1e-6)
    found, expected = (criterion.ranking.trajectory for criterion in criteria)
    assert torch.equal(found.count.cpu(), expected.count)
    torch.testing.assert_close(found.total.cpu(), expected.total, rtol=1e-5, atol=1e-6)
    samples = torch.arange(500)
    kappas = found.kappa(samples.to(gpu.DEVICE)).cpu(), expected.kappa(samples)
    torch.testing.assert_close(*kappas, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize(("batch", "classes"), [(100, 20), (5000, 50), (40, 30_000)])
@pytest.mark.parametrize("pairs", PAIRS)
def test_two_runs_have_the_same_bits(batch: int, classes: int, pairs: str) -> None:
    runs = []
    for _ in range(2):
        criterion, rows, target, index = gpu.make_step(3, batch, classes, samples=20_000, pairs=pairs)
        found: list[Tensor] = []
        for _ in range(3):
            out = criterion(rows, target, index)
            found += [out.loss.detach(), out.ranking_loss.detach(), *torch.autograd.grad(out.loss, rows)]
        runs.append([*found, criterion.ranking.trajectory.history.clone(), criterion.ranking.trajectory.span.clone()])
    assert all(torch.equal(x, y) for x, y in zip(*runs, strict=True))


def simple(heads: list[Tensor], target: Tensor, backend: str) -> tuple[Losses, list[Tensor]]:
    """Without ranking, whose pairs would tie the rows together; fused logits are left out."""
    alpha = torch.full((len(heads),), -0.1, dtype=torch.float64, device=heads[0].device)
    rule = WeightRule(None, alpha, torch.zeros_like(alpha), None)
    leaves = [x.detach().requires_grad_() for x in heads]
    loss_rule = LossRule(ranking_weight=0.0)
    out = objective(leaves, target, None, None, rule, loss_rule, backend=backend, return_logits=False)
    return out, list(torch.autograd.grad(out.loss, leaves))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_million_classes(dtype: torch.dtype) -> None:
    generator = torch.Generator(gpu.DEVICE).manual_seed(0)
    heads = [torch.randn(3, 1_000_000, generator=generator, device=gpu.DEVICE).to(dtype) for _ in range(2)]
    target = torch.tensor([0, 999_999, 123_456], device=gpu.DEVICE)
    out, grads = simple(heads, target, "triton")
    eager, eager_grads = simple([x.float() for x in heads], target, "torch")
    truth, true_grads = simple([x.cpu().double() for x in heads], target.cpu(), "torch")
    for name in ("loss", "fused_loss", "unimodal_losses", "weights", "energy", "sample_losses"):
        found = (getattr(x, name).detach().cpu() for x in (out, eager, truth))
        assert_errors_close(name, *found)
    for ours, other, true in zip(grads, eager_grads, true_grads, strict=True):
        assert_errors_close("gradient", ours.cpu(), other.cpu(), true)


def test_more_than_two_to_the_31_elements() -> None:
    rows, classes = 2_150_000, 1000
    free = torch.cuda.mem_get_info()[0]
    if free < 14 * 2**30:
        pytest.skip(f"needs 14 GiB of free GPU memory, and there are {free / 2**30:.1f}")
    torch.cuda.empty_cache()
    x = torch.empty(rows, classes, dtype=torch.bfloat16, device=gpu.DEVICE).normal_()
    assert x.numel() > 2**31
    target = torch.arange(rows, device=gpu.DEVICE) % classes
    out, (grad,) = simple([x], target, "triton")
    ends = torch.tensor([*range(4), *range(rows - 4, rows)], device=gpu.DEVICE)
    truth, (true_grad,) = simple([x[ends].cpu().double()], target[ends].cpu(), "torch")
    torch.testing.assert_close(out.energy[:, ends].cpu().double(), truth.energy, rtol=1e-5, atol=0)
    torch.testing.assert_close(out.sample_losses[:, ends].cpu().double(), truth.sample_losses, rtol=1e-5, atol=0)
    # Means are over all rows here, over eight there.
    scaled = grad[ends].cpu().double() * (rows / len(ends))
    torch.testing.assert_close(scaled, true_grad, rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize(("batch", "classes"), [(5, 7), (300, 1100)])
def test_sixteen_modalities(batch: int, classes: int) -> None:
    generator = torch.Generator().manual_seed(batch)
    heads = [torch.randn(batch, classes, generator=generator) for _ in range(16)]
    target = torch.randint(classes, (batch,), generator=generator)
    out, grads = simple(gpu.move(heads), gpu.move(target), "triton")
    truth, true_grads = simple([x.double() for x in heads], target, "torch")
    torch.testing.assert_close(out.loss.cpu().double(), truth.loss, rtol=1e-5, atol=0)
    for ours, true in zip(grads, true_grads, strict=True):
        torch.testing.assert_close(ours.cpu().double(), true, rtol=1e-4, atol=1e-7)
