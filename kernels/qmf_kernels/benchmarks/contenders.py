"""What is timed: ways to compute one training step, each from the same numbers, and a copy of as many bytes.

A step is the objective forward, with ranking and the loss history's update, and the gradients of the logits. Contenders
keep a history of their own, made from the problem's, so that they take turns without disturbing each other.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import LossRule, Past, WeightRule, find_range, objective
from .plain import RANKING_WEIGHT, SHARPNESS, plain_objective

COUNT = 5  # visits of each sample so far
BATCHES = 8  # drawn beforehand, taken in turn


class Case(NamedTuple):
    """M, B, K, N and the logits' dtype, and which of the targets it answers to."""

    name: str
    kind: str  # "large", "small" or "growth"
    modalities: int
    batch: int
    classes: int
    samples: int
    dtype: torch.dtype


class Problem(NamedTuple):
    """A case's tensors on a device."""

    logits: list[Tensor]  # M of [B, K], which want gradients
    target: Tensor  # [B]
    indices: list[Tensor]  # BATCHES of [B]
    sums: Tensor  # [M, N] float64, COUNT losses of each sample


class Step(NamedTuple):
    """``run(i)`` takes batch i and returns the loss and the gradients; ``sums()`` is the history as it stands."""

    run: Callable[[int], tuple[Tensor, tuple[Tensor, ...]]]
    sums: Callable[[], Tensor]


def make_problem(case: Case, device: torch.device, seed: int = 0) -> Problem:
    """Random logits, and a history of losses spread about those that such logits have."""
    generator = torch.Generator(device).manual_seed(seed)
    logits = []
    for _ in range(case.modalities):
        x = torch.empty(case.batch, case.classes, device=device, dtype=case.dtype)
        logits.append(x.normal_(generator=generator).requires_grad_())
    target = torch.randint(case.classes, (case.batch,), generator=generator, device=device)
    indices = [torch.randperm(case.samples, generator=generator, device=device)[: case.batch] for _ in range(BATCHES)]
    # Wider than new losses, or every step would move the history's range, which a long training does not.
    spread = torch.rand(case.modalities, case.samples, generator=generator, device=device, dtype=torch.float64)
    return Problem(logits, target, indices, COUNT * 2 * max(3.0, math.log(case.classes)) * spread)


def ours(problem: Problem, backend: str | None) -> Step:
    """``qmf_kernels.objective``: forward, ranking, history and backward in as few launches as it takes."""
    num, device = len(problem.logits), problem.target.device
    alpha = torch.full((num,), -SHARPNESS, dtype=torch.float64, device=device)
    beta = torch.zeros_like(alpha)
    history = torch.stack([problem.sums, torch.full_like(problem.sums, COUNT)])
    low, span = (torch.empty(num, 1, dtype=torch.float64, device=device) for _ in range(2))
    find_range(history, low, span)
    weight_rule = WeightRule(None, alpha, beta, None)
    loss_rule = LossRule(ranking_weight=RANKING_WEIGHT, form="released")

    def run(batch: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        past = Past(
            *(history, low, span, None, problem.indices[batch]), start_epoch=1, minmax=True, ranks=True, records=True
        )
        inputs = (problem.logits, problem.target, None, None, weight_rule, loss_rule)
        loss = objective(*inputs, past=past, backend=backend, return_logits=False).loss
        return loss, torch.autograd.grad(loss, problem.logits)

    return Step(run, lambda: history[0])


def released(problem: Problem) -> Step:
    """The published training code's steps, trips to the host included."""
    from .released import LossHistory, released_objective

    histories = [LossHistory(problem.sums.shape[1]) for _ in problem.logits]
    for history, row in zip(histories, problem.sums, strict=True):
        history.sums = row.cpu().numpy().copy()

    def run(batch: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        loss = released_objective(problem.logits, problem.target, problem.indices[batch], histories, RANKING_WEIGHT)
        return loss, torch.autograd.grad(loss, problem.logits)

    return Step(run, lambda: torch.stack([torch.from_numpy(history.sums) for history in histories]))


def plain(problem: Problem, mode: str | None) -> Step:
    """The plain formulation, eager where ``mode`` is None, else under ``torch.compile(mode=mode)``."""
    sums = problem.sums.to(torch.promote_types(problem.logits[0].dtype, torch.float32), copy=True)
    run_plain: Any = plain_objective
    if mode is not None:
        dynamo: Any = torch._dynamo
        # As inside a model that is compiled whole: a CUDA graph need not copy the logits first.
        for tensor in (*problem.logits, problem.target, sums):
            dynamo.mark_static_address(tensor)
        run_plain = torch.compile(plain_objective, mode=mode, fullgraph=True, dynamic=False)

    def run(batch: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        if mode is not None:
            torch.compiler.cudagraph_mark_step_begin()
        loss = run_plain(problem.logits, problem.target, problem.indices[batch], sums)
        return loss, torch.autograd.grad(loss, problem.logits)

    return Step(run, lambda: sums)


def copy(problem: Problem) -> Step:
    """As many bytes as a step cannot do without: the logits read twice, their gradients written once."""
    size = 3 * sum(x.numel() for x in problem.logits) // 2
    source, target = (torch.zeros(size, dtype=x.dtype, device=x.device) for x in (problem.logits[0],) * 2)

    def run(batch: int) -> tuple[Tensor, tuple[Tensor, ...]]:
        return target.copy_(source), ()

    return Step(run, lambda: problem.sums)


OURS, RELEASED, EAGER, COMPILED, COPY = "ours", "released", "eager", "compiled", "copy"


def contenders(backend: str | None) -> dict[str, Callable[[Problem], Step]]:
    """By name, each from a problem to its step."""
    return {
        OURS: functools.partial(ours, backend=backend),
        RELEASED: released,
        EAGER: functools.partial(plain, mode=None),
        COMPILED: functools.partial(plain, mode="max-autotune"),
        f"{COMPILED}, no graphs": functools.partial(plain, mode="max-autotune-no-cudagraphs"),
        COPY: copy,
    }
