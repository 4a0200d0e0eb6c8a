"""The objective's kernels in the interpreter: losses, gradients of every output, one launch for a small batch."""

import contextlib
import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qmf_kernels import fusion, objective
from qmf_kernels.triton_kernels import operators as fused
from qmf_kernels.triton_kernels import tiling

from ...qmf_fusion import reference
from .cases import Case, assert_errors_close, backwards, bounded, cases, lay, poisoned, same

NAMES = objective.Losses._fields
# What the tiles are cut from: as they are; rows walked in steps of 32 classes; few rows and few samples per program.
TILINGS = {
    "as is": {"_ROW": tiling._ROW},
    "walked": {"_ROW": 0, "_WALK": 32},
    "short": {"_ROWS": 16},
}


@contextlib.contextmanager
def tiled(how):
    def sample_block(batch, pairs, alone=False):
        block = tiling.sample_block(batch, pairs, alone)
        return block if alone or how == "as is" else tiling.Block(4, 4, 4)

    with mock.patch.multiple(tiling, **TILINGS[how]), mock.patch.object(fused, "sample_block", sample_block):
        yield


def size(case):
    """The largest finite logit."""
    return max(x.double().nan_to_num(0, 0, 0).abs().max().item() for x in case.logits)


def incoming(case, given, strange, generator):
    """Gradients of the first seven losses, float64, those not ``given`` being None."""
    shape, num = case.logits[0].shape, len(case.logits)
    shapes = ((), (), (num,), (), shape, (num, *shape[:-1]), (num, *shape[:-1]))
    out = []
    for there, shape in zip(given, shapes, strict=True):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if strange and shape:
            x = lay(x, "expanded" if len(shape) > 1 else "sliced")
        out.append(x if there else None)
    return out


def to(grads, dtype):
    return [None if x is None else x.to(dtype) for x in grads]


def run(case, grads, gradients=False):
    dtype = fusion.accumulate_dtype(case.logits)
    inputs = (case.logits, case.target, case.kappa, case.present, case.rule, case.loss_rule, case.detach)
    out, d_logits, _, kept = fused.objective(*inputs, gradients, False, True)
    results = dict(zip(NAMES, out, strict=True))
    d_rows, d_makers = fused.objective_backward(
        to(grads, dtype), kept, case.logits, case.target, case.rule, case.loss_rule, case.detach, True
    )
    results |= {f"d_logits[{m}]": d for m, d in enumerate(d_rows)}
    results |= {f"d_{name}": d for name, d in wanted(case, d_makers).items()}
    return results, d_logits


def wanted(case, d_makers):
    """Gradients of what makes the weights, of those that were given."""
    if case.rule.weights is not None:
        return {"weights": d_makers.weights} | ({} if case.rule.temperature is None else {"t": d_makers.temperature})
    out = {"alpha": d_makers.alpha, "beta": d_makers.beta}
    return out if case.rule.temperature is None else out | {"temperature": d_makers.temperature}


def compute(case: Case, grads):
    """The same in PyTorch."""
    inputs = (case.logits, case.target, case.kappa, case.present, case.rule, case.loss_rule, case.detach)
    out, _, _ = objective.objective(*inputs, False, False)
    results = dict(zip(NAMES, out, strict=True))
    d_rows, d_makers = objective.objective_backward(to(grads, case.logits[0].dtype), *inputs)
    results |= {f"d_logits[{m}]": d for m, d in enumerate(d_rows)}
    return results | {f"d_{name}": d for name, d in wanted(case, d_makers).items()}


def check(case, ours, grads):
    eager, truth = compute(case.eager, grads), compute(case.wide, grads)
    assert ours.keys() == truth.keys()
    for name in ours:
        terms = case.steepness if name.startswith("d_") else 0.0
        assert_errors_close(name, ours[name], eager[name], truth[name], 1 + size(case), terms)


SMALL = cases((1, 2, 5, 7, 13), (1, 2, 3, 7, 19), ((), (1,), (1, 1)))
LARGE = cases((1, 3, 13), (1, 5, 33, 70))
DENSE = cases((1, 2, 3), (1, 3, 40), ((1,), (5,), (2, 3), (3, 1, 2), (2, 2, 3)))


@bounded(25)
@given(
    st.one_of(LARGE, DENSE),
    st.sampled_from(sorted(TILINGS)),
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.booleans(),
    st.integers(0, 1000),
)
def test_three_launches(case, how, given, strange, seed):
    grads = incoming(case, given, strange, torch.Generator().manual_seed(seed))
    before = [x.clone() for x in case.tensors()]
    with tiled(how):
        with poisoned(math.nan):
            ours, d_logits = run(case, grads)
        with poisoned(12345), backwards():
            again, _ = run(case, grads)
    assert not d_logits
    check(case, ours, grads)
    for name in ours:
        assert same(ours[name], again[name]), name
    assert all(same(x, y) for x, y in zip(case.tensors(), before, strict=True))


