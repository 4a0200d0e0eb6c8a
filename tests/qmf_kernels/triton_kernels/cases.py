"""Random inputs for the kernels, launches into poisoned memory, and the comparison of errors."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

from qmf_kernels.eager.fusion import accumulate_dtype
from qmf_kernels.rules import FORMS, PAIRS, LossRule, ObjectiveOptions, WeightRule


def bounded(examples: int) -> settings:
    """The same examples in every run, so that what passes here passes there; none is shrunk, for each takes a while."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.explicit, Phase.generate),
        report_multiple_bugs=False,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


def few_and_many(few: int, many: int, *strategies: Any) -> Any:
    """From a property to two tests of it: of few examples, and a slow one of many."""

    def tests(test: Any) -> tuple[Any, Any]:
        return bounded(few)(given(*strategies)(test)), pytest.mark.slow(bounded(many)(given(*strategies)(test)))

    return tests


LAYOUTS = ("contiguous", "class first", "sliced", "expanded", "reversed", "shifted")
VALUES = ("plain", "ties", "huge", "broken")
HALVES = (torch.float16, torch.bfloat16)
DTYPES = (
    (torch.float32,),
    (torch.float64,),
    (torch.bfloat16,),
    (torch.float16,),
    (torch.bfloat16, torch.float32, torch.float16),
    (torch.float32, torch.float64),
)


class Case(NamedTuple):
    """A launcher's inputs."""

    logits: list[Tensor]
    target: Tensor
    kappa: Tensor | None
    present: Tensor | None
    rule: WeightRule
    loss_rule: LossRule

    def __repr__(self) -> str:
        heads = [(str(x.dtype), tuple(x.shape), x.stride()) for x in self.logits]
        return f"Case({heads}, {self.present is not None=}, {self.kappa is not None=}, {self.rule}, {self.loss_rule})"

    @property
    def given(self) -> ObjectiveOptions:
        """What the objective takes beside the logits."""
        return ObjectiveOptions(self.target, self.kappa, self.present, self.rule, self.loss_rule)

    @property
    def wide(self) -> "Case":
        """The same numbers in float64, whose results count as the truth."""
        return self.at(torch.float64)

    @property
    def eager(self) -> "Case":
        """The same numbers in the dtype that kernels accumulate in."""
        return self.at(accumulate_dtype(self.logits))

    def at(self, dtype: torch.dtype) -> "Case":
        logits = [x.to(dtype).contiguous() for x in self.logits]
        given = {name: x.to(dtype).contiguous() for name, x in self.rule._asdict().items() if isinstance(x, Tensor)}
        return self._replace(logits=logits, rule=self.rule._replace(**given))

    def tensors(self) -> list[Tensor]:
        parts = (self.logits, self.rule, self.loss_rule, (self.target, self.kappa, self.present))
        return [x for part in parts for x in part if isinstance(x, Tensor)]


def lay(x: Tensor, layout: str) -> Tensor:
    """The same numbers ``[*, K]`` at other places; ``expanded`` repeats the first sample's."""
    if layout == "class first" and x.dim() > 1:
        return x.movedim(-1, 1).contiguous().movedim(1, -1)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:-1], 2 * x.shape[-1] + 1), torch.nan)
        wide[..., 1::2] = x
        return wide[..., 1::2]
    if layout == "expanded" and x.dim() > 1:
        return x[:1].clone().expand(x.shape)
    if layout == "reversed":
        return x.permute(*reversed(range(x.dim()))).contiguous().permute(*reversed(range(x.dim())))
    if layout == "shifted":
        return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
    return x


def fill(shape: tuple[int, ...], values: str, generator: torch.Generator) -> Tensor:
    x = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    if values == "ties":
        return x.round()
    if values == "huge":
        return (x * 3000).clamp(-10_000, 10_000)
    if values == "broken":
        kind = torch.randint(12, shape[:-1], generator=generator)
        column = torch.randint(shape[-1], shape[:-1], generator=generator).unsqueeze(-1)
        for number, value in enumerate((torch.nan, torch.inf, -torch.inf)):
            there = torch.zeros(shape, dtype=torch.bool).scatter_(-1, column, (kind == number).unsqueeze(-1))
            x = x.masked_fill(there, value)
        x = x.masked_fill((kind == 3).unsqueeze(-1), -torch.inf)
        x = x.masked_fill((kind == 4).unsqueeze(-1), torch.nan)
    return x


