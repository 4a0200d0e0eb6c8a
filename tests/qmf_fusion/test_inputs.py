"""Absent and broken inputs: nothing of them reaches a head's parameters, its batch statistics or another sample."""

import copy

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss

BATCH, CLASSES = 6, 4


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def mlp():
    return nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, CLASSES))


def convolution():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 9, CLASSES))


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FusionModel({"a": mlp(), "b": convolution()})


def inputs():
    return {"a": randn(BATCH, 5, seed=1), "b": randn(BATCH, 3, 5, 5, seed=2)}


def step(model, given, present=None, rows=None):
    """The loss and the gradients of a training step, of all samples or of these rows' targets."""
    target, index = torch.arange(BATCH) % CLASSES, torch.arange(BATCH)
    if rows is not None:
        target, index = target[rows], index[rows]
    criterion = QMFLoss(model.fusion, BATCH)
    out = model(given, present)
    losses = criterion(out.unimodal_logits, target, index)
    losses.loss.backward()
    return out, losses, {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["a", "b"])
def test_a_broken_input_kills_no_head(value, masked, name):
    given, present = inputs(), None
    clean = copy.deepcopy(given)
    given[name][2, 1] = value
    given[name][4] = value
    expected = torch.ones(2, BATCH, dtype=torch.bool)
    expected["ab".index(name), [2, 4]] = False
    if masked:
        present = expected
    model = build()
    out, losses, grads = step(model, given, present)
    assert torch.isfinite(losses.loss)
    assert torch.equal(out.weights != 0, expected)
    assert out.unimodal_logits["ab".index(name)][[2, 4]].isnan().all()
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert all(torch.isfinite(x).all() for x in model.buffers())
    # What is there counts the same, whatever stands in the rows that are not.
    _, others, same = step(build(), clean, expected)
    torch.testing.assert_close(losses.loss, others.loss)
    torch.testing.assert_close(grads, same)


def test_batch_statistics_are_those_of_the_rows_that_are_there():
    """Three absent, three whole: each whole one stands in for one that is absent."""
    given, present = inputs(), torch.ones(2, BATCH, dtype=torch.bool)
    present[1, [0, 3, 4]] = False
    given["b"][[0, 3, 4]] = torch.nan
    model, alone = build(), build()
    step(model, given, present)
    alone.heads["b"](given["b"][[1, 2, 5]])
    for name in ("running_mean", "running_var"):
        ours, theirs = (m.heads["b"].get_submodule("1").get_buffer(name) for m in (model, alone))
        # The variance is the unbiased one, of six rows or three.
        torch.testing.assert_close(ours, theirs, rtol=0.02, atol=1e-6)


@pytest.mark.parametrize("present", [None, torch.tensor([True, False]), torch.tensor([[True] * 6, [False] * 6])])
def test_a_modality_without_any_whole_row(present):
    given = inputs()
    given["b"].fill_(torch.nan)
    _, losses, grads = step(build(), given, present)
    assert torch.isfinite(losses.loss)
    assert losses.unimodal_losses[1] == 0
    assert all(torch.isfinite(grad).all() for grad in grads.values())
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("heads.b"))


def test_a_broken_row_is_absent_whatever_its_head_makes_of_it():
    """A head may make finite logits of what is not: of a row that no sensor measured."""
    model = FusionModel({"a": nn.Sequential(nn.ReLU6(), nn.Linear(5, CLASSES)), "b": nn.Linear(5, CLASSES)})
    x = randn(BATCH, 5)
    x[1, 0], x[2, 0] = torch.inf, -torch.inf
    for mode in (True, False):
        out = model.train(mode)({"a": x, "b": randn(BATCH, 5)})
        assert (out.weights[0] != 0).tolist() == [True, False, False, True, True, True]


