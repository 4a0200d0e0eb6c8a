"""Above a size, heads' logits are not copied into one tensor: the same numbers, and those of the equations."""

from typing import Any

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_kernels.eager import fusion

from .test_masked_path import step

OPTIONS = [{}, {"normalize": True}, {"nonnegative": True, "temperature": 2.0}, {"learnable": True, "temperature": 0.5}]


@pytest.mark.parametrize("loss_options", [{}, {"pairs": "all"}, {"label_smoothing": 0.1, "weight": torch.rand(4) + 1}])
@pytest.mark.parametrize("options", OPTIONS)
def test_same_numbers(options: dict[str, Any], loss_options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = step(options, loss_options, (6, 4))
    monkeypatch.setattr(fusion, "_STACK_BELOW", 0)
    for value, wanted in zip(step(options, loss_options, (6, 4)), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12, equal_nan=True)


def masked_step(options: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    """With absent and broken rows, a class that is ruled out, and targets that do not count."""
    generator = torch.Generator().manual_seed(2)
    layer = QualityAwareFusion(3, **options)
    criterion = QMFLoss(layer, 20)
    rows = [torch.randn(8, 4, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    present = torch.rand(3, 8, generator=generator) < 0.7
    present[:, 0] = False
    broken = [
        row + torch.tensor([0, 0, 0, torch.nan if m == 1 else 0.0]) * torch.ones(8, 1) for m, row in enumerate(rows)
    ]
    broken[1] = torch.where(torch.arange(8).view(-1, 1) < 3, broken[1], rows[1])
    broken[2] = torch.where(torch.eye(8, 4, dtype=torch.bool), -torch.inf, broken[2])
    target = torch.tensor([3, 3, 3, 1, -100, 2, 0, 1])
    out = criterion(broken, target, torch.arange(8), present)
    fused = layer(broken, present=present)
    (out.loss + fused.weights.sum() + fused.logits.nan_to_num(neginf=0).square().sum()).backward()
    return (*out, *fused[:3], *(row.grad.nan_to_num(nan=123.0) for row in rows))


@pytest.mark.parametrize("options", OPTIONS)
def test_same_numbers_where_rows_do_not_count(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    expected = masked_step(options)
    monkeypatch.setattr(fusion, "_STACK_BELOW", 0)
    for value, wanted in zip(masked_step(options), expected, strict=True):
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12, equal_nan=True)


def test_a_batch_that_is_large_is_the_equations() -> None:
    rows = [torch.randn(5000, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    out = QualityAwareFusion(3)(rows)
    weights = torch.stack([0.1 * torch.logsumexp(x, -1) for x in rows])
    fused = sum(w.unsqueeze(-1) * x for w, x in zip(weights, rows, strict=True))
    torch.testing.assert_close(out.weights, weights)
    torch.testing.assert_close(out.logits, fused)
    ours = torch.autograd.grad(out.logits.square().sum(), rows)
    for grad, wanted in zip(ours, torch.autograd.grad(fused.square().sum(), rows), strict=True):
        torch.testing.assert_close(grad, wanted)
