"""Training steps on hardware: their launches, no waiting, CUDA graphs, torch.compile, autocast, streams, devices."""

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, TrajectoryRankingLoss
from qmf_kernels.benchmarks.measure import capture

from . import gpu

pytestmark = gpu.needs_gpu

PLAIN: dict[str, Any] = {}
OPTIONS = {
    "plain": PLAIN,
    "all pairs": {"pairs": "all", "form": "margin"},
    "smoothed": {"label_smoothing": 0.1, "ignore_index": 1},
    "start epoch": {"start_epoch": 2, "rescale": None},
}


Make = Callable[[int, int], QualityAwareFusion]
RULES: dict[str, Make] = {
    "entropy": lambda m, _: QualityAwareFusion(m, uncertainty="entropy", normalize=True),
    "LogitNorm": lambda m, _: QualityAwareFusion(m, normalize_logits=0.1),
    "probabilities": lambda m, _: QualityAwareFusion(m, combine="probabilities"),
    "robust": QualityAwareFusion.robust,
}


def train(criterion: QMFLoss, rows: list[Tensor], target: Tensor, index: Tensor) -> Tensor:
    loss = criterion(rows, target, index).loss
    for x in rows:
        x.grad = None
    loss.backward()
    return loss.detach()


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_three_launches_for_any_number_of_modalities(options: dict[str, Any]) -> None:
    totals = set()
    for modalities in (1, 2, 4, 8):
        step = gpu.make_step(modalities, 1000, 100, **options)
        found = gpu.launches_of(lambda step=step: train(*step))
        assert gpu.ours(found) == {"forward": 1, "bookkeeping": 1, "backward": 1}, found.names
        totals.add((found.kernels, found.copies))
    assert len(totals) == 1, totals


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("shape", [(2, 32, 10), (3, 1000, 100)], ids=str)
def test_no_rule_waits_for_the_device(shape: tuple[int, int, int], rule: str) -> None:
    """What runs in PyTorch in front of the operators, too, and the statistics of ``robust``."""
    step = gpu.make_step(*shape, make=RULES[rule])
    train(*step)
    with gpu.no_waiting():
        train(*step)


def test_a_ready_uncertainty_takes_three_launches() -> None:
    """In a small batch too, whose uncertainty wants a gradient; and one to sum up those of alpha and beta."""
    for shape in ((3, 1000, 100), (2, 32, 10)):
        step = gpu.make_step(*shape, make=RULES["entropy"])
        found = gpu.launches_of(lambda step=step: train(*step))
        assert gpu.ours(found) == {"forward": 1, "bookkeeping": 1, "backward": 1}, found.names


def test_nothing_but_ours_and_the_gradient_of_the_loss_is_launched() -> None:
    """``backward()`` makes a tensor of 1."""
    step = gpu.make_step(3, 1000, 100)
    found = gpu.launches_of(lambda: train(*step))
    assert found.kernels - found.ours + found.copies <= 1, found.names


@pytest.mark.parametrize("shape", [(2, 256, 10), (2, 128, 19), (2, 32, 101), (2, 32, 3)], ids=str)
def test_one_launch_for_a_small_batch_and_one_for_its_scale(shape: tuple[int, int, int]) -> None:
    step = gpu.make_step(*shape)
    found = gpu.launches_of(lambda: train(*step))
    assert gpu.ours(found) == {"single": 1, "scale": 1}, found.names


def test_dense_prediction_takes_three_launches() -> None:
    """And PyTorch's, for each sample's means, which wait for nothing."""
    criterion = QMFLoss(QualityAwareFusion(2, class_dim=1).to(gpu.DEVICE), 50, return_logits=False).to(gpu.DEVICE)
    rows = [torch.randn(4, 7, 33, 20, device=gpu.DEVICE, requires_grad=True) for _ in range(2)]
    target, index = torch.randint(7, (4, 33, 20), device=gpu.DEVICE), torch.arange(4, device=gpu.DEVICE)
    found = gpu.launches_of(lambda: train(criterion, rows, target, index))
    assert gpu.ours(found) == {"forward": 1, "bookkeeping": 1, "backward": 1}, found.names
    with gpu.no_waiting():
        train(criterion, rows, target, index)


