"""A compiled training step equals the eager one: losses, gradients of any output, and the history."""

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion


def train(criterion, step, read):
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(6, 4, generator=generator).requires_grad_() for _ in range(2)]
    target, index = torch.arange(6) % 4, torch.tensor([0, 3, 3, 8, 1, 5])
    for _ in range(3):
        read(step(logits, target, index)).backward()
        with torch.no_grad():
            for x in logits:
                x -= x.grad
                x.grad = None
    return *logits, *criterion.state_dict().values()


@pytest.mark.parametrize(
    "read",
    [
        lambda out: out.loss,
        lambda out: 3 * out.loss,
        lambda out: out.loss + out.weights.square().sum(),
        lambda out: out.logits.square().sum() + out.energy.sum(),
    ],
    ids=["loss", "scaled loss", "loss and weights", "logits and energies"],
)
def test_compiled_step_equals_eager(read):
    torch.compiler.reset()
    ours = [QMFLoss(QualityAwareFusion(2), 9) for _ in range(2)]
    eager = train(ours[0], ours[0], read)
    compiled = train(ours[1], torch.compile(ours[1], fullgraph=True, backend="aot_eager"), read)
    torch.testing.assert_close(compiled, eager)


def test_backward_takes_the_gradients_of_the_loss_as_they_are(monkeypatch):
    from qmf_kernels.eager import objective

    def recompute(*_):
        raise AssertionError("the backward of the loss alone recomputed the forward")

    monkeypatch.setattr(objective, "objective_backward", recompute)
    torch.compiler.reset()
    criterion = QMFLoss(QualityAwareFusion(2), 9)
    train(criterion, criterion, lambda out: out.loss)
    train(criterion, torch.compile(criterion, fullgraph=True, backend="aot_eager"), lambda out: out.loss)
