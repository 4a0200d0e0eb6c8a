"""What a kernel is compiled for, as one constexpr record, and where the statistics of rows stand in memory."""

import functools
import struct
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from ..rules import LossRule, WeightRule
from .tiling import Block, Tiling

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Slots(NamedTuple):
    """Where each statistic of the rows starts in ``stats`` ``[slots, R]``, in units of R."""

    top: int  # M, largest logit
    log: int  # M, log-sum-exp less that; NaN in a row that does not count
    product: int  # M, <softmax(f), x[m]>
    fused_top: int
    fused_log: int  # NaN where the fused row has no loss
    fused_loss: int
    tempered_top: int  # M, as top and log, of x / T
    tempered_log: int
    ruled: int  # M, sum of the classes' weights times the logits, over the classes that are not ruled out
    numerator: int  # M + 1, a row's share in its mean's numerator
    denominator: int  # M + 1
    mass: int  # sum of the classes' weights
    size: int


class Config(NamedTuple):
    """The one constexpr of every kernel. Those in capitals are sizes (M and ACC aside, powers of two).

    Inside a kernel, assign a field to a ``tl.constexpr`` before it bounds a ``tl.static_range`` or shapes a tensor:
    Triton 3.6 takes it for a plain number there.
    """

    M: int
    ACC: Any  # the dtype of sums
    DIMS: int = 1  # row dimensions
    ROWS: int = 1  # rows of a program
    CLASSES: int = 1  # of a tile
    TILES: int = 1  # of a row
    SAMPLES: int = 1  # of a program that ranks
    PARTNERS: int = 1  # of a sample, compared at a time
    SUMS: int = 128  # programs' sums that are read at a time
    slots: Slots | None = None
    nonnegative: bool = False
    normalize: bool = False
    detach: bool = False
    unit: bool = False  # the gradient that comes to the loss is 1
    form: str = "paper"
    pairs: str = "adjacent"
    minmax: bool = False
    records: bool = False

    def tiled(self, tiling: Tiling, dims: int) -> "Config":
        return self._replace(DIMS=dims, ROWS=tiling.rows, CLASSES=tiling.classes, TILES=tiling.tiles)

    def blocked(self, block: Block) -> "Config":
        return self._replace(SAMPLES=block.samples, PARTNERS=block.partners)


def make_config(num: int, dtype: torch.dtype, rule: WeightRule, loss_rule: LossRule | None = None) -> Config:
    """For the rules of M modalities; without a ``loss_rule``, of fusion alone."""
    config = Config(
        M=num,
        ACC=accumulator(dtype),
        nonnegative=rule.nonnegative or rule.normalize,
        normalize=rule.normalize,
        detach=rule.detach,
    )
    if loss_rule is None:
        return config
    return config._replace(slots=plan_slots(num, rule, loss_rule), form=loss_rule.form, pairs=loss_rule.pairs)


def accumulator(dtype: torch.dtype) -> Any:
    return _TYPES[dtype]


def has_shares(loss_rule: LossRule) -> bool:
    """Whether rows have shares of their own in the mean losses; else each has as much."""
    return loss_rule.class_weight is not None or bool(loss_rule.label_smoothing)


def plan_slots(num: int, rule: WeightRule, loss_rule: LossRule) -> Slots:
    """For M modalities; nothing for what the rules do not need."""
    return _plan_slots(num, rule.temperature is not None, bool(loss_rule.label_smoothing), has_shares(loss_rule))


@functools.lru_cache(maxsize=256)
def _plan_slots(num: int, tempered: bool, smoothing: bool, shares: bool) -> Slots:
    sizes = {
        **dict.fromkeys(("top", "log", "product"), num),
        **dict.fromkeys(("fused_top", "fused_log", "fused_loss"), 1),
        **dict.fromkeys(("tempered_top", "tempered_log"), num * tempered),
        "ruled": num * smoothing,
        **dict.fromkeys(("numerator", "denominator"), (num + 1) * shares),
        "mass": int(smoothing),
    }
    starts, end = {}, 0
    for name, size in sizes.items():
        starts[name] = end
        end += size
    return Slots(**starts, size=end)


@functools.lru_cache(maxsize=256)
def split_number(value: float) -> tuple[float, float]:
    """A number in two parts: kernels take float32, and one part would leave float64 the digits of that."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@triton.jit
def number(parts, ACC: tl.constexpr):
    return tl.full((), parts[0], ACC) + tl.full((), parts[1], ACC)
