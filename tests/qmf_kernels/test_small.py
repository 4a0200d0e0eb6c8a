"""The short cut for small batches says what the general objective says, and declines whatever it does not cover."""

import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from qmf_kernels import FORMS, PAIRS
from qmf_kernels.fusion import WeightRule
from qmf_kernels.objective import LossRule, objective
from qmf_kernels.small import SMALL, small_objective


def inputs(num=2, batch=5, classes=3, *, seed=0, scale=1.0, form="paper", pairs="adjacent", histories="all", **changes):
    """Arguments of ``objective`` by name, float64; ``changes`` replaces any of them, or of the two rules' fields."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.rand(shape, generator=generator, dtype=torch.float64)

    kappa = {"all": draw(num, batch), "none": None}.get(histories)
    if histories == "some":
        kappa = torch.where(draw(num, batch) < 0.4, torch.nan, draw(num, batch))
    elif histories == "equal":
        kappa = (draw(num, batch) * 3).floor() / 3
    rule = WeightRule(None, -0.1 - draw(num), draw(num), None)
    loss_rule = LossRule(None, 0.0, -100, 0.3, form, pairs)
    given = {
        "logits": [scale * (draw(batch, classes) - 0.5) for _ in range(num)],
        "target": torch.randint(classes, (batch,), generator=generator),
        "kappa": kappa,
        "present": None,
        "weight_rule": rule._replace(**{k: changes.pop(k) for k in list(changes) if k in rule._fields}),
        "loss_rule": loss_rule._replace(**{k: changes.pop(k) for k in list(changes) if k in loss_rule._fields}),
        "detach_weights": False,
        "gradients": True,
        "maker_gradients": False,
    }
    return {**given, **changes}


def assert_same(got, expected):
    for name, one, other in zip(got[0]._fields, got[0], expected[0], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")
    assert len(got[1]) == len(expected[1])
    for one, other in zip(got[1], expected[1], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    assert got[2] == expected[2] == []


@settings(deadline=None, max_examples=60)
@given(
    num=st.integers(1, 4),
    batch=st.integers(1, 80),
    classes=st.sampled_from([1, 2, 3, 15, 16, 20]),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 1.0, 30.0]),
    histories=st.sampled_from(["all", "some", "equal", "none"]),
    detach_weights=st.booleans(),
    gradients=st.booleans(),
)
@pytest.mark.parametrize("pairs", PAIRS)
@pytest.mark.parametrize("form", FORMS)
def test_equals_the_general_objective(form, pairs, **drawn):
    arguments = inputs(form=form, pairs=pairs, **drawn)
    got = small_objective(**arguments)
    assert got is not None
    assert_same(got, objective(**arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_accumulates_in_float32(dtype):
    arguments = inputs(batch=64, classes=7, scale=20.0)
    arguments["logits"] = [arguments["logits"][0].to(dtype), arguments["logits"][1].float()]
    got = small_objective(**arguments)
    exact = objective(**{**arguments, "logits": [x.double() for x in arguments["logits"]]})
    for one, other in zip([*got[0], *got[1]], [*exact[0], *exact[1]], strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-5)


def test_gradients_share_no_storage():
    _, d_logits, _ = small_objective(**inputs(num=3))
    assert len({d.untyped_storage().data_ptr() for d in d_logits}) == 3


BROKEN = [math.nan, math.inf, -math.inf]
DECLINED = {
    "a mask": {"present": torch.ones(2, 5, dtype=torch.bool)},
    "ready weights": {"weights": torch.ones(2, 5, dtype=torch.float64)},
    "a temperature": {"temperature": torch.ones(2, dtype=torch.float64)},
    "clamped weights": {"nonnegative": True},
    "normalised weights": {"normalize": True},
    "class weights": {"class_weight": torch.ones(3)},
    "label smoothing": {"label_smoothing": 0.1},
    "gradients of the weights' makers": {"maker_gradients": True},
    "a class to ignore": {"ignore_index": 2},
    "ignored targets": {"target": torch.tensor([0, 1, -100, 2, 0])},
    "a target too large": {"target": torch.tensor([0, 1, 3, 2, 0])},
    "a negative target": {"target": torch.tensor([0, 1, -1, 2, 0])},
    "positions": {"logits": [torch.zeros(2, 4, 3)] * 2, "target": torch.zeros(2, 4, dtype=torch.long), "kappa": None},
    "many logits": {"logits": [torch.zeros(5, SMALL)] * 2},
}


@pytest.mark.parametrize("changes", DECLINED.values(), ids=DECLINED)
def test_declines(changes):
    assert small_objective(**inputs(**changes)) is None


@pytest.mark.parametrize("value", BROKEN)
def test_declines_logits_that_are_not_finite(value):
    arguments = inputs()
    arguments["logits"][1][3, 1] = value
    assert small_objective(**arguments) is None


def test_constants_follow_their_tensors():
    arguments = inputs()
    before = small_objective(**arguments)[0].weights
    arguments["weight_rule"].alpha.data.mul_(2)
    arguments["weight_rule"].beta.data.mul_(2)
    torch.testing.assert_close(small_objective(**arguments)[0].weights, 2 * before)
