"""The history that the kernels keep in the interpreter: bit for bit what the PyTorch functions keep."""

import contextlib
import math
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch

from qmf_kernels import triton_kernels
from qmf_kernels.eager import history
from qmf_kernels.rules import FORMS, Losses, LossRule, ObjectiveOptions, Past, WeightRule
from qmf_kernels.triton_kernels import tiling

from .cases import backwards, few_and_many, fill, poisoned, same

BLOCKS = {"one block": None, "blocks of 2": tiling.Block(2, 2, 4)}


@contextlib.contextmanager
def sampled(how):
    block = BLOCKS[how]
    with mock.patch.object(history, "SCAN", 0):  # PyTorch keeps the range of small histories too
        if block is None:
            yield
            return
        with mock.patch.object(tiling, "sample_block", return_value=block):
            yield


def make_past(num, samples, start_epoch=1, minmax=True, ranks=True, records=True):
    kept, low, span = (torch.zeros(shape, dtype=torch.float64) for shape in ((2, num, samples), (num, 1), (num, 1)))
    history.find_range(kept, low, span)
    visits = torch.zeros(samples, dtype=torch.int64) if start_epoch > 1 else None
    return Past(kept, low, span, visits, torch.zeros(0), start_epoch, minmax, ranks, records)


def copy(past):
    return Past(*(x.clone() if isinstance(x, torch.Tensor) else x for x in past))


def step(past, heads, target, loss_rule, single, poison):
    num = len(heads)
    rule = WeightRule(None, -0.1 - torch.arange(num) / 10, torch.full((num,), 0.5), None)
    with poisoned(poison):
        given = ObjectiveOptions(target, None, None, rule, loss_rule, return_logits=False)
        out, d_logits, _, kept = triton_kernels.objective(heads, given, single, False, past)
    assert bool(d_logits) == single
    if past.ranks:
        given = given._replace(kappa=history.kappa(past.history, past.low, past.span, past.samples, past.minmax))
    return out, kept[2], (heads, given, single, False)


def steps(how, rows, num, samples, start_epoch, minmax, flags, values, pairs, seed):
    generator = torch.Generator().manual_seed(seed)
    past = make_past(num, samples, start_epoch, minmax, *flags)
    loss_rule = LossRule(ranking_weight=0.5, form=FORMS[seed % 3], pairs=pairs)
    single = how == "single" and math.prod(rows[1:]) == 1
    with sampled("one block" if how == "single" else how):
        for number in range(4):
            heads = [fill((*rows, 4), values, generator).float() for _ in range(num)]
            target = torch.randint(4, rows, generator=generator)
            target[torch.rand(rows, generator=generator) < 0.2] = -100
            # Repeats included, and a dozen of visits to one sample in one batch.
            index = torch.randint(min(samples, 2 if number == 3 else samples), rows[:1], generator=generator)
            past = past._replace(samples=torch.stack([index, index], 1)[:, 0])
            theirs, again = copy(past), copy(past)
            with backwards():
                repeated, ranking_again, _ = step(again, heads, target, loss_rule, single, 12345)
            before = copy(past)
            out, ranking_grad, _ = step(past, heads, target, loss_rule, single, math.nan)
            assert all(same(x, y) for x, y in zip(out, repeated, strict=True))
            assert same(ranking_grad, ranking_again)

            # Kappa: what PyTorch reads goes in as it is, to the same result.
            *_, inputs = step(before._replace(records=False), heads, target, loss_rule, single, 12345)
            given = triton_kernels.objective(*inputs)
            for name, x, y in zip(Losses._fields, out, given[0], strict=True):
                assert same(x, y), name
            assert same(ranking_grad, given[3][2])

            if past.records:
                history.record(
                    theirs.history, theirs.low, theirs.span, theirs.visits, start_epoch, out.sample_losses, index
                )
            for name, ours, others, twice in zip(Past._fields[:4], past, theirs, again, strict=False):
                assert same(ours, others), (number, name)
                assert same(ours, twice), (number, name)