@pytest.mark.parametrize("pairs", ["adjacent", "all"])
@pytest.mark.parametrize("start_epoch", [1, 2])
def test_ranking_and_history_alone_wait_for_nothing(pairs: str, start_epoch: int) -> None:
    rank = TrajectoryRankingLoss(50, 2, pairs=pairs, start_epoch=start_epoch).to(gpu.DEVICE)
    weights, losses = (torch.rand(2, 16, device=gpu.DEVICE).requires_grad_() for _ in range(2))
    index = torch.arange(16, device=gpu.DEVICE)
    with gpu.no_waiting():
        for _ in range(3):
            rank(weights, losses, index).backward()


def test_fusion_alone_takes_one_launch_each_way() -> None:
    fusion = QualityAwareFusion(3).to(gpu.DEVICE)
    rows = [torch.randn(500, 40, device=gpu.DEVICE, requires_grad=True) for _ in range(3)]
    grad = torch.ones(500, 40, device=gpu.DEVICE)
    found = gpu.launches_of(lambda: torch.autograd.grad(fusion(rows).logits, rows, grad))
    assert gpu.ours(found) == {"forward": 1, "backward": 1}, found.names


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(2, 32, 10), (3, 1000, 100)], ids=str)
def test_no_step_waits_for_the_device(shape: tuple[int, int, int], options: dict[str, Any]) -> None:
    """The first step compiles; the others must go through."""
    step = gpu.make_step(*shape, **options)
    train(*step)
    with gpu.no_waiting():
        for _ in range(2):
            train(*step)


def test_the_large_case_needs_little_memory_above_inputs_and_gradients() -> None:
    """Under 1 % of them in float32, whatever M is."""
    for modalities in (2, 6):
        criterion, rows, target, index = gpu.make_step(modalities, 4096, 1000)
        train(criterion, rows, target, index)
        for x in rows:
            x.grad = None
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        train(criterion, rows, target, index)
        size = sum(x.numel() * x.element_size() for x in rows)
        above = torch.cuda.max_memory_allocated() - before - size
        assert above < 0.01 * 2 * size, f"{above} bytes above {2 * size}"


