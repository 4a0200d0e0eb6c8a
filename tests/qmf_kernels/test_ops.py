"""The operators: torch.library.opcheck, and their contracts on tensors of every kind."""

import os

import pytest
import torch

from qmf_kernels import FORMS, PAIRS, ops
from qmf_kernels.fusion import WeightRule

NUM, BATCH, CLASSES = 3, 4, 5
MAKERS = [torch.tensor([-0.1, -0.5, -1.0]), torch.tensor([0.0, 1.0, 0.5])]
HOT = torch.tensor([1.0, 2.0, 0.5])
MASK = torch.tensor([[True, True, False, True], [True, False, False, True], [False, True, False, True]])
LOSS_RULE = (None, 0.0, -100, 0.1, "paper", "adjacent")
SMOOTH_RULE = (torch.tensor([1.0, 0.5, 0.0, 2.0, 1.0]), 0.1, -100, 0.5, "margin", "all")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def logits(dtype=torch.float32):
    dtypes = [torch.float16, torch.bfloat16, torch.float32] if dtype is None else [dtype] * NUM
    return [randn(BATCH, CLASSES, seed=m, dtype=d) for m, d in enumerate(dtypes)]


def rules(dtype=torch.float32):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    given = randn(NUM, BATCH, seed=9, dtype=wide).abs()
    return [
        WeightRule(None, *MAKERS, None),
        WeightRule(None, *MAKERS, HOT, nonnegative=True),
        WeightRule(None, *MAKERS, HOT, normalize=True),
        WeightRule(given, *MAKERS, None, normalize=True),
        WeightRule(None, *MAKERS, None, uncertainty="msp"),
        WeightRule(None, *MAKERS, HOT, normalize=True, uncertainty="entropy"),
        WeightRule(None, *MAKERS, HOT, nonnegative=True, uncertainty="evidence"),
        WeightRule(None, *MAKERS, HOT, combine="probabilities", normalize_logits=0.1),
        WeightRule(None, *MAKERS, None, torch.tensor([0.5, torch.nan, 0.25]), combine="mixture", odds=0.3),
        WeightRule(None, *MAKERS, None, combine="product", normalize_logits=0.5, odds=0.3),
    ]


DTYPES = [torch.float32, torch.float64, torch.bfloat16, None]


# opcheck's comparison of outputs under AOTDispatcher takes no NaN for equal, and an absent modality's loss is one;
# tests of torch.compile compare those.
WITH_NAN = ("test_schema", "test_autograd_registration", "test_faketensor")
RULES = pytest.mark.parametrize(
    ("rule", "dtype"), [(i, dtype) for i, dtype in enumerate([*DTYPES, *DTYPES, *DTYPES[:2]])]
)
PRESENT = pytest.mark.parametrize("present", [None, MASK], ids=["all", "masked"])


INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
NEEDS_TRITON = pytest.mark.skipif(not INTERPRETED, reason="needs Triton's interpreter, TRITON_INTERPRET=1")
BACKENDS = pytest.mark.parametrize("backend", [None, pytest.param("triton", marks=NEEDS_TRITON)])


@RULES
@PRESENT
@BACKENDS
def test_opcheck_fuse(rule, dtype, present, backend):
    rule = rules(dtype)[rule]
    torch.library.opcheck(ops.fuse.default, (logits(dtype), present, *rule, backend))
    fused, weights, energy = ops.fuse(logits(dtype), present, *rule, backend)
    grads = [torch.ones_like(x) for x in (fused, weights, energy)]
    for makers in (False, True):
        inputs = (*grads, energy, logits(dtype), present, *rule, present is None, makers, backend)
        torch.library.opcheck(ops.fuse_backward.default, inputs)


# In the interpreter, where each takes seconds, every rule with one mask and one loss's options.
OBJECTIVES = [
    pytest.param(i, dtype, masked, smooth, backend, marks=marks)
    for i, dtype in enumerate([*DTYPES, *DTYPES, *DTYPES[:2]])
    for masked in (False, True)
    for smooth in (False, True)
    for backend, marks in ((None, ()), ("triton", NEEDS_TRITON))
    if backend is None or (masked, smooth) == (i % 2 == 0, i % 3 == 0)
]


