"""What a kernel is compiled for, as one constexpr record, and which statistics of rows it keeps."""

import functools
import itertools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..rules import LossRule, WeightRule
from .tiling import Block, Tiling

TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Slots(NamedTuple):
    """Where each statistic of the rows starts in ``stats`` ``[slots, R]``, in units of R. Every slot gets written."""

    top: int  # M + 1, the fused row's last: the largest logit
    log: int  # M + 1: log-sum-exp less that; NaN where a row does not count, or the fused row has no loss
    product: int  # M: <softmax(f), x[m]>
    tempered_top: int  # M: as top and log, of x / T
    tempered_log: int
    ruled: int  # M, with smoothing: the sum over the classes that are not ruled out of the class's weight times x[m]
    mass: int  # 1: the sum of the classes' weights
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
    slots = plan_slots(num, rule, loss_rule)
    return config._replace(losses=True, slots=slots, form=loss_rule.form, pairs=loss_rule.pairs)


def plan_slots(num: int, rule: WeightRule, loss_rule: LossRule) -> Slots:
    """For M modalities; no slots for what the rules do not need."""
    tempered, smoothing = num * (rule.temperature is not None), int(bool(loss_rule.label_smoothing))
    sizes = {
        **{"top": num + 1, "log": num + 1, "product": num},
        **{"tempered_top": tempered, "tempered_log": tempered},
        **{"ruled": num * smoothing, "mass": smoothing},
    }
    starts = dict(zip(sizes, itertools.accumulate(sizes.values(), initial=0), strict=False))
    return Slots(**starts, size=sum(sizes.values()))


@functools.lru_cache(maxsize=256)
def split_number(value: float) -> tuple[float, float]:
    """A number in two parts: kernels take float32, and one part would leave float64 the digits of that."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@triton.jit
def number(parts, ACC: tl.constexpr):
    return tl.full((), parts[0], ACC) + tl.full((), parts[1], ACC)
