"""The operators: torch.library.opcheck, and their contracts on tensors of every kind."""

import os

import pytest
import torch

from qmf_kernels import FORMS, PAIRS, LossRule, WeightRule, objective, ops
from qmf_kernels.rules import FuseOptions, ObjectiveOptions, flatten

NUM, BATCH, CLASSES = 3, 4, 5
AFFINE = [torch.tensor([-0.1, -0.5, -1.0]), torch.tensor([0.0, 1.0, 0.5])]
HOT = torch.tensor([1.0, 2.0, 0.5])
MASK = torch.tensor([[True, True, False, True], [True, False, False, True], [False, True, False, True]])
LOSS_RULE = LossRule()
SMOOTH_RULE = LossRule(torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]), 0.1, -100, 0.5, "margin", "all")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def logits(dtype=torch.float32):
    dtypes = [torch.float16, torch.bfloat16, torch.float32] if dtype is None else [dtype] * NUM
    return [randn(BATCH, CLASSES, seed=m, dtype=d) for m, d in enumerate(dtypes)]


def rules(dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = randn(NUM, BATCH, seed=9, dtype=wide).abs()
    fused = randn(BATCH, CLASSES, seed=8, dtype=wide)
    return [
        WeightRule(None, *AFFINE, None),
        WeightRule(None, *AFFINE, HOT, nonnegative=True),
        WeightRule(None, *AFFINE, HOT, normalize=True, detach=True),
        WeightRule(given, *AFFINE, None, normalize=True),
        WeightRule(given, *AFFINE, HOT, fused=fused),
    ]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, None]


# opcheck's comparison of outputs under AOTDispatcher takes no NaN for equal, and an absent modality's loss is one;
# tests of torch.compile compare those.
WITH_NAN = ("test_schema", "test_autograd_registration", "test_faketensor")


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, TRITON_INTERPRET=1")
BACKENDS = pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=NEEDS_TRITON)])


# In the interpreter, where each takes seconds, every rule with one mask and one loss's options; the others are slow.
FUSIONS = [
    pytest.param(i, dtype, masked, backend, marks=marks)
    for i in range(5)
    for dtype in DTYPES[i % 2 :: 2]
    for masked in (False, True)
    for backend, marks in ((None, ()), ("triton", (NEEDS_TRITON, *[pytest.mark.slow] * (masked != (i % 2 == 0)))))
]


@pytest.mark.parametrize(("rule", "dtype", "masked", "backend"), FUSIONS)
def test_opcheck_fuse(rule, dtype, masked, backend):
    present = MASK if masked else None
    options = flatten(FuseOptions(present, rules(dtype)[rule], backend))
    torch.library.opcheck(ops.fuse.default, (logits(dtype), *options))
    fused, weights, energy = ops.fuse(logits(dtype), *options)
    grads = [torch.ones_like(x) for x in (fused, weights, energy)]
    for rule_gradients in (False, True):
        inputs = (*grads, energy, logits(dtype), *options, rule_gradients)
        torch.library.opcheck(ops.fuse_backward.default, inputs)


OBJECTIVES = [
    pytest.param(i, dtype, masked, smooth, backend, marks=marks)
    for i in range(5)
    for dtype in DTYPES[i % 2 :: 2]
    for masked in (False, True)
    for smooth in (False, True)
    for backend, marks in ((None, ()), ("triton", NEEDS_TRITON))
    if backend is None or (masked, smooth) == (i % 2 == 0, i % 3 == 0)
]


