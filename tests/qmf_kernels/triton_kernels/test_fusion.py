"""Fusion alone in the interpreter, forward and backward, against PyTorch in float64."""

import math
from unittest import mock

import hypothesis.strategies as st
import torch

from qmf_kernels import triton_kernels
from qmf_kernels.eager import fusion
from qmf_kernels.rules import RuleGrads
from qmf_kernels.triton_kernels import tiling

from .cases import assert_errors_close, backwards, cases, few_and_many, lay, poisoned, same

TILINGS = {"as is": {"_ROW": tiling._ROW}, "walked": {"_ROW": 0, "_WALK": 32}, "short": {"_ROWS": 16}}


def run(case, grads):
    dtype = fusion.accumulate_dtype(case.logits)
    out = triton_kernels.fuse(case.logits, case.present, case.rule)
    grads = [x.to(dtype) for x in grads]
    return out, *triton_kernels.fuse_backward(grads, out[2], case.logits, case.rule, True)


def compute(case, grads):
    out = fusion.fuse(case.logits, case.present, case.rule)
    grads = [x.to(case.logits[0].dtype) for x in grads]
    return out, *fusion.fuse_backward(grads, case.logits, case.present, case.rule)


def differentiate(case, grads):
    """The gradients as autograd has them: through torch.logsumexp, from whose rounded result its backward starts."""
    grads = [x.to(case.logits[0].dtype) for x in grads]
    leaves = [x.clone().requires_grad_() for x in case.logits]
    given = {name: x.clone().requires_grad_() for name, x in case.rule._asdict().items() if isinstance(x, torch.Tensor)}
    rule = case.rule._replace(**given)
    weights, energies, counts, finite, ruled = [], [], [], [], torch.zeros(leaves[0].shape, dtype=torch.bool)
    for m, leaf in enumerate(leaves):
        counted = torch.isfinite(torch.logsumexp(leaf.detach(), -1))
        if case.present is not None:
            counted = counted & case.present[m]
        x = torch.where(counted.unsqueeze(-1), leaf, 0)
        out = x == -torch.inf
        x = torch.where(out, 0, x)
        t = 1 if rule.temperature is None else rule.temperature[m]
        energy = -t * torch.logsumexp((x / t).masked_fill(out, -torch.inf), -1)
        u = energy if rule.uncertainty is None else rule.uncertainty[m]
        weights.append(rule.alpha[m] * u + rule.beta[m])
        energies.append(torch.where(counted, energy, 0))
        counts.append(counted)
        finite.append(x)
        ruled = ruled | out
    counts, weights = torch.stack(counts), torch.stack(weights)
    if rule.nonnegative or rule.normalize:
        weights = weights.clamp(min=0)
    weights = torch.where(counts, weights, 0)
    if rule.normalize:
        total = weights.sum(0)
        equal = counts.to(weights.dtype) / counts.sum(0).clamp(min=1)
        weights = torch.where(total > 0, weights / torch.where(total > 0, total, 1), equal)
    through = weights.detach() if rule.detach else weights
    fused = sum(w.unsqueeze(-1) * x for w, x in zip(through, finite, strict=True)).masked_fill(ruled, -torch.inf)
    outputs, leaves = [fused, weights, torch.stack(energies)], [*leaves, *given.values()]
    found = torch.autograd.grad(outputs, leaves, grads, allow_unused=True, materialize_grads=True)
    num = len(case.logits)
    return found[:num], dict(zip(given, found[num:], strict=True))


def forward_and_backward(case, how, strange, seed):
    generator = torch.Generator().manual_seed(seed)
    rows = case.logits[0].shape[:-1]
    shapes = (case.logits[0].shape, (len(case.logits), *rows), (len(case.logits), *rows))
    grads = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    if strange:
        grads = [lay(x, "expanded") for x in grads]
    before = [x.clone() for x in case.tensors()]
    with mock.patch.multiple(tiling, **TILINGS[how]):
        with poisoned(math.nan):
            out, d_logits, d_rule = run(case, grads)
        with poisoned(12345), backwards():
            again = run(case, grads)
    eager, truth = compute(case.eager, grads), compute(case.wide, grads)
    d_eager, rule_eager = differentiate(case.eager, grads)
    size = 1 + max(x.double().nan_to_num(0, 0, 0).abs().max().item() for x in case.logits)
    for i, name in enumerate(("fused", "weights", "energy")):
        assert_errors_close(name, out[i], eager[0][i], truth[0][i], size)
        assert same(out[i], again[0][i])
    for m, d in enumerate(d_logits):
        assert_errors_close(f"d_logits[{m}]", d, d_eager[m], truth[1][m], size)
        assert same(d, again[1][m])
    for name in RuleGrads._fields:
        ours, twice = (getattr(x, name) for x in (d_rule, again[2]))
        assert (ours is None) == (name not in rule_eager)
        if ours is not None:
            assert_errors_close(f"d_{name}", ours, rule_eager[name], getattr(truth[2], name), size)
            assert same(ours, twice)
    assert all(same(x, y) for x, y in zip(case.tensors(), before, strict=True))


test_forward_and_backward, test_forward_and_backward_widely = few_and_many(
    4,
    16,
    st.one_of(
        cases((1, 2, 7, 13), (1, 2, 3, 19, 33, 70)),
        cases((1, 3), (1, 3, 40), ((5,), (2, 3), (3, 1, 2), (2, 2, 3))),
    ),
    st.sampled_from(sorted(TILINGS)),
    st.booleans(),
    st.integers(0, 1000),
)(forward_and_backward)
