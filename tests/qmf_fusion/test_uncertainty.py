"""Every named uncertainty inside the layer and the loss: numbers and slopes, and rows that do not count."""

import math

import numpy as np
import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.evidential import evidential
from qmf_fusion.uncertainty import UNCERTAINTIES, evidence_uncertainty

NUM, ROWS = 3, 5
NAMES = pytest.mark.parametrize("name", list(UNCERTAINTIES))


def randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Each from its definition: of scaled logits z = x / T, their softmax written out, and T.
DEFINITIONS = {
    "energy": lambda z, p, t: -t * z.exp().sum(-1).log(),
    "msp": lambda z, p, t: 1 - p.max(-1).values,
    "entropy": lambda z, p, t: -(p * p.log()).sum(-1) / math.log(z.shape[-1]),
    "evidence": lambda z, p, t: z.shape[-1] / ((1 + z.exp()).log() + 1).sum(-1),
}


@pytest.mark.parametrize("name", DEFINITIONS)
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_and_their_gradients_are_eq_9s(name: str, temperature: float, normalize: bool) -> None:
    x = [randn(ROWS, 7, seed=m).requires_grad_() for m in range(NUM)]
    fusion = QualityAwareFusion(
        NUM, uncertainty=name, alpha=[-1.0, -0.5, -2.0], beta=3.0, temperature=temperature, normalize=normalize
    )
    alpha = torch.tensor([-1.0, -0.5, -2.0]).double()
    scaled = [row / temperature for row in x]
    u = torch.stack([DEFINITIONS[name](z, z.exp() / z.exp().sum(-1, keepdim=True), temperature) for z in scaled])
    weights = (alpha.unsqueeze(-1) * u + 3.0).clamp_min(0 if normalize else -math.inf)
    weights = weights / weights.sum(0) if normalize else weights
    fused = (weights.unsqueeze(-1) * torch.stack(x)).sum(0)
    out = fusion(x)
    torch.testing.assert_close(fusion.uncertainties(x), u)
    torch.testing.assert_close((out.weights, out.logits), (weights, fused))
    ours, expected = (
        torch.autograd.grad(w.sin().sum() + f.cos().sum(), x) for w, f in ((out.weights, out.logits), (weights, fused))
    )
    torch.testing.assert_close(ours, expected)


@NAMES
@pytest.mark.parametrize("learnable", [False, True])
def test_rows_that_do_not_count_leave_the_others_as_they_were(name: str, learnable: bool) -> None:
    def step(x: list[torch.Tensor], present: torch.Tensor) -> list[torch.Tensor]:
        fusion = QualityAwareFusion(NUM, uncertainty=name, learnable=learnable, temperature=2.0 if learnable else 1.0)
        leaves = [y.clone().requires_grad_() for y in x]
        out = QMFLoss(fusion, ROWS, 0.0)(leaves, torch.arange(ROWS) % 4, None, present)
        out.loss.backward()
        assert (out.weights[~counted] == 0).all()
        return [*out, *(y.grad for y in leaves), *(p.grad for p in fusion.parameters())]

    x, counted = list(randn(NUM, ROWS, 4, seed=1)), torch.ones(NUM, ROWS, dtype=torch.bool)
    counted[0, 0] = counted[1, 1] = counted[2, 2] = counted[0, 3] = counted[1, 0] = False
    broken, present = [y.clone() for y in x], counted.clone()
    broken[0][0, 1], broken[1][1, 2], broken[2][2] = torch.nan, torch.inf, -torch.inf
    present[0, 0] = present[1, 1] = present[2, 2] = True
    found = step(broken, present)
    for ours, theirs in zip(found, step(x, counted), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all((grad[~c] == 0).all() for grad, c in zip(found[8 : 8 + NUM], counted, strict=True))


def test_equal_largest_logits_share_the_slope_of_the_maximum_probability() -> None:
    x = torch.tensor([[2.0, 2.0, 0.0]], dtype=torch.float64, requires_grad=True)
    QualityAwareFusion(1, uncertainty="msp")([x]).weights.sum().backward()
    assert x.grad[0, 0] == x.grad[0, 1] > 0


def test_the_largest_probability_of_many_keeps_its_digits() -> None:
    """In float32 ``1 - u`` has none left of a largest probability of 1 in 20,000; its slope has."""
    x = randn(1, 20_000, seed=2) / 100
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaf = x.to(dtype).requires_grad_()
        QualityAwareFusion(1, uncertainty="msp")([leaf]).weights.sum().backward()
        grads.append(leaf.grad.double())
    torch.testing.assert_close(*grads, rtol=1e-4, atol=0)


def test_softplus_is_exact_wherever_it_is_nearly_the_identity():
    """Cut off at 20, as PyTorch's is, it would show in float64: log(1 + e^21) is 21 + 7.6e-10."""
    x = torch.linspace(-60, 60, 241, dtype=torch.float64)
    softplus = np.logaddexp(x.numpy(), 0)
    found = (1 / evidence_uncertainty(x.unsqueeze(-1)) - 1).numpy()
    np.testing.assert_allclose(found[x >= 1], softplus[x >= 1], rtol=2e-15)
    np.testing.assert_allclose(evidential(x).numpy(), np.log1p(softplus), rtol=1e-13, atol=1e-15)


def test_evidence_of_what_is_not_finite():
    rows = torch.tensor([-torch.inf, torch.inf, torch.nan])
    torch.testing.assert_close(evidential(rows), torch.tensor([0.0, torch.inf, torch.nan]), equal_nan=True)


@NAMES
def test_gradients_of_huge_logits_are_finite(name):
    """What stands where a probability is 0 has no slope, however large the gradient that comes in."""
    x = torch.tensor([[1e30, -3e29, 2e30], [4e30, 0.0, 1.0]], requires_grad=True)
    measure = QualityAwareFusion(1, uncertainty=name, combine="probabilities").uncertainties
    (grad,) = torch.autograd.grad(measure([x]).sum(), x, torch.tensor(1e30))
    assert torch.isfinite(grad).all()
