"""The objective's kernels in the interpreter: losses, gradients of every output, one launch for a small batch."""

import contextlib
import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch

from qmf_kernels import triton_kernels
from qmf_kernels.eager import objective
from qmf_kernels.eager.fusion import accumulate_dtype
from qmf_kernels.rules import LossGrads, LossRule, ObjectiveOptions, WeightRule
from qmf_kernels.triton_kernels import tiling

from ...qmf_fusion import reference
from .cases import Case, assert_errors_close, backwards, cases, few_and_many, lay, poisoned, same

# What the tiles are cut from: as they are; rows walked in steps of 32 classes; few rows and few samples per program.
TILINGS = {
    "as is": {"_ROW": tiling._ROW},
    "walked": {"_ROW": 0, "_WALK": 32},
    "short": {"_ROWS": 16},
}
ALL = [True] * len(LossGrads._fields)


@contextlib.contextmanager
def tiled(how):
    as_is = tiling.sample_block

    def sample_block(batch, pairs, alone=False):
        return as_is(batch, pairs, alone) if alone or how == "as is" else tiling.Block(4, 4, 4)

    with mock.patch.multiple(tiling, sample_block=sample_block, **TILINGS[how]):
        yield


def size(case):
    """The largest finite logit."""
    return max(x.double().nan_to_num(0, 0, 0).abs().max().item() for x in case.logits)


def incoming(case, given, strange, generator):
    """Gradients of the losses, float64, those not ``given`` being None."""
    shape, num = case.logits[0].shape, len(case.logits)
    shapes = ((), (), (num,), (), shape, (num, *shape[:-1]), (num, *shape[:-1]))
    out = []
    for there, shape in zip(given, shapes, strict=True):
        x = torch.randn(shape, generator=generator, dtype=torch.float64)
        if strange and shape:
            x = lay(x, "expanded" if len(shape) > 1 else "sliced")
        out.append(x if there else None)
    return LossGrads(*out)


def to(grads, dtype):
    return LossGrads(*(None if x is None else x.to(dtype) for x in grads))


def run(case, grads, gradients=False):
    out, d_logits, _, kept = triton_kernels.objective(case.logits, case.given, gradients, False)
    grads = to(grads, accumulate_dtype(case.logits))
    d_rows, d_rule = triton_kernels.objective_backward(grads, kept, case.logits, case.given, True)
    return named(out, d_rows, d_rule), d_logits


def compute(case: Case, grads):
    """The same in PyTorch."""
    out, _, _ = objective.objective(case.logits, case.given, False, False)
    return named(out, *objective.objective_backward(to(grads, case.logits[0].dtype), case.logits, case.given))


def named(losses, d_rows, d_rule):
    of_logits = {f"d_logits[{m}]": d for m, d in enumerate(d_rows)}
    return losses._asdict() | of_logits | {f"d_{name}": d for name, d in d_rule._asdict().items() if d is not None}


def check(case, ours, grads):
    eager, truth = compute(case.eager, grads), compute(case.wide, grads)
    assert ours.keys() == truth.keys()
    for name in ours:
        assert_errors_close(name, ours[name], eager[name], truth[name], 1 + size(case))


SMALL = cases((1, 2, 5, 7, 13), (1, 2, 3, 7, 19), ((), (1,), (1, 1)))
LARGE = cases((1, 3, 13), (1, 5, 33, 70))
DENSE = cases((1, 2, 3), (1, 3, 40), ((1,), (5,), (2, 3), (3, 1, 2), (2, 2, 3)))


def three_launches(case, how, given, strange, seed):
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


test_three_launches, test_three_launches_widely = few_and_many(
    5,
    30,
    st.one_of(LARGE, DENSE),
    st.sampled_from(sorted(TILINGS)),
    st.lists(st.booleans(), min_size=len(ALL), max_size=len(ALL)),
    st.booleans(),
    st.integers(0, 1000),
)(three_launches)


