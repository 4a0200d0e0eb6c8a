"""Rules other than a weighted sum of logits, inside the operators: against autograd through their formulas."""

import math
import os
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from qmf_fusion.mixture import ContaminatedProduct
from qmf_kernels import ops
from qmf_kernels.fused import tiling
from qmf_kernels.fusion import WeightRule

needs_interpreter = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1", reason="needs Triton's interpreter, TRITON_INTERPRET=1"
)
BACKENDS = pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=needs_interpreter)])
NUM, ROWS = 3, 6
STATIC = torch.tensor([torch.nan, 0.4, torch.nan], dtype=torch.float64)
RULES: dict[str, dict[str, Any]] = {
    "probabilities": {"combine": "probabilities"},
    "probabilities of a share": {"combine": "probabilities", "normalize": True, "uncertainty": "entropy"},
    "probabilities, tempered": {"combine": "probabilities", "temperature": [0.5, 1.0, 3.0]},
    "mixture": {"combine": "mixture", "odds": 0.3},
    "mixture with a static weight": {"combine": "mixture", "odds": 0.3, "static": STATIC},
    "product": {"combine": "product", "odds": 0.3, "static": STATIC},
    "LogitNorm": {"normalize_logits": 0.2},
    "LogitNorm, tempered": {"normalize_logits": 0.2, "temperature": [0.5, 1.0, 3.0], "uncertainty": "evidence"},
    "LogitNorm and probabilities": {"normalize_logits": 0.1, "combine": "probabilities"},
    "LogitNorm and mixture": {"normalize_logits": 0.5, "combine": "mixture", "odds": 0.05},
    "LogitNorm and product": {"normalize_logits": 0.5, "combine": "product", "odds": 2.0},
}
WALKED = {"_ROW": 0, "_WALK": 32}  # what tiles are cut from: rows in steps of 32 classes
NAMES = pytest.mark.parametrize("name", RULES)
LOSS_RULE = (None, 0.1, -100, 0.3, "margin", "all")


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_rule(name: str) -> WeightRule:
    options = dict(RULES[name])
    bounded = options.get("uncertainty", "energy") != "energy"
    alpha, beta = ([-1.0, -0.5, -2.0], [1.5, 1.0, 2.5]) if bounded else ([-0.1, -0.5, -1.0], [0.0, 1.0, 0.5])
    temperature = options.pop("temperature", None)
    makers = (torch.tensor(x, dtype=torch.float64) for x in (alpha, beta))
    return WeightRule(
        None, *makers, None if temperature is None else torch.tensor(temperature, dtype=torch.float64), **options
    )


def written_out(rule: WeightRule, leaves: list[Tensor], makers: list[Tensor]) -> tuple[list[Tensor], ...]:
    """Logits as they are seen; fused logits, weights and energies."""
    t = rule.normalize_logits
    seen = leaves if t is None else [x / (t * x.norm(dim=-1, keepdim=True)) for x in leaves]
    if rule.combine in ("mixture", "product"):
        # With an onset this late, and nothing untypical, the odds are what they are given as.
        product = ContaminatedProduct(NUM, agreement=rule.combine == "mixture", odds=rule.odds, onset=60.0)
        x = torch.stack(seen)
        fused, weights = product(x, torch.ones_like(x[..., 0], dtype=torch.bool), rule.static)
        return seen, [fused, weights, -torch.logsumexp(x, -1)]
    alpha, beta = makers[:2]
    temperature = makers[2] if len(makers) == 3 else torch.ones(NUM)
    weights, energy = [], []
    for m, x in enumerate(seen):
        z = x / temperature[m]
        energy.append(-temperature[m] * torch.logsumexp(z, -1))
        p = z.softmax(-1)
        if rule.uncertainty == "energy":
            u = energy[m]
        elif rule.uncertainty == "entropy":
            u = -(p * p.log()).sum(-1) / (math.log(x.shape[-1]) or 1)
        else:
            u = x.shape[-1] / (torch.nn.functional.softplus(z, threshold=60) + 1).sum(-1)
        weights.append(alpha[m] * u + beta[m])
    w = torch.stack(weights)
    w = w.clamp_min(0) if rule.clamped else w
    w = w / w.sum(0) if rule.normalize else w
    if rule.combine == "logits":
        fused = sum(v.unsqueeze(-1) * x for v, x in zip(w, seen, strict=True))
    else:
        share = w.clamp_min(1e-12) / w.clamp_min(1e-12).sum(0)
        fused = sum(v.unsqueeze(-1) * x.softmax(-1) for v, x in zip(share, seen, strict=True)).log()
    return seen, [fused, w, torch.stack(energy)]