@pytest.mark.parametrize(("rule", "dtype", "masked", "smooth", "backend"), OBJECTIVES)
def test_opcheck_objective(rule, dtype, masked, smooth, backend):
    present, loss_rule = MASK if masked else None, SMOOTH_RULE if smooth else LOSS_RULE
    target, kappa = torch.tensor([0, 1, 2, 4]), randn(NUM, BATCH, seed=5).abs()
    tests = WITH_NAN if present is not None else (*WITH_NAN, "test_aot_dispatch_dynamic")
    given = ObjectiveOptions(target, kappa, present, rules(dtype)[rule], loss_rule, True, backend)
    lean = flatten(given._replace(return_logits=False))
    options = flatten(given)
    for inputs in ((*options, False, True), (*lean, True, True), (*options, False, False)):
        torch.library.opcheck(ops.objective.default, (logits(dtype), *inputs), test_utils=tests)
    out = ops.objective(logits(dtype), *options, False, False)
    grads, kept = [torch.ones_like(x) for x in out[:7]], out[10]
    for some in (grads, [None, *grads[1:3], None, None, None, grads[6]]):
        inputs = (*some, logits(dtype), *options, True, [], [], kept)
        torch.library.opcheck(ops.objective_backward.default, inputs)
    d_logits, d_rule, kept = ops.objective(logits(dtype), *options, True, True)[8:]
    inputs = (grads[0], *[None] * 6, logits(dtype), *options, True, d_logits, d_rule, kept)
    torch.library.opcheck(ops.objective_backward.default, inputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_ranking(form, pairs, dtype):
    kappa = randn(NUM, 6, seed=2, dtype=dtype)
    kappa[1, 2] = torch.nan
    torch.library.opcheck(ops.ranking.default, (randn(NUM, 6, dtype=dtype), kappa, form, pairs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [0, 3, 4])
@BACKENDS
def test_outputs_share_no_storage_with_inputs_or_each_other(dtype, rule, backend):
    """As PyTorch asks of operators whose schema declares no alias."""
    given, rule = logits(dtype), rules(dtype)[rule]
    before = [x.clone() for x in given]
    options = ObjectiveOptions(torch.arange(BATCH), None, None, rule, LOSS_RULE, True, backend)
    out = ops.objective(given, *flatten(options), True, True)
    flat = [*out[:8], *out[8], *out[9], *out[10]]
    inputs = [x for x in flatten(options) if isinstance(x, torch.Tensor)]
    places = [x.untyped_storage().data_ptr() for x in (*flat, *given, *inputs) if x.numel()]
    assert len(set(places)) == len(places)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@pytest.mark.parametrize("ready", ["", "u", "f", "uf"])
@BACKENDS
def test_gradients_are_those_of_autograd(ready, backend):
    """Of every output and with respect to every tensor, against Eq. 9 to 18 written out in float64."""
    leaves = [x.double().requires_grad_() for x in logits()]
    alpha, beta, temperature = (x.double().requires_grad_() for x in (*AFFINE, HOT))
    u = randn(NUM, BATCH, seed=9).double().requires_grad_() if "u" in ready else None
    fused = randn(BATCH, CLASSES, seed=8).double().requires_grad_() if "f" in ready else None
    target, kappa = torch.tensor([0, 1, 2, 4]), randn(NUM, BATCH, seed=5).double().abs()
    given = [x for x in (*leaves, alpha, beta, temperature, u, fused) if x is not None]

    rule = WeightRule(u, alpha, beta, temperature, fused)
    out = objective(leaves, target, kappa, None, rule, LossRule(ranking_weight=0.3), backend=backend)
    energy = torch.stack([-t * torch.logsumexp(x / t, -1) for t, x in zip(temperature, leaves, strict=True)])
    weights = alpha[:, None] * (energy if u is None else u) + beta[:, None]
    row = sum(w[:, None] * x for w, x in zip(weights, leaves, strict=True)) if fused is None else fused
    losses = [torch.nn.functional.cross_entropy(x, target) for x in (*leaves, row)]
    gap, other = ((x.roll(-1, 1) - x) for x in (weights, kappa))
    ranking = (gap.sign() * (gap + other)).relu().mean(1).sum()  # form "paper", pairs (i, i + 1)
    expected = {"loss": sum(losses) + 0.3 * ranking, "weights": weights, "energy": energy, "logits": row}
    for name in ("loss", "fused_loss", "weights", "energy", "logits", "ranking_loss"):
        value = {**expected, "fused_loss": losses[-1], "ranking_loss": ranking}[name]
        torch.testing.assert_close(getattr(out, name), value)
        pair = [
            torch.autograd.grad(x.sin().sum(), given, retain_graph=True, allow_unused=True, materialize_grads=True)
            for x in (getattr(out, name), value)
        ]
        for x, y in zip(*pair, strict=True):
            torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_meta_tensors_say_the_shapes():
    given = [x.to("meta") for x in logits()]
    rule = WeightRule(None, *(x.to("meta") for x in AFFINE), None)
    fused, weights, energy = ops.fuse(given, *flatten(FuseOptions(None, rule, None)))
    assert (fused.shape, weights.shape, energy.shape) == ((BATCH, CLASSES), (NUM, BATCH), (NUM, BATCH))
    assert fused.device.type == "meta"
