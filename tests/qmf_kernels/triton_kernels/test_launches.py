"""How many kernels a step launches, and how they refuse what only they can see."""

import re

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_kernels import fusion, objective
from qmf_kernels.trajectory import Past
from qmf_kernels.triton_kernels import operators as fused

from .test_trajectory import make_past


@pytest.fixture
def launched(monkeypatch):
    """The names of the kernels launched."""
    names, launch = [], fused.launch

    def record(kernel, *arguments, **constants):
        names.append(kernel.fn.__name__)
        launch(kernel, *arguments, **constants)

    monkeypatch.setattr(fused, "launch", record)
    return names


def makers(num, temperature=None):
    return fusion.WeightRule(None, torch.full((num,), -0.1), torch.zeros(num), temperature)


RULES = {
    "LogitNorm": {"normalize_logits": 0.1},
    "entropy": {"uncertainty": "entropy"},
    "probabilities": {"combine": "probabilities", "normalize_logits": 0.1},
    "mixture": {"combine": "mixture", "static": torch.tensor([0.5, torch.nan])},
    "product": {"combine": "product"},
}


def train(num, rows, classes, single, pairs="adjacent", past=None, smoothing=0.0, **rule):
    heads = [torch.randn(*rows, classes) for _ in range(num)]
    target = torch.randint(classes, rows)
    loss_rule = objective.LossRule(None, smoothing, -100, 0.1, "paper", pairs)
    rule = makers(num)._replace(**rule)
    past = past or make_past(num, 50)._replace(samples=torch.arange(rows[0]))
    out, d_logits, _, kept = fused.objective(
        heads, target, None, None, rule, loss_rule, False, single, False, True, past
    )
    if d_logits and fused.is_small(heads, pairs):
        fused.scale_gradients(d_logits, out.loss, heads)
    elif not d_logits:
        fused.objective_backward([out.loss, *[None] * 6], kept, heads, target, rule, loss_rule, False, False)


@pytest.mark.parametrize("num", [1, 2, 6, 9])
@pytest.mark.parametrize("pairs", ["adjacent", "all"])
def test_three_launches_whatever_the_number_of_modalities(launched, num, pairs):
    train(num, (5,), 3, single=False, pairs=pairs)
    assert launched == ["forward_kernel", "bookkeeping_kernel", "backward_kernel"]


@pytest.mark.parametrize("num", [1, 2, 6])
def test_one_launch_for_a_small_batch_and_one_to_scale(launched, num):
    train(num, (5,), 3, single=True)
    assert launched == ["single_kernel", "scale_kernel"]


@pytest.mark.parametrize("shape", [(2, 32, 3), (2, 16, 101), (2, 32, 101), (2, 128, 19), (2, 256, 10)])
def test_every_data_set_of_the_paper_takes_one_launch(launched, shape):
    num, batch, classes = shape
    from qmf_kernels.triton_kernels.tiling import fits_one

    assert fits_one(num, classes, batch, "adjacent")


def test_a_large_batch_takes_three_even_where_one_was_hoped_for(launched):
    train(2, (300,), 33, single=True, past=make_past(2, 300)._replace(samples=torch.arange(300)))
    assert launched == ["forward_kernel", "bookkeeping_kernel", "backward_kernel"]


def test_dense_prediction_takes_one_more(launched):
    train(3, (2, 3, 2), 4, single=True)
    assert launched == ["forward_kernel", "positions_kernel", "bookkeeping_kernel", "backward_kernel"]


@pytest.mark.parametrize("name", RULES)
def test_every_rule_takes_as_many(launched, name):
    train(2, (5,), 3, single=False, smoothing=0.1, **RULES[name])
    train(2, (5,), 3, single=True, smoothing=0.1, **RULES[name])
    assert launched == ["forward_kernel", "bookkeeping_kernel", "backward_kernel", "single_kernel", "scale_kernel"]


@pytest.mark.parametrize("name", ["plain", *RULES])
def test_fusion_alone_takes_one_each_way(launched, name):
    heads, rule = [torch.randn(4, 3) for _ in range(2)], makers(2)._replace(**RULES.get(name, {}))
    out = fused.fuse(heads, None, rule)
    fused.fuse_backward(out, out[2], heads, rule, False, False)
    assert launched == ["forward_kernel", "backward_kernel"]


def test_a_training_step_of_robust_is_nothing_but_launches(launched, monkeypatch):
    """But for its statistics, which are more than a row's business."""
    fusion = QualityAwareFusion.robust(2, gather=False, normalize_logits=0.1)
    criterion = QMFLoss(fusion, 50, backend="triton")
    heads = [torch.randn(5, 3, requires_grad=True) for _ in range(2)]
    monkeypatch.setattr(torch, "log_softmax", None)
    criterion(heads, torch.arange(5) % 3, torch.arange(5)).loss.backward()
    assert launched == ["single_kernel", "scale_kernel"]


def losses(heads, target, past=None, single=False):
    loss_rule = objective.LossRule(None, 0.0, -100, 0.1, "paper", "adjacent")
    return fused.objective(heads, target, None, None, makers(len(heads)), loss_rule, False, single, False, False, past)


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
    past: Past = make_past(2, 9)._replace(samples=torch.tensor([0, sample, 8]))
    with pytest.raises(Exception, match="index must be within the trajectory"):
        losses(heads, target, past, single=single)
    losses(heads, target, past._replace(samples=torch.tensor([0, 5, 8])), single=single)