def leaves_of(rule: WeightRule, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    makers = [] if rule.combine in ("mixture", "product") else [v for v in rule[1:4] if v is not None]
    return [y.clone().requires_grad_() for y in x], [y.clone().requires_grad_() for y in makers]


def tiled(classes: int, many: bool = False) -> Any:
    """Rows of 40 classes in two steps; a batch that is too large for one program."""
    return mock.patch.multiple(tiling, **WALKED if classes == 40 else {}, _BATCH=0 if many else tiling._BATCH)


def differentiate(outputs: list[Tensor], leaves: list[Tensor], grads: list[Tensor]) -> list[Tensor]:
    """Of constants none."""
    pairs = [(y, grad) for y, grad in zip(outputs, grads, strict=True) if y.requires_grad]
    outputs, grads = ([pair[i] for pair in pairs] for i in (0, 1))
    return list(
        torch.autograd.grad(outputs, leaves, grads, retain_graph=True, allow_unused=True, materialize_grads=True)
    )


@BACKENDS
@NAMES
@pytest.mark.parametrize("classes", [7, 40])
def test_fusion_is_that_of_autograd(name: str, classes: int, backend: str) -> None:
    x, rule = [2 * randn(ROWS, classes, seed=m) for m in range(NUM)], make_rule(name)
    leaves, makers = leaves_of(rule, x)
    _, expected = written_out(rule, leaves, makers)
    grads = [randn(*out.shape, seed=7 + i) for i, out in enumerate(expected)]
    wanted = differentiate(expected, [*leaves, *makers], grads)
    with tiled(classes):
        out = ops.fuse(x, None, *rule, backend)
        d_x, d_makers = ops.fuse_backward(*grads, out[2], x, None, *rule, False, True, backend)
    for ours, theirs in zip(out, expected, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)
    for ours, theirs in zip([*d_x, *d_makers[1 : 1 + len(makers)]], wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


@BACKENDS
@NAMES
@pytest.mark.parametrize(("classes", "many"), [(1, False), (7, True), (40, False)])
def test_objective_is_that_of_autograd(name: str, classes: int, many: bool, backend: str) -> None:
    """With a ranking, whose gradient reaches the weights."""
    x, rule = [2 * randn(ROWS, classes, seed=m) for m in range(NUM)], make_rule(name)
    target, kappa = torch.arange(ROWS) % classes, randn(NUM, ROWS, seed=5).abs()
    leaves, makers = leaves_of(rule, x)
    seen, expected = written_out(rule, leaves, makers)
    cross_entropy = [torch.nn.functional.cross_entropy(y, target, label_smoothing=0.1) for y in (*seen, expected[0])]
    ranking, slope = ops.ranking(expected[1].detach(), kappa, *LOSS_RULE[4:])
    loss = sum(cross_entropy) + 0.3 * (slope * expected[1]).sum()
    wanted = differentiate([loss], [*leaves, *makers], [torch.ones_like(loss)])

    inputs = (x, target, kappa, None, *rule, *LOSS_RULE)
    with tiled(classes, many):
        *out, d_x, d_makers, kept = ops.objective(*inputs, False, True, bool(makers), True, backend)
        torch.testing.assert_close(out[0], sum(cross_entropy).detach() + 0.3 * ranking)
        for ours, theirs in zip(out[4:7], expected, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), rtol=1e-10, atol=1e-10)
        found = [*d_x, *d_makers[1 : 1 + len(makers)]]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)

        of_others = [None, None, None, None, *(randn(*y.shape, seed=3) for y in expected)]
        wanted = differentiate(expected, [*leaves, *makers], of_others[4:])
        d_x, d_makers = ops.objective_backward(*of_others, *inputs, False, bool(makers), [], [], kept, backend)
        found = [*d_x, *d_makers[1 : 1 + len(makers)]]
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-10)


