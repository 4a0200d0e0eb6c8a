"""Rules other than a weighted sum of logits in the interpreter: objective and fusion against PyTorch in float64."""

import math
from unittest import mock

import hypothesis.strategies as st
import torch
from hypothesis import given

from qmf_kernels import combination, fusion
from qmf_kernels.triton_kernels import operators as fused

from . import test_fusion, test_objective
from .cases import assert_errors_close, backwards, bounded, cases, poisoned, same

RULES = {"combinations": combination.NAMES, "norms": (None, 0.1, 2.0)}
ONLY_NORMED = {"combinations": ("logits",), "norms": (0.1, 2.0)}
ROWS = (1, 2, 7), (1, 2, 3, 19, 70)
DENSE = (1, 2, 3), (1, 3, 40), ((5,), (2, 3), (3, 1, 2))
MANY = st.one_of(cases(*ROWS, **RULES), cases(*DENSE, **RULES), cases(*ROWS, **ONLY_NORMED))
SMALL = st.one_of(cases(*ROWS, **RULES), cases(*ROWS, **ONLY_NORMED))


@bounded(10)
@given(
    MANY,
    st.sampled_from(sorted(test_objective.TILINGS)),
    st.lists(st.booleans(), min_size=7, max_size=7),
    st.integers(0, 1000),
)
def test_three_launches(case, how, wanted, seed):
    grads = test_objective.incoming(case, wanted, False, torch.Generator().manual_seed(seed))
    with test_objective.tiled(how):
        with poisoned(math.nan):
            ours, _ = test_objective.run(case, grads)
        with poisoned(12345), backwards():
            again, _ = test_objective.run(case, grads)
    test_objective.check(case, ours, grads)
    assert all(same(ours[name], again[name]) for name in ours)


@bounded(10)
@given(SMALL, st.sampled_from(["as is", "short"]), st.lists(st.booleans(), min_size=7, max_size=7))
def test_one_launch(case, how, wanted):
    grads = test_objective.incoming(case, wanted, False, torch.Generator().manual_seed(0))
    with test_objective.tiled(how), poisoned(math.nan):
        ours, d_logits = test_objective.run(case, grads, gradients=True)
    test_objective.check(case, ours, grads)
    unit = [torch.ones(()), *[None] * 6]
    eager, truth = test_objective.compute(case.eager, unit), test_objective.compute(case.wide, unit)
    for m, d in enumerate(d_logits):
        name = f"d_logits[{m}]"
        assert_errors_close(name, d, eager[name], truth[name], 1 + test_objective.size(case), case.steepness)


@bounded(10)
@given(MANY, st.sampled_from(sorted(test_fusion.TILINGS)), st.integers(0, 1000))
def test_forward_and_backward(case, how, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = case.logits[0].shape[:-1]
    shapes = (case.logits[0].shape, (len(case.logits), *rows), (len(case.logits), *rows))
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    with mock.patch.multiple(fused.tile.__module__, **test_fusion.TILINGS[how]), poisoned(math.nan):
        out, d_logits, d_makers = test_fusion.run(case, grads)
    eager, truth = test_fusion.compute(case.eager, grads), test_fusion.compute(case.wide, grads)
    size = 1 + test_objective.size(case)
    for i, name in enumerate(("fused", "weights", "energy")):
        assert_errors_close(name, out[i], eager[0][i], truth[0][i], size)
    for m, d in enumerate(d_logits):
        assert_errors_close(f"d_logits[{m}]", d, eager[1][m], truth[1][m], size, case.steepness)
    if case.rule.combine not in ("mixture", "product") and case.rule.weights is None:
        for name in ("alpha", "beta"):
            assert_errors_close(name, *(getattr(x, name) for x in (d_makers, eager[2], truth[2])), size)


def test_wide_rows_are_normalised_as_narrow_ones_are():
    """By sums that are gathered step by step, of rows whose squares are out of range among them."""
    x = torch.randn(4, 70, generator=torch.Generator().manual_seed(0))
    x[1] *= 1e30
    x[2] *= 1e-30
    x[3] = 0
    rule = fusion.WeightRule(None, -torch.ones(1), torch.zeros(1), None, normalize_logits=0.1)
    narrow = fused.fuse([x], None, rule)
    with mock.patch.multiple(fused.tile.__module__, _ROW=0, _WALK=32):
        wide = fused.fuse([x], None, rule)
    for ours, theirs in zip(wide, narrow, strict=True):
        torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(narrow[0][0], narrow[1][0, 0] * x[0] / (0.1 * x[0].norm()))