test_steps, test_steps_widely = few_and_many(
    3,
    10,
    st.sampled_from(("single", "one block", "blocks of 2")),
    st.sampled_from(((1, 1), (5,), (7,), (3, 2), (12,))),
    st.sampled_from((1, 2, 3)),
    st.sampled_from((4, 40, 2500)),
    st.sampled_from((1, 3)),
    st.booleans(),
    st.sampled_from(((True, True), (False, True), (True, False))),
    st.sampled_from(("plain", "broken", "ties")),
    st.sampled_from(("adjacent", "all")),
    st.integers(0, 1000),
)(steps)


@pytest.mark.parametrize("how", BLOCKS)
@pytest.mark.parametrize("single", [False, True])
def test_the_range_follows_a_mean_that_was_its_end(how, single):
    """The sample with the largest mean comes again with less: no mean lies outside the range, which shrinks yet."""
    past = make_past(1, 9)
    loss_rule = LossRule(form="margin")
    target = torch.zeros(3, dtype=torch.int64)
    with sampled(how if not single else "one block"):
        for scores, index in (([0.0, 5.0, 1.0], [4, 7, 2]), ([1.0, 1.0, 0.0], [0, 7, 7]), ([0.2, 0.3, 0.4], [1, 3, 5])):
            heads = [torch.tensor([[0.0, x] for x in scores])]
            past = past._replace(samples=torch.tensor(index))
            step(past, heads, target, loss_rule, single, math.nan)
            low, span = torch.empty(1, 1, dtype=torch.float64), torch.empty(1, 1, dtype=torch.float64)
            history.find_range(past.history, low, span)
            assert same(low, past.low)
            assert same(span, past.span)
    assert past.history[1, 0].tolist() == [1, 1, 1, 1, 1, 1, 0, 3, 0]


@pytest.mark.parametrize("single", [False, True])
def test_visits_within_a_batch_count(single):
    """40 samples, more than one load of them: of the 20 visits each, the last 16 are recorded."""
    index = torch.arange(40) % 2
    past = make_past(1, 3, start_epoch=5)._replace(samples=index)
    heads, target = [torch.stack([torch.zeros(40), torch.arange(40.0)], 1)], torch.zeros(40, dtype=torch.int64)
    out, _, _ = step(past, heads, target, LossRule(), single, math.nan)
    assert past.history[1, 0].tolist() == [16, 16, 0]
    assert past.visits.tolist() == [20, 20, 0]
    expected = out.sample_losses[0, 8:].double()
    torch.testing.assert_close(past.history[0, 0, :2], torch.stack([expected[::2].sum(), expected[1::2].sum()]))


def test_more_programs_than_one_load_of_their_sums():
    """Each program's sums are added up in order; 130 of them take two loads."""
    heads = [torch.randn(260, 3) for _ in range(2)]
    past = make_past(2, 20)._replace(samples=torch.arange(260) % 20)
    whole = copy(past)
    target = torch.randint(3, (260,))
    loss_rule = LossRule(form="margin")
    with sampled("blocks of 2"):
        out, _, _ = step(past, heads, target, loss_rule, False, math.nan)
    with sampled("one block"):
        expected, _, _ = step(whole, heads, target, loss_rule, False, math.nan)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(past.history, whole.history, rtol=1e-15, atol=0)
    assert past.history[1].eq(13).all()


@pytest.mark.parametrize("how", BLOCKS)
@pytest.mark.parametrize("single", [False, True])
def test_the_range_follows_a_mean_that_two_visits_of_one_batch_move(how, single):
    """One loss of 1.45 leaves a mean of 0.5 below the largest, 1; two in one batch take it above."""
    past = make_past(1, 9)
    loss_rule = LossRule(form="margin")
    target = torch.zeros(3, dtype=torch.int64)
    with sampled(how if not single else "one block"):
        for losses, index in (([0.05, 0.5, 1.0], [4, 7, 2]), ([1.45, 0.5, 1.45], [7, 3, 7])):
            heads = [torch.tensor([[0.0, math.log(math.expm1(loss))] for loss in losses])]
            past = past._replace(samples=torch.tensor(index))
            step(past, heads, target, loss_rule, single, math.nan)
    assert past.span.item() == pytest.approx((0.5 + 2 * 1.45) / 3 - 0.05, rel=1e-5)