def test_whole_inputs_reach_a_head_as_they_are():
    seen = []
    model = FusionModel({"a": mlp()})
    model.heads["a"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = randn(BATCH, 5)
    model({"a": x})
    model({"a": x}, present=torch.ones(1, BATCH, dtype=torch.bool))
    assert all(given is x for given in seen)


def test_filled_images_keep_their_memory_format():
    x = randn(BATCH, 3, 5, 5).contiguous(memory_format=torch.channels_last)
    x[0] = torch.nan
    seen = []
    model = FusionModel({"b": convolution()})
    model.heads["b"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model({"b": x})
    assert seen[0].stride() == x.stride()
    assert torch.isfinite(seen[0]).all()


def test_a_sample_is_there_where_any_of_its_positions_is():
    head = nn.Conv2d(2, CLASSES, 1)
    model = FusionModel({"a": head}, class_dim=1)
    x, present = randn(2, 2, 3, 3), torch.ones(1, 2, 3, 3, dtype=torch.bool)
    present[0, 0, 0] = present[0, 1] = False
    x[1] = torch.nan
    out = model({"a": x}, present)
    assert torch.equal(out.weights != 0, present)
    torch.testing.assert_close(out.unimodal_logits[0][0, :, 1:], head(x)[0, :, 1:])


def test_tokens_of_absent_samples_are_filled_too():
    seen = []
    model = FusionModel({"a": nn.Sequential(nn.Embedding(9, 5), nn.Flatten(), nn.Linear(10, CLASSES))})
    model.heads["a"].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    tokens = torch.tensor([[1, 2], [-1, -1], [3, 4]])
    out = model({"a": tokens}, present=torch.tensor([[True, False, True]]))
    assert seen[0].tolist() == [[1, 2], [1, 2], [3, 4]]
    assert out.weights[0, 1] == 0


def test_an_input_without_a_row_for_each_sample_breaks_the_whole_batch():
    """A sequence that comes first: whose NaN it is can't be told."""

    class Sequence(nn.Module):
        def forward(self, x):
            return x.mean(0)

    model = FusionModel({"a": Sequence(), "b": nn.Identity()})
    x = randn(7, BATCH, CLASSES)
    assert torch.equal(model({"a": x, "b": x[0]}).unimodal_logits[0], x.mean(0))
    x[3, 2, 1] = torch.nan
    out = model({"a": x, "b": x[0]})
    assert not out.weights[0].any()
    assert out.weights[1].all()


def test_compiled():
    model = FusionModel({"a": mlp(), "b": mlp()})
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (6, 9):
        given = {name: randn(batch, 5, seed=m) for m, name in enumerate("ab")}
        for broken in (False, True):
            if broken:
                given["a"][1] = torch.nan
                given["b"][:, 2] = torch.nan
            grads = []
            for call in (model, compiled):
                model.zero_grad()
                call(given).logits.sum().backward()
                grads.append([p.grad for p in model.parameters()])
                assert all(torch.isfinite(g).all() for g in grads[-1])
            torch.testing.assert_close(*grads)


def test_no_value_on_a_device_is_looked_at():
    """Which would mean waiting for it; a meta tensor has none."""
    model = build().to("meta")
    given = {name: x.to("meta") for name, x in inputs().items()}
    out = model(given, torch.ones(2, BATCH, dtype=torch.bool, device="meta"))
    assert out.logits.shape == (BATCH, CLASSES)


class Positional(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = FusionModel({"a": mlp(), "b": mlp()})

    def forward(self, a, b):
        out = self.model({"a": a, "b": b})
        return out.logits, out.weights


@torch.no_grad()  # PyTorch 2.6 can't export a function of autograd with a dynamic batch
def test_export():
    """`len` of a tensor would make a constant of the batch."""
    module, batch = Positional().eval(), torch.export.Dim("batch", min=2)
    given = randn(5, 5), randn(5, 5, seed=1)
    program = torch.export.export(module, given, dynamic_shapes=({0: batch}, {0: batch}))
    given = randn(7, 5), randn(7, 5, seed=1)
    given[0][2] = torch.nan
    torch.testing.assert_close(program.module()(*given), module(*given))
