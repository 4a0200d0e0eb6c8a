"""The operators on a GPU: the same numbers as float64 on the CPU, and no step that waits for the device."""

import pytest
import torch

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.adaptation import TestTimeAdaptation

from . import gpu

pytestmark = gpu.needs_gpu


def batch(dtype: torch.dtype, device: str, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = [torch.randn(32, 10, generator=generator, dtype=torch.float64).to(device, dtype) for _ in range(3)]
    target = torch.randint(10, (32,), generator=generator).to(device)
    return logits, target, torch.randperm(100, generator=generator)[:32].to(device)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_training_steps_match_the_cpu(dtype: torch.dtype, pairs: str) -> None:
    losses, grads = {}, {}
    for device, precision in (("cpu", torch.float64), ("cuda", dtype)):
        criterion = QMFLoss(QualityAwareFusion(3).to(device), 100, pairs=pairs).to(device)
        for step in range(3):
            logits, target, index = batch(precision, device, seed=step % 2)
            rows = [x.requires_grad_() for x in logits]
            out = criterion(rows, target, index)
            out.loss.backward()
        losses[device], grads[device] = out.loss, torch.stack([x.grad for x in rows])
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(losses["cuda"].cpu().double(), losses["cpu"].double(), atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(grads["cuda"].cpu().double(), grads["cpu"], atol=tolerance, rtol=tolerance)


def test_no_step_waits_for_the_device() -> None:
    model = FusionModel({"a": torch.nn.Linear(8, 5), "b": torch.nn.Linear(8, 5)}).cuda()
    criterion = QMFLoss(model.fusion, 100, pairs="all").cuda()
    x, target, index = torch.randn(16, 8).cuda(), torch.randint(5, (16,)).cuda(), torch.arange(16).cuda()
    present = torch.rand(2, 16).cuda() > 0.2
    for inputs, mask in (({"a": x, "b": x}, None), ({"a": x, "b": x}, present), ({"a": x, "b": None}, None)):
        criterion(model(inputs, mask).unimodal_logits, target, index).loss.backward()
        with gpu.no_waiting():
            criterion(model(inputs, mask).unimodal_logits, target, index).loss.backward()


def test_no_adaptation_waits_for_the_device() -> None:
    x = torch.randn(2, 16, 5, generator=torch.Generator().manual_seed(0))
    for make in (lambda: QualityAwareFusion(2), lambda: QualityAwareFusion.robust(2, 5, odds=[0.3, 1.0])):
        adaptation, same = TestTimeAdaptation(make().cuda()), TestTimeAdaptation(make())
        adaptation.step(x.cuda())
        there = x.cuda()
        with gpu.no_waiting():
            adaptation.step(there)
        same.step(x)
        same.step(x)
        torch.testing.assert_close(adaptation.log_factors.cpu(), same.log_factors, atol=1e-5, rtol=1e-4)