@bounded(12)
@given(
    SMALL,
    st.sampled_from(["as is", "short"]),
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.sampled_from([1.0, 2.5, 0.0]),
)
def test_one_launch(case, how, given, scale):
    """What it keeps serves the gradients of other outputs too."""
    grads = incoming(case, given, False, torch.Generator().manual_seed(0))
    dtype, before = fusion.accumulate_dtype(case.logits), [x.clone() for x in case.tensors()]
    with tiled(how):
        with poisoned(math.nan):
            ours, d_logits = run(case, grads, gradients=True)
        with poisoned(12345):
            again, d_again = run(case, grads, gradients=True)
    assert len(d_logits) == len(case.logits)
    check(case, ours, grads)
    assert all(same(ours[name], again[name]) for name in ours)
    assert all(same(x, y) for x, y in zip(d_logits, d_again, strict=True))
    assert all(same(x, y) for x, y in zip(case.tensors(), before, strict=True))

    unit = [torch.full((), scale), *[None] * 6]
    eager, truth = compute(case.eager, unit), compute(case.wide, unit)
    with poisoned(math.nan):
        scaled = fused.scale_gradients(d_logits, torch.tensor(scale, dtype=dtype), case.logits)
    for m, (d, x) in enumerate(zip(scaled, case.logits, strict=True)):
        assert d.dtype == x.dtype
        assert_errors_close(f"scaled[{m}]", d, eager[f"d_logits[{m}]"], truth[f"d_logits[{m}]"], 1 + size(case))


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("form", ["paper", "margin", "released"])
@pytest.mark.parametrize("masked", [False, True])
def test_equals_autograd_through_the_equations(single, form, masked):
    """Independent of the operators' PyTorch: every equation written out, differentiated by autograd, in float64."""
    generator = torch.Generator().manual_seed(1)
    heads = [2 * torch.randn(6, 4, generator=generator, dtype=torch.float64) for _ in range(3)]
    target, kappa = torch.tensor([0, 3, 2, -100, 1, 1]), torch.rand(3, 6, generator=generator, dtype=torch.float64)
    present = torch.rand(3, 6, generator=generator) > 0.3 if masked else None
    coefficients = [
        torch.tensor(x, dtype=torch.float64) for x in ([-0.1, -0.5, -1.0], [0.0, 1.0, 0.5], [1.0, 2.0, 0.5])
    ]
    weight = torch.tensor([1.0, 0.5, 0.25, 2.0])
    options = {"form": form, "pairs": "all", "weight": weight, "label_smoothing": 0.1, "ranking_weight": 0.7}

    leaves = [x.clone().requires_grad_() for x in (*heads, *coefficients)]
    alpha, beta, temperature = leaves[3:]
    expected = reference.objective(
        leaves[:3], target, kappa, present, alpha=alpha, beta=beta, temperature=temperature, nonnegative=True, **options
    )
    grads = torch.autograd.grad(expected["loss"], leaves)

    rule = fusion.WeightRule(None, *coefficients, None, True, False)
    loss_rule = objective.LossRule(weight, 0.1, -100, 0.7, form, "all")
    out, d_logits, _, kept = fused.objective(heads, target, kappa, present, rule, loss_rule, False, single, False, True)
    for ours, name in zip(
        out, ("loss", "fused_loss", "unimodal_losses", "ranking_loss", "logits", "weights"), strict=False
    ):
        torch.testing.assert_close(ours, expected[name].detach(), rtol=1e-12, atol=1e-12)
    one = torch.ones((), dtype=torch.float64)
    d_rows, d_makers = fused.objective_backward([one, *[None] * 6], kept, heads, target, rule, loss_rule, False, True)
    assert len(d_logits) == 3 * single
    torch.testing.assert_close([*d_rows, *d_makers[1:]], list(grads), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d_logits, list(grads[: 3 * single]), rtol=1e-11, atol=1e-12)


def test_more_row_dimensions_than_a_kernel_walks_are_copied():
    """Four that do not fold into fewer."""
    heads = [torch.randn(2, 3, 2, 2, 4).permute(3, 2, 1, 0, 4), torch.randn(2, 2, 3, 2, 4)]
    case = Case(
        heads, torch.randint(4, (2, 2, 3, 2)), torch.rand(2, 2), torch.rand(2, 2, 2, 3, 2) > 0.3,
        fusion.WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None, None, False, False),
        objective.LossRule(None, 0.0, -100, 0.1, "paper", "adjacent"), False,
    )  # fmt: skip
    grads = incoming(case, [True] * 7, False, torch.Generator().manual_seed(0))
    with poisoned(math.nan):
        ours, _ = run(case, grads)
    check(case, ours, grads)


def test_samples_without_any_modality_leave_the_others_as_they_were():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(5, 6, generator=generator) for _ in range(2)]
    target, kappa = torch.arange(5), torch.rand(2, 5, generator=generator)
    rule = fusion.WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None, None, False, True)
    loss_rule = objective.LossRule(None, 0.0, -100, 0.1, "paper", "all")
    none = Case(heads, target, kappa, torch.zeros(2, 5, dtype=torch.bool), rule, loss_rule, False)
    for single in (False, True):
        ours, d_logits = run(none, [torch.ones(()), *[None] * 6], gradients=single)
        assert ours["loss"] == ours["ranking"] == 0
        assert ours["sample_losses"].isnan().all()
        assert not any(d.any() for d in (*d_logits, *(ours[f"d_logits[{m}]"] for m in range(2))))
        assert (ours["fused"] == 0).all()
        assert (ours["energy"] == torch.inf).all()
        broken = [heads[0].clone(), heads[1]]
        broken[0][2], broken[0][4, 1] = torch.nan, torch.inf
        masked = Case(heads, target, kappa, torch.ones(2, 5, dtype=torch.bool), rule, loss_rule, False)
        masked.present[0, 2] = masked.present[0, 4] = False
        given = [torch.ones(()), *[None] * 6]
        left, right = (
            run(x, given, gradients=single)[0] for x in (masked._replace(logits=broken, present=None), masked)
        )
        assert all(same(left[name], right[name]) for name in left)
