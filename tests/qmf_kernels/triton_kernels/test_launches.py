"""How many kernels a step launches, and how they refuse what only they can see."""

import re

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction

from qmf_kernels import triton_kernels
from qmf_kernels.rules import LossGrads, LossRule, ObjectiveOptions, WeightRule
from qmf_kernels.triton_kernels import tiling

from .test_history import make_past

THREE = ["forward_kernel", "bookkeeping_kernel", "backward_kernel"]


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    names, run = [], InterpretedFunction.run

    def record(function, *arguments, **options):
        names.append(function.fn.__name__)
        return run(function, *arguments, **options)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return names


def affine(num):
    return WeightRule(None, torch.full((num,), -0.1), torch.zeros(num), None)


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": torch.tensor([2.0, 0.5])},
    "ready uncertainty": {"uncertainty": torch.rand(2, 5)},
    "normalised": {"normalize": True, "detach": True},
}


def train(num, rows, classes, single, pairs="adjacent", past=None, loss_rule=None, **rule):
    heads = [torch.randn(*rows, classes) for _ in range(num)]
    target = torch.randint(classes, rows)
    loss_rule = loss_rule or LossRule(pairs=pairs)
    rule = affine(num)._replace(**rule)
    past = past or make_past(num, 50)._replace(samples=torch.arange(rows[0]))
    alone = single and triton_kernels.is_small(heads, pairs)
    given = ObjectiveOptions(target, None, None, rule, loss_rule)
    out, d_logits, _, kept = triton_kernels.objective(heads, given, alone, False, past)
    if d_logits:
        triton_kernels.scale_gradients(d_logits, out.loss, heads)
    else:
        grads = LossGrads(loss=out.loss)
        triton_kernels.objective_backward(grads, kept, heads, given, False)


@pytest.mark.parametrize("num", [1, 2, 6, 9])
@pytest.mark.parametrize("pairs", ["adjacent", "all"])
def test_three_launches_whatever_the_number_of_modalities(launched, num, pairs):
    train(num, (5,), 3, single=False, pairs=pairs)
    assert launched == THREE


@pytest.mark.parametrize("num", [1, 2, 6])
def test_one_launch_for_a_small_batch_and_one_to_scale(launched, num):
    train(num, (5,), 3, single=True)
    assert launched == ["single_kernel", "scale_kernel"]


@pytest.mark.parametrize("shape", [(2, 32, 3), (2, 16, 101), (2, 32, 101), (2, 128, 19), (2, 256, 10)])
def test_every_data_set_of_the_paper_takes_one_launch(shape):
    num, batch, classes = shape
    assert tiling.fits_one(num, classes, batch, "adjacent")


def test_a_large_batch_takes_three_even_where_one_was_hoped_for(launched):
    train(2, (300,), 33, single=True, past=make_past(2, 300)._replace(samples=torch.arange(300)))
    assert launched == THREE


def test_dense_prediction_takes_three(launched):
    train(3, (2, 3, 2), 4, single=True)
    assert launched == THREE


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option_takes_as_many(launched, name):
    loss_rule = LossRule(label_smoothing=0.1, class_weight=torch.rand(3))
    train(2, (5,), 3, single=False, loss_rule=loss_rule, **OPTIONS[name])
    train(2, (5,), 3, single=True, loss_rule=loss_rule, **OPTIONS[name])
    assert launched == [*THREE, "single_kernel", "scale_kernel"]


@pytest.mark.parametrize("name", OPTIONS)
def test_fusion_alone_takes_one_each_way(launched, name):
    heads, rule = [torch.randn(5, 3) for _ in range(2)], affine(2)._replace(**OPTIONS[name])
    out = triton_kernels.fuse(heads, None, rule)
    triton_kernels.fuse_backward(out, out[2], heads, rule, False)
    assert launched == ["forward_kernel", "backward_kernel"]


def losses(heads, target, past=None, single=False):
    given = ObjectiveOptions(target, None, None, affine(len(heads)), LossRule(), return_logits=False)
    return triton_kernels.objective(heads, given, single, False, past)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("label", [3, -1, 2**40])
def test_a_target_that_is_no_class(single, label):
    heads, target = [torch.randn(4, 3) for _ in range(2)], torch.tensor([0, 1, label, 2])
    with pytest.raises(Exception, match=re.escape("target must hold classes 0 to K - 1 (or ignore_index)")):
        losses(heads, target, single=single)
    losses(heads, target.clamp(0, 2), single=single)


@pytest.mark.parametrize("single", [False, True])
@pytest.mark.parametrize("sample", [9, -1])
def test_an_index_outside_the_history(single, sample):
    heads, target = [torch.randn(3, 3) for _ in range(2)], torch.tensor([0, 1, 2])
    past = make_past(2, 9)._replace(samples=torch.tensor([0, sample, 8]))
    with pytest.raises(Exception, match="index must be within the trajectory"):
        losses(heads, target, past, single=single)
    losses(heads, target, past._replace(samples=torch.tensor([0, 5, 8])), single=single)