@st.composite
def cases(
    draw: Any,
    batches: tuple[int, ...],
    classes: tuple[int, ...],
    positions: tuple[Any, ...] = ((),),
) -> Case:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    rand = lambda *shape: torch.rand(shape, generator=generator, dtype=torch.float64)  # noqa: E731
    num, num_classes = draw(st.sampled_from((2, 3, 1, 5))), draw(st.sampled_from(classes))
    rows = (draw(st.sampled_from(batches)), *draw(st.sampled_from(positions)))
    dtypes = itertools.cycle(draw(st.sampled_from(DTYPES)))
    values = draw(st.sampled_from(VALUES))
    logits = [
        lay(fill((*rows, num_classes), values, generator).to(next(dtypes)), draw(st.sampled_from(LAYOUTS)))
        for _ in range(num)
    ]
    dtype = accumulate_dtype(logits)
    one_in = lambda n: draw(st.integers(1, n)) == n  # noqa: E731

    target = torch.randint(num_classes, rows, generator=generator)
    ignore_index = draw(st.sampled_from((-100, 0)))
    if one_in(2):
        target[rand(*rows) < 0.3] = ignore_index
    if one_in(4):
        target = torch.stack([target, target], -1)[..., 0]
    present = None
    if one_in(2):
        present = lay(rand(*rows, num) > 0.3, draw(st.sampled_from(("contiguous", "expanded")))).movedim(-1, 0)
    kappa = None
    if not one_in(4):
        kappa = rand(num, rows[0]).float().to(draw(st.sampled_from((torch.float32, torch.float64))))
        kappa[rand(num, rows[0]) < 0.2] = torch.nan
    uncertainty = None
    if one_in(3):
        uncertainty = lay(2 * rand(num, *rows).to(dtype) - 1, draw(st.sampled_from(("contiguous", "reversed"))))
    rule = WeightRule(
        uncertainty=uncertainty,
        alpha=-0.1 - rand(num).float(),
        beta=rand(num).float(),
        temperature=0.25 + 2 * rand(num).float() if one_in(3) else None,
        nonnegative=one_in(3),
        normalize=one_in(3),
        detach=one_in(3),
    )
    class_weight = None
    if one_in(3):
        class_weight = torch.where(rand(num_classes) < 0.2, 0, rand(num_classes)).float()
    loss_rule = LossRule(
        class_weight=class_weight,
        label_smoothing=draw(st.sampled_from((0.0, 0.1))),
        ignore_index=ignore_index,
        ranking_weight=draw(st.sampled_from((0.1, 0.7, 0.0))),
        form=draw(st.sampled_from(FORMS)),
        pairs=draw(st.sampled_from(PAIRS)),
    )
    return Case(logits, target, kappa, present, rule, loss_rule)


@contextlib.contextmanager
def poisoned(number: float) -> Iterator[None]:
    """Memory that is asked for holds ``number``, so that what nobody writes is seen."""
    empty, empty_like, new_empty = torch.empty, torch.empty_like, Tensor.new_empty

    def spoil(make: Any) -> Any:
        def made(*args: Any, **kwargs: Any) -> Tensor:
            out = make(*args, **kwargs)
            return out.fill_(number if out.is_floating_point() else 12345)

        return made

    with (
        mock.patch.object(torch, "empty", spoil(empty)),
        mock.patch.object(torch, "empty_like", spoil(empty_like)),
        mock.patch.object(Tensor, "new_empty", spoil(new_empty)),
    ):
        yield


@contextlib.contextmanager
def backwards() -> Iterator[None]:
    """Programs run from the last to the first: none may need what another of its launch writes."""
    from triton.runtime.interpreter import interpreter_builder as builder

    forwards = builder.set_grid_idx

    def set_grid_idx(x: int, y: int, z: int) -> None:
        forwards(builder.grid_dim[0] - 1 - x, y, z)

    with mock.patch.object(builder, "set_grid_idx", set_grid_idx):
        yield


def same(x: Tensor | None, y: Tensor | None) -> bool:
    """Bit for bit, every NaN being one."""
    if x is None or y is None:
        return x is y
    return x.dtype == y.dtype and torch.equal(x.isnan(), y.isnan()) and torch.equal(x.nan_to_num(), y.nan_to_num())


def assert_errors_close(name: str, ours: Tensor, eager: Tensor, truth: Tensor, size: float = 1.0) -> None:
    """Our largest error is at most four times eager PyTorch's, or what some roundings of the largest value make.

    ``size``: the largest number that went in, whose roundings remain where float64 can be compared with itself alone.
    """
    assert ours.shape == truth.shape, name
    assert torch.equal(ours.isnan(), truth.isnan()), f"{name}: NaN at other places\n{ours}\n{truth}"
    beyond = ours.isinf() & (truth.abs() > 0.99 * torch.finfo(ours.dtype).max)  # of what the dtype holds
    truth = torch.where(beyond, truth.sign() * torch.inf, truth)
    infinite = truth.isinf()
    assert torch.equal(ours.double()[infinite], truth.double()[infinite]), f"{name}: infinite elsewhere"
    finite = torch.isfinite(truth) & torch.isfinite(ours)
    assert torch.equal(finite | infinite | truth.isnan(), torch.ones_like(finite)), (
        f"{name}: not finite\n{ours}\n{truth}"
    )
    if not finite.any():
        return
    dtype = ours.dtype
    ours, eager, truth = (x.double()[finite] for x in (ours, eager.to(ours.dtype), truth))
    error, allowed = (ours - truth).abs().max().item(), (eager - truth).abs().max().item()
    largest = truth.abs().max().item()
    # Two roundings of the largest value: the interpreter truncates to bfloat16 what a GPU rounds.
    floor = 2 * torch.finfo(dtype).eps * largest + 1024 * torch.finfo(torch.float64).eps * size
    assert error <= 4 * allowed + floor, f"{name}: error {error:.3g}, eager's {allowed:.3g}, largest {largest:.3g}"