def one_launch(case, how, given, scale):
    """What it keeps serves the gradients of other outputs too."""
    grads = incoming(case, given, False, torch.Generator().manual_seed(0))
    dtype, before = accumulate_dtype(case.logits), [x.clone() for x in case.tensors()]
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

    unit = LossGrads(loss=torch.full((), scale))
    eager, truth = compute(case.eager, unit), compute(case.wide, unit)
    with poisoned(math.nan):
        scaled = triton_kernels.scale_gradients(d_logits, torch.tensor(scale, dtype=dtype), case.logits)
    for m, (d, x) in enumerate(zip(scaled, case.logits, strict=True)):
        assert d.dtype == x.dtype
        assert_errors_close(f"scaled[{m}]", d, eager[f"d_logits[{m}]"], truth[f"d_logits[{m}]"], 1 + size(case))


test_one_launch, test_one_launch_widely = few_and_many(
    3,
    16,
    SMALL,
    st.sampled_from(["as is", "short"]),
    st.lists(st.booleans(), min_size=len(ALL), max_size=len(ALL)),
    st.sampled_from([1.0, 2.5, 0.0]),
)(one_launch)


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

    alpha, beta, temperature = coefficients
    rule = WeightRule(None, alpha, beta, temperature, nonnegative=True)
    loss_rule = LossRule(weight, 0.1, ranking_weight=0.7, form=form, pairs="all")
    given = ObjectiveOptions(target, kappa, present, rule, loss_rule)
    out, d_logits, _, kept = triton_kernels.objective(heads, given, single, False)
    for ours, name in zip(
        out, ("loss", "fused_loss", "unimodal_losses", "ranking_loss", "logits", "weights"), strict=False
    ):
        torch.testing.assert_close(ours, expected[name].detach(), rtol=1e-12, atol=1e-12)
    one = LossGrads(loss=torch.ones((), dtype=torch.float64))
    d_rows, d_rule = triton_kernels.objective_backward(one, kept, heads, given, True)
    assert len(d_logits) == 3 * single
    torch.testing.assert_close([*d_rows, *d_rule[1:4]], list(grads), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(d_logits, list(grads[: 3 * single]), rtol=1e-11, atol=1e-12)


def test_gradients_of_a_batch_that_is_not_small():
    """Asked for in the forward, they are those that the backward finds for a gradient of 1."""
    heads = [torch.randn(3, 5, 2, 4).movedim(-1, 1).contiguous().movedim(1, -1) for _ in range(2)]
    target, kappa = torch.randint(4, (3, 5, 2)), torch.rand(2, 3)
    rule = WeightRule(None, torch.tensor([-0.1, -0.5]), torch.ones(2), torch.ones(2))
    given = ObjectiveOptions(target, kappa, None, rule, LossRule(), return_logits=False)
    _, d_logits, d_rule, kept = triton_kernels.objective(heads, given, True, True)
    one = LossGrads(loss=torch.ones(()))
    expected = triton_kernels.objective_backward(one, kept, heads, given, True)
    assert all(same(x, y) for x, y in zip([*d_logits, *d_rule], [*expected[0], *expected[1]], strict=True))


@pytest.mark.parametrize("options", [False, True])
def test_everything_that_is_kept_is_written(options):
    """Or two runs would differ, which torch.library.opcheck takes for a fault."""
    heads, target = [torch.randn(5, 2, 4) for _ in range(2)], torch.randint(4, (5, 2))
    rule = WeightRule(None, torch.tensor([-0.1, -0.5]), torch.ones(2), torch.ones(2) if options else None)
    loss_rule = LossRule(torch.rand(4) if options else None, label_smoothing=0.1 if options else 0.0)
    given = ObjectiveOptions(target, torch.rand(2, 5), None, rule, loss_rule)
    with poisoned(12345):
        *_, kept = triton_kernels.objective(heads, given, False, False)
    assert not any((x == 12345).any() for x in kept)


def test_more_row_dimensions_than_a_kernel_walks_are_copied():
    """Four that do not fold into fewer."""
    heads = [torch.randn(2, 3, 2, 2, 4).permute(3, 2, 1, 0, 4), torch.randn(2, 2, 3, 2, 4)]
    target, present = torch.randint(4, (2, 2, 3, 2)), torch.rand(2, 2, 2, 3, 2) > 0.3
    rule = WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None)
    case = Case(heads, target, torch.rand(2, 2), present, rule, LossRule())
    grads = incoming(case, ALL, False, torch.Generator().manual_seed(0))
    with poisoned(math.nan):
        ours, _ = run(case, grads)
    check(case, ours, grads)


