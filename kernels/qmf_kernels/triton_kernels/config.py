"""What a kernel is compiled for, as one constexpr record, and which statistics of rows it keeps."""

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..rules import LossRule, WeightRule
from .tiling import Block, Tiling

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Slots(NamedTuple):
    """Which of the rows' statistics ``[S, M + 1, R]`` is which; the fused row's come after the modalities'."""

    top: int  # the largest logit
    log: int  # log-sum-exp less that; NaN where a row does not count, or the fused row has no loss
    product: int  # <softmax(f), x[m]>; nothing of the fused row
    tempered_top: int  # as top and log, of x / T; nothing of the fused row
    tempered_log: int
    ruled: int  # with smoothing: the sum over the classes that are not ruled out of the class's weight times x[m]
    mass: int  # the fused row's: the sum of the classes' weights
    size: int


class Config(NamedTuple):
    """The one constexpr of every kernel.

    Inside a kernel, assign a field to a ``tl.constexpr`` before it bounds a ``tl.static_range`` or shapes a tensor:
    Triton 3.6 takes it for a plain number there. For its sake, too, records hold no records, and no kernel asks whether
    a whole record is None.
    """

    M: int
    ACC: Any  # the dtype of sums
    DIMS: int = 1  # row dimensions
    tile: Tiling = Tiling(rows=1, classes=1, tiles=1, warps=4)
    block: Block = Block(samples=1, partners=1, warps=4)
    slots: Slots | None = None
    losses: bool = False  # there are labels; else fusion alone
    nonnegative: bool = False
    normalize: bool = False
    detach: bool = False
    unit: bool = False  # the gradient that comes to the loss is 1
    form: str = "paper"
    pairs: str = "adjacent"
    reads: bool = False  # there is a history
    minmax: bool = False
    records: bool = False


def make_config(num: int, dtype: torch.dtype, rule: WeightRule, loss_rule: LossRule | None = None) -> Config:
    """For the rules of M modalities; without a ``loss_rule``, of fusion alone."""
    clamps = rule.nonnegative or rule.normalize
    config = Config(M=num, ACC=TYPES[dtype], nonnegative=clamps, normalize=rule.normalize, detach=rule.detach)
    if loss_rule is None:
        return config
    slots = plan_slots(rule, loss_rule)
    return config._replace(losses=True, slots=slots, form=loss_rule.form, pairs=loss_rule.pairs)


def plan_slots(rule: WeightRule, loss_rule: LossRule) -> Slots:
    """No room for what the rules do not need."""
    first = 3
    then = first + 2 * (rule.temperature is not None)
    size = then + 2 * bool(loss_rule.label_smoothing)
    return Slots(0, 1, 2, tempered_top=first, tempered_log=first + 1, ruled=then, mass=then + 1, size=size)


@functools.lru_cache(maxsize=256)
def split_number(value: float) -> tuple[float, float]:
    """A number in two parts: kernels take float32, and one part would leave float64 the digits of that."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@triton.jit
def number(parts, ACC: tl.constexpr):
    return tl.full((), parts[0], ACC) + tl.full((), parts[1], ACC)