@pytest.mark.parametrize(("rule", "dtype", "masked", "smooth", "backend"), OBJECTIVES)
def test_opcheck_objective(rule, dtype, masked, smooth, backend):
    present, loss_rule = MASK if masked else None, SMOOTH_RULE if smooth else LOSS_RULE
    kappa = randn(NUM, BATCH, seed=5).abs()
    inputs = (logits(dtype), torch.tensor([0, 1, 2, 4]), kappa, present, *rules(dtype)[rule], *loss_rule)
    tests = WITH_NAN if present is not None else (*WITH_NAN, "test_aot_dispatch_dynamic")
    for flags in ((False, True, False, True), (True, True, True, False), (False, False, False, True)):
        torch.library.opcheck(ops.objective.default, (*inputs, *flags, backend), test_utils=tests)
    out = ops.objective(*inputs, False, False, False, True, backend)
    grads, kept = [torch.ones_like(x) for x in out[:7]], out[10]
    for given in (grads, [None, *grads[1:3], None, None, None, grads[6]]):
        rest = (*inputs, False, True, [], [], kept, backend)
        torch.library.opcheck(ops.objective_backward.default, (*given, *rest))
    d_logits, d_makers, kept = ops.objective(*inputs, False, True, True, True, backend)[8:]
    rest = (*inputs, False, True, d_logits, d_makers, kept, backend)
    torch.library.opcheck(ops.objective_backward.default, (grads[0], *[None] * 6, *rest))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_opcheck_ranking(form, pairs, dtype):
    kappa = randn(NUM, 6, seed=2, dtype=dtype)
    kappa[1, 2] = torch.nan
    torch.library.opcheck(ops.ranking.default, (randn(NUM, 6, dtype=dtype), kappa, form, pairs))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("rule", [{}, {"uncertainty": "entropy"}, {"combine": "mixture", "normalize_logits": 0.1}])
@BACKENDS
def test_outputs_share_no_storage_with_inputs_or_each_other(dtype, rule, backend):
    """As PyTorch asks of operators whose schema declares no alias."""
    given = logits(dtype)
    before = [x.clone() for x in given]
    out = ops.objective(
        *(given, torch.arange(BATCH), None, None, *WeightRule(None, *MAKERS, None, **rule), *LOSS_RULE),
        *(False, True, True, True, backend),
    )
    flat = [*out[:8], *out[8], *out[9], *out[10]]
    places = [x.untyped_storage().data_ptr() for x in (*flat, *given) if x.numel()]
    assert len(set(places)) == len(places)
    assert all(torch.equal(x, y) for x, y in zip(given, before, strict=True))


@BACKENDS
def test_gradients_are_those_of_autograd(backend):
    """The fused forward's gradients, against differentiating the operators' own definition in float64."""
    leaves = [x.double().requires_grad_() for x in logits()]
    alpha, beta = (x.double() for x in MAKERS)
    target = torch.tensor([0, 1, 2, 4])
    *_, d_logits, d_makers, _ = ops.objective(
        [x.detach() for x in leaves],
        *(target, None, None, *WeightRule(None, alpha, beta, HOT.double()), *LOSS_RULE),
        *(False, True, True, True, backend),
    )
    makers = [x.clone().requires_grad_() for x in (alpha, beta, HOT.double())]
    a, b, t = makers
    energy = torch.stack([-t[m] * torch.logsumexp(x / t[m], -1) for m, x in enumerate(leaves)])
    weights = a[:, None] * energy + b[:, None]
    fused = sum(w[:, None] * x for w, x in zip(weights, leaves, strict=True))
    total = sum(torch.nn.functional.cross_entropy(x, target) for x in (*leaves, fused))
    expected = torch.autograd.grad(total, [*leaves, *makers])
    for x, y in zip([*d_logits, *d_makers[1:]], expected, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-10, atol=1e-12)


def test_meta_tensors_say_the_shapes():
    given = [x.to("meta") for x in logits()]
    rule = WeightRule(None, *(x.to("meta") for x in MAKERS), None)
    fused, weights, energy = ops.fuse(given, None, *rule, None)
    assert (fused.shape, weights.shape, energy.shape) == ((BATCH, CLASSES), (NUM, BATCH), (NUM, BATCH))
    assert fused.device.type == "meta"