def test_samples_without_any_modality_leave_the_others_as_they_were():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(5, 6, generator=generator) for _ in range(2)]
    target, kappa = torch.arange(5), torch.rand(2, 5, generator=generator)
    rule = WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None, normalize=True)
    loss_rule = LossRule(pairs="all")
    none = Case(heads, target, kappa, torch.zeros(2, 5, dtype=torch.bool), rule, loss_rule)
    one = LossGrads(loss=torch.ones(()))
    for single in (False, True):
        ours, d_logits = run(none, one, gradients=single)
        assert ours["loss"] == ours["ranking_loss"] == 0
        assert ours["sample_losses"].isnan().all()
        assert not any(d.any() for d in (*d_logits, *(ours[f"d_logits[{m}]"] for m in range(2))))
        assert (ours["logits"] == 0).all()
        assert (ours["energy"] == torch.inf).all()
        broken = [heads[0].clone(), heads[1]]
        broken[0][2], broken[0][4, 1] = torch.nan, torch.inf
        masked = Case(heads, target, kappa, torch.ones(2, 5, dtype=torch.bool), rule, loss_rule)
        masked.present[0, 2] = masked.present[0, 4] = False
        left, right = (run(x, one, gradients=single)[0] for x in (masked._replace(logits=broken, present=None), masked))
        assert all(same(left[name], right[name]) for name in left)


@pytest.mark.parametrize("ruled_out", [False, True])
def test_targets_whose_classes_weigh_nothing_are_no_loss(ruled_out):
    """Smoothed labels put something on the other classes, which is an average over nothing all the same."""
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    if ruled_out:
        heads[0][1, 1] = -torch.inf
    rule = WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None)
    loss_rule = LossRule(torch.tensor([0.0, 2.0, 1.0]), label_smoothing=0.2)
    case = Case(heads, torch.zeros(4, dtype=torch.int64), None, None, rule, loss_rule)
    one = LossGrads(loss=torch.ones(()))
    for single in (False, True):
        ours, d_logits = run(case, one, gradients=single)
        for found, rows in ((ours, d_logits), (compute(case, one), [])):
            assert found["loss"] == found["fused_loss"] == 0
            assert not found["unimodal_losses"].any()
            assert not any(d.any() for d in (*rows, *(found[f"d_logits[{m}]"] for m in range(2))))


def test_a_class_that_is_ruled_out_and_weighs_nothing_costs_nothing():
    generator = torch.Generator().manual_seed(0)
    heads = [torch.randn(4, 3, generator=generator) for _ in range(2)]
    heads[0][1, 1] = -torch.inf
    rule = WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None)
    loss_rule = LossRule(torch.tensor([1.0, 0.0, 2.0]), label_smoothing=0.2)
    case = Case(heads, torch.tensor([0, 2, 0, 2]), None, None, rule, loss_rule)
    one = LossGrads(loss=torch.ones(()))
    for single in (False, True):
        ours, _ = run(case, one, gradients=single)
        check(case, ours, one)
        assert all(torch.isfinite(ours[name]).all() for name in ("loss", "d_logits[0]", "d_logits[1]"))
