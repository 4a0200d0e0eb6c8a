"""On a device, nobody may ask whether every row counts, so every mask is there. Here the CPU is made to act alike."""

from typing import Any

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_kernels.eager import fusion


def step(options: dict[str, Any], loss_options: dict[str, Any], shape: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(1)
    layer = QualityAwareFusion(3, **options)
    criterion = QMFLoss(layer, 20, **loss_options)
    rows = [torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_() for _ in range(3)]
    target = torch.randint(shape[-1], shape[:-1], generator=generator)
    index = torch.arange(shape[0])
    criterion(rows, target, index)
    out = criterion(rows, target, index)
    (out.loss + out.fused_loss * 0.5 + out.logits.sum() * 0.1 + out.energy.mean()).backward(retain_graph=True)
    general = [x.grad.clone() for x in rows]
    for x in rows:
        x.grad = None
    out.loss.backward()
    alone = layer(rows)
    return (*out, *general, *(x.grad for x in rows), alone.logits, alone.weights, criterion.ranking.kappa(index))


@pytest.mark.parametrize("shape", [(6, 4), (6, 20), (4, 3, 5)])
@pytest.mark.parametrize("loss_options", [{}, {"pairs": "all", "form": "margin"}, {"label_smoothing": 0.1}])
@pytest.mark.parametrize(
    "options", [{}, {"normalize": True}, {"nonnegative": True, "temperature": 2.0}, {"learnable": True}]
)
def test_same_numbers(
    options: dict[str, Any], loss_options: dict[str, Any], shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = step(options, loss_options, shape)
    monkeypatch.setattr(fusion, "all_finite", lambda _: False)
    for value, wanted in zip(step(options, loss_options, shape), expected, strict=True):
        torch.testing.assert_close(value, wanted, atol=1e-12, rtol=1e-12, equal_nan=True)