@BACKENDS
@NAMES
@pytest.mark.parametrize("detach", [False, True])
def test_rows_that_are_not_finite_leave_the_others_as_they_were(name: str, detach: bool, backend: str) -> None:
    """One -inf suffices where rows are taken as a whole. Several samples have no modality at all."""
    x, rule, target = [randn(ROWS, 4, seed=m) for m in range(NUM)], make_rule(name), torch.arange(ROWS) % 4
    present = torch.ones(NUM, ROWS, dtype=torch.bool)
    present[0, :2] = present[1, 2] = present[:, 3] = present[2, 4] = False
    kappa = randn(NUM, ROWS, seed=5).abs()
    broken = [y.clone() for y in x]
    broken[0][0, 1], broken[0][1, 2], broken[1][2, 0], broken[2][4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    broken[0][3], broken[1][3, 0], broken[2][3, 1] = torch.nan, torch.inf, -torch.inf
    results = []
    for rows, mask in ((x, present), (broken, None)):
        inputs = (rows, target, kappa, mask, *rule, *LOSS_RULE)
        *out, d_x, _, _ = ops.objective(*inputs, detach, True, False, True, backend)
        fused = ops.fuse(rows, mask, *rule, backend)
        grads = [torch.ones_like(y) for y in fused]
        d_fused, _ = ops.fuse_backward(*grads, fused[2], rows, mask, *rule, detach, False, backend)
        results.append([*out, *d_x, *fused, *d_fused])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert all(torch.isfinite(y).all() for y in (*results[0][8:11], results[0][4]))
    assert (results[0][4][3] == 0).all()
    assert not any(y[3].any() for y in results[0][8:11])


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [1.0, 1e-40, 1e30, 3e38])
def test_logit_norm_of_any_size(dtype: torch.dtype, size: float, backend: str) -> None:
    """Rows whose squares are out of range are as good as others; a row of zeros stays one."""
    x = randn(4, 6, seed=0)
    x = x / x.abs().amax(-1, keepdim=True)
    x[2] = 0
    rule = make_rule("LogitNorm")._replace(normalize_logits=0.1)
    rule = rule._replace(alpha=rule.alpha[:1], beta=rule.beta[:1])
    found = []
    for scale in (1.0, size):
        rows = [(scale * x).to(dtype)]
        fused, weights, energy = ops.fuse(rows, None, *rule, backend)
        grads = [torch.ones_like(fused), torch.zeros_like(weights), torch.zeros_like(energy)]
        (d_x,), _ = ops.fuse_backward(*grads, energy, rows, None, *rule, True, False, backend)
        found.append((fused, weights, energy, d_x.double() * scale))
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-11}
    whole = [0, 1, 3]
    if size == 1e-40:  # whose gradient float32 can't hold, nor all of its digits
        tolerance = {"rtol": 1e-3, "atol": 1e-3}
        found = [x[:3] for x in found]
    for one, other in zip(*found, strict=True):
        rows = ... if one.shape[0] == 1 else whole
        torch.testing.assert_close(one[rows].double(), other[rows].double(), **tolerance)
    assert torch.isfinite(found[0][0]).all()


@BACKENDS
def test_modalities_alone_have_one_weight_in_a_mixture(backend: str) -> None:
    x, rule = [3 * randn(30, 5, seed=m).float() for m in range(NUM)], make_rule("mixture")
    present = torch.zeros(NUM, 30, dtype=torch.bool)
    present[torch.arange(30) % NUM, torch.arange(30)] = True
    _, weights, _ = ops.fuse(x, present, *rule, backend)
    assert torch.equal(weights[present].unique(), torch.tensor([1 / (1 + 0.3)]))


def test_an_unknown_combination_is_named() -> None:
    x = [randn(2, 3, seed=0)]
    rule = WeightRule(None, -torch.ones(1), torch.ones(1), None, combine="probability")
    with pytest.raises(ValueError, match=r"combine must be one of .*'product'.*got 'probability'"):
        ops.fuse(x, None, *rule, "torch")
    rule = rule._replace(combine="mixture", nonnegative=True)
    with pytest.raises(ValueError, match=r"combine='mixture' makes its weights itself"):
        ops.fuse(x, None, *rule, "torch")