class Training:
    """A model of two linear heads, its criterion and optimiser, and inputs that stay where they are."""

    def __init__(self, batch: int, classes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.model = FusionModel({name: nn.Linear(16, classes) for name in ("a", "b")}).to(gpu.DEVICE)
        self.criterion = QMFLoss(self.model.fusion, 2 * batch).to(gpu.DEVICE)
        self.optimizer = torch.optim.SGD(self.model.parameters(), 0.5)
        self.x = torch.randn(2, batch, 16, generator=generator).to(gpu.DEVICE)
        self.target = (self.x[0, :, :3].argmax(1) % classes).contiguous()
        self.index = torch.arange(batch, device=gpu.DEVICE)

    def step(self) -> Tensor:
        self.optimizer.zero_grad(set_to_none=True)
        out = self.model({"a": self.x[0], "b": self.x[1]})
        loss: Tensor = self.criterion(out.unimodal_logits, self.target, self.index).loss
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def move_on(self, batch: int) -> None:
        """The next batch, into the same memory."""
        self.x.copy_(self.x.roll(1, 1))
        self.target.copy_(self.target.roll(1, 0))
        self.index.copy_((torch.arange(len(self.index), device=gpu.DEVICE) + 7 * batch) % (2 * len(self.index)))


@pytest.mark.parametrize("shape", [(32, 5), (1200, 40)], ids=str)
def test_a_captured_training_step_is_the_eager_one(shape: tuple[int, int]) -> None:
    """In one launch and in three: losses fall as they do without a graph, and the history advances."""
    torch.manual_seed(0)
    eager, graphed = Training(*shape), Training(*shape)
    graph, loss = capture(graphed.step)  # whose warm-up steps have trained
    graphed.model.load_state_dict(eager.model.state_dict())
    graphed.criterion.load_state_dict(eager.criterion.state_dict())
    losses = []
    for batch in range(6):
        expected = eager.step()
        graph.replay()
        torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-6)
        losses.append(loss.item())
        for training in (eager, graphed):
            training.move_on(batch)
    assert losses[-1] < losses[0]
    pasts = [training.criterion.ranking.trajectory for training in (graphed, eager)]
    assert pasts[0].count.sum() == 6 * 2 * shape[0]
    assert torch.equal(pasts[0].count, pasts[1].count)
    torch.testing.assert_close(pasts[0].total, pasts[1].total, rtol=1e-4, atol=1e-4)
    for x, y in zip(graphed.model.parameters(), eager.model.parameters(), strict=True):
        torch.testing.assert_close(x, y, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", [(2, 32, 10), (3, 1000, 100)], ids=str)
def test_compiled_without_a_graph_break(shape: tuple[int, int, int]) -> None:
    torch.compiler.reset()
    criterion, rows, target, index = gpu.make_step(*shape)
    compiled = torch.compile(copy.deepcopy(criterion), fullgraph=True)
    for _ in range(3):
        found, expected = (x(rows, target, index).loss for x in (compiled, criterion))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        for x, y in zip(torch.autograd.grad(found, rows), torch.autograd.grad(expected, rows), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-6)
    torch.compiler.reset()


def test_under_autocast_losses_are_those_of_the_logits_that_it_leaves() -> None:
    training = Training(64, 10)
    with torch.autocast(gpu.DEVICE.type, torch.bfloat16):
        out = training.model({"a": training.x[0], "b": training.x[1]})
        rows = out.unimodal_logits
        loss = training.criterion(rows, training.target, training.index).loss
    assert all(x.dtype == torch.bfloat16 for x in rows)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in training.model.parameters() if p.grad is not None)
    twin = QMFLoss(QualityAwareFusion(["a", "b"]), 128)
    expected = twin([x.detach().cpu().double() for x in rows], training.target.cpu(), training.index.cpu()).loss
    torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(2, 32, 10), (3, 1000, 100)], ids=str)
def test_on_another_stream(shape: tuple[int, int, int]) -> None:
    found = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        step = gpu.make_step(*shape)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            loss = train(*step)
        stream.synchronize()
        found.append([loss, *(x.grad for x in step[1])])
    assert all(torch.equal(x, y) for x, y in zip(*found, strict=True))


def test_on_a_second_device() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"needs two devices, and there is {torch.cuda.device_count()}")
    criterion, rows, target, index = gpu.make_step(3, 1000, 100)
    second = torch.device("cuda", 1)
    there = copy.deepcopy(criterion).to(second)
    there.fusion.to(second)
    others = [x.detach().to(second).requires_grad_() for x in rows]
    losses = train(criterion, rows, target, index), train(there, others, target.to(second), index.to(second))
    assert losses[1].device == second
    torch.testing.assert_close(losses[1].cpu(), losses[0].cpu())
    for x, y in zip(rows, others, strict=True):
        torch.testing.assert_close(x.grad.cpu(), y.grad.cpu())


BROKEN = """
import torch
from qmf_fusion import QMFLoss, QualityAwareFusion

criterion = QMFLoss(QualityAwareFusion(2).cuda(), 10).cuda()
rows = [torch.randn({batch}, 5).cuda().requires_grad_() for _ in range(2)]
target, index = torch.zeros({batch}, dtype=torch.int64).cuda(), torch.zeros({batch}, dtype=torch.int64).cuda()
{which}[1] = {value}
criterion(rows, target, index).loss.backward()
torch.cuda.synchronize()
"""


@pytest.mark.parametrize("batch", [4, 3000])
@pytest.mark.parametrize(("which", "value"), [("target", 5), ("target", -1), ("index", 10), ("index", -1)])
def test_what_is_out_of_range_stops_with_a_message(which: str, value: int, batch: int) -> None:
    """In a process of its own, which can't use the device any more."""
    code = BROKEN.format(which=which, value=value, batch=batch)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode != 0
    assert f"{which} must" in done.stdout + done.stderr
