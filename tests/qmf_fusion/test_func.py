"""``torch.func`` on both rules' fusion: the same numbers as one call after another, and the same slopes as backward."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, hessian, stack_module_state, vmap

import qmf_kernels
from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.functional import ranking_loss
from qmf_kernels import WeightRule
from qmf_kernels.eager import plain

from .test_tools import NAMES, batch, build, train


def default():
    return FusionModel({name: nn.Linear(6, 5) for name in NAMES}, temperature=2.0, learnable=True)


@pytest.fixture(params=["default", "robust", "robust, features"])
def model(request):
    model = default() if request.param == "default" else build("features" in request.param)
    train(model)
    return model.eval()


def one_by_one(model, inputs, target, i):
    model.zero_grad()
    F.cross_entropy(model({name: x[i : i + 1] for name, x in inputs.items()}).logits, target[i : i + 1]).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_gradients_per_sample(model):
    inputs, target, _ = batch(7, n=6)
    inputs["a"][2, 3] = torch.nan
    parameters, buffers = ({k: v.detach() for k, v in of()} for of in (model.named_parameters, model.named_buffers))

    def loss(parameters, a, b, y):
        out = functional_call(model, (parameters, buffers), ({"a": a[None], "b": b[None]},))
        return F.cross_entropy(out.logits, y[None])

    got = vmap(grad(loss), (None, 0, 0, 0))(parameters, inputs["a"], inputs["b"], target)
    for i in range(6):
        for name, expected in one_by_one(model, inputs, target, i).items():
            torch.testing.assert_close(got[name][i], expected, rtol=1e-4, atol=1e-6, msg=name)


def test_ensembles(model):
    """Members that differ in heads, in constants and in statistics."""
    members = [copy.deepcopy(model) for _ in range(3)]
    for step, member in enumerate(members):
        train(member.train(), steps=step + 1)
        member.eval()
    parameters, buffers = stack_module_state(members)
    skeleton = copy.deepcopy(model).to("meta")
    inputs = batch(7)[0]

    def run(parameters, buffers):
        out = functional_call(skeleton, (parameters, buffers), (inputs,))
        return out.logits, out.weights

    logits, weights = vmap(run)(parameters, buffers)
    for i, member in enumerate(members):
        torch.testing.assert_close(logits[i], member(inputs).logits)
        torch.testing.assert_close(weights[i], member(inputs).weights)


def test_second_derivatives():
    fusion, x = QualityAwareFusion(2), torch.randn(2, 3, dtype=torch.float64)
    got = hessian(lambda x: fusion(x).logits.square().sum())(x)
    step = 1e-5 * torch.eye(6, dtype=torch.float64).view(6, 2, 3)
    slope = grad(lambda x: fusion(x).logits.square().sum())
    expected = torch.stack([(slope(x + d) - slope(x - d)) / 2e-5 for d in step])
    torch.testing.assert_close(got.view(6, 2, 3), expected, rtol=1e-6, atol=1e-7)


def test_objective_says_that_it_is_not_transformed():
    criterion = QMFLoss(QualityAwareFusion(2), 6)
    index, target = torch.arange(6), torch.zeros(6, dtype=torch.long)
    with pytest.raises(RuntimeError, match=r"inside of torch\.func"):
        grad(lambda x: criterion(x, target, index).loss)(torch.randn(2, 6, 3))
    assert not criterion.ranking.trajectory.count.any()
    with pytest.raises(RuntimeError, match=r"inside of torch\.func"):
        grad(lambda w: ranking_loss(w, torch.rand(2, 6)))(torch.rand(2, 6))


@pytest.mark.parametrize("temperature", [None, 0.5])
@pytest.mark.parametrize(
    "options",
    [{}, {"nonnegative": True}, {"normalize": True}, {"detach": True}, {"uncertainty": True}, {"fused": True}],
    ids=str,
)
def test_plain_operations_are_the_operator(options, temperature):
    """With rows that do not count and classes that are ruled out; values, and the slopes of everything."""
    logits = [torch.randn(7, 4, dtype=torch.float64) for _ in range(3)]
    logits[0][1, 2], logits[1][2, 0], logits[2][3, 1], logits[0][4] = torch.nan, torch.inf, -torch.inf, -torch.inf
    present = torch.rand(3, 7) < 0.8
    chosen = dict(options)
    for name, shape in (("uncertainty", (3, 7)), ("fused", (7, 4))):
        if name in chosen:
            chosen[name] = torch.randn(shape, dtype=torch.float64)
    alpha, beta = -torch.rand(3, dtype=torch.float64), torch.rand(3, dtype=torch.float64)
    given = {"uncertainty": None, "alpha": alpha, "beta": beta, "temperature": None, **chosen}
    if temperature is not None:
        given["temperature"] = torch.full((3,), temperature, dtype=torch.float64)
    results = []
    for fuse in (qmf_kernels.fuse, plain.fuse):
        leaves = [x.clone().requires_grad_() for x in logits]
        of_rule = {k: v.clone().requires_grad_() if isinstance(v, torch.Tensor) else v for k, v in given.items()}
        out = fuse(leaves, present, WeightRule(**of_rule))
        factors = torch.Generator().manual_seed(1)
        total = sum(
            (torch.where(torch.isfinite(x), x, 0) * torch.randn(x.shape, generator=factors, dtype=x.dtype)).sum()
            for x in out
        )
        tensors = [*leaves, *(x for x in of_rule.values() if isinstance(x, torch.Tensor))]
        grads = torch.autograd.grad(total, tensors, allow_unused=True)
        results.append([*out, *(torch.zeros_like(x) if g is None else g for g, x in zip(grads, tensors, strict=True))])
    for x, y in zip(*results, strict=True):
        torch.testing.assert_close(x, y)
