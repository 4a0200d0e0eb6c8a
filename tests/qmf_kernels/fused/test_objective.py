"""The objective's kernels in the interpreter: losses, gradients of every output, and the one launch of a small batch."""

import contextlib
import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from qmf_kernels import fusion, objective
from qmf_kernels.fused import operators as fused
from qmf_kernels.fused import tiling

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
    out, made, d_logits = fused.objective(*inputs, gradients, True)
    results = dict(zip(NAMES, out, strict=True))
    d_rows, d_makers = fused.objective_backward(
        to(grads, dtype), made, case.logits, case.target, case.rule, case.loss_rule, case.detach, True
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
        assert_errors_close(name, ours[name], eager[name], truth[name], 1 + size(case))


SMALL = cases((1, 2, 5, 7, 13), (1, 2, 3, 7, 19))
LARGE = cases((1, 3, 13), (1, 5, 33, 70))
DENSE = cases((1, 2, 3), (1, 3, 40), ((1,), (5,), (2, 3), (3, 1, 2), (2, 2, 3)))


@bounded(45)
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
