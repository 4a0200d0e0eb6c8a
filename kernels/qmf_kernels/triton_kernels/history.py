"""The loss history (Eq. 14) in a kernel: reading a batch's means, recording its losses, keeping the means' range.

``past`` is float64 ``[2, M, B]``: a sample's kappa, NaN without a history; and how many losses it had, NaN where its
visits so far are too few for this one to be recorded.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..rules import Past
from .rows import widen


class Trajectory(NamedTuple):
    """Pointers and numbers as in ``rules.Past``."""

    history: Any
    low: Any
    span: Any
    visits: Any
    index: Any
    num_samples: Any
    start_epoch: Any


def make_trajectory(past: Past) -> Trajectory:
    return Trajectory(
        history=past.history,
        low=past.low,
        span=past.span,
        visits=past.visits,
        index=past.samples.contiguous(),
        num_samples=past.history.shape[2],
        start_epoch=past.start_epoch,
    )


@triton.jit
def read_history(trajectory, memory, sample, wanted, batch, CONFIG: tl.constexpr):
    """Write the memory's ``past`` of the samples ``[ROWS]`` that are ``wanted``."""
    M: tl.constexpr = CONFIG.M
    index = tl.load(trajectory.index + sample, wanted, other=0)
    within = (index >= 0) & (index < trajectory.num_samples)
    tl.device_assert((wanted == 0) | within, "index must be within the trajectory's num_samples")
    there = wanted & within
    early = wanted & (wanted == 0)
    if CONFIG.records and trajectory.visits is not None:
        visits = tl.load(trajectory.visits + index, there, other=0)
        early = there & (visits < trajectory.start_epoch - 1)
        if tl.max(early.to(tl.int32), 0) > 0:
            visits += _count_earlier(trajectory, index, sample, batch)
            early = there & (visits < trajectory.start_epoch - 1)
    for m in tl.static_range(M):
        total, count = _sums(trajectory, m, index, there, CONFIG)
        mean = tl.where(count > 0, total / tl.where(count > 0, count, 1.0), float("nan"))
        if CONFIG.minmax:
            mean = (mean - tl.load(trajectory.low + m)) / tl.load(trajectory.span + m)
        tl.store(memory.past + m * batch + sample, mean, wanted)
        if CONFIG.records:
            tl.store(memory.past + (CONFIG.M + m) * batch + sample, tl.where(early, float("nan"), count), wanted)


@triton.jit
def _count_earlier(trajectory, index, sample, batch):
    """How many times samples ``[ROWS]`` stand in the batch before, int64: each of them is a visit too."""
    BLOCK: tl.constexpr = 32
    count = index * 0
    start = tl.zeros((), tl.int64)
    while start < batch:
        other = start + tl.arange(0, BLOCK)
        same = index[:, None] == tl.load(trajectory.index + other, other < batch, other=-1)[None, :]
        count += tl.sum((same & (other[None, :] < sample[:, None])).to(tl.int64), 1)
        start += BLOCK
    return count


@triton.jit
def record_samples(trajectory, memory, m, sample, batch, CONFIG: tl.constexpr):
    """Record a modality's losses of the samples ``[SAMPLES]``, and say whether its means' range may have moved (int32,
    0 or 1).
    """
    index, there = _read_index(trajectory, sample, batch)
    kappa = tl.load(memory.past + m * batch + sample, there, other=0.0)
    count_before = tl.load(memory.past + (CONFIG.M + m) * batch + sample, there, other=0.0)
    loss = tl.load(memory.losses + m * batch + sample, there, other=0.0).to(tl.float64)
    low, span = tl.load(trajectory.low + m), tl.load(trajectory.span + m)
    finite = (loss == loss) & (tl.abs(loss) < float("inf"))
    adds = there & finite & (count_before == count_before)
    num_samples = widen(trajectory.num_samples)
    place = trajectory.history + m * num_samples + index
    total = tl.atomic_add(place, loss, adds)
    count = tl.atomic_add(place + CONFIG.M * num_samples, tl.where(adds, 1.0, 0.0).to(tl.float64), adds)
    before = kappa if CONFIG.minmax else (kappa - low) / span
    after = ((total + loss) / (count + 1) - low) / span
    # It has not while the samples lie strictly inside, before and after. A count that is not the one read means that
    # another of the batch has added to the same sample, whose sums then can't be told here.
    moved = (before <= 0) | (before >= 1) | (after <= 0) | (after >= 1) | (count != count_before)
    return tl.max(tl.where(adds & moved, 1, 0), 0)


@triton.jit
def count_visits(trajectory, sample, batch):
    """Where visits are counted, one more of the samples ``[SAMPLES]``."""
    if trajectory.visits is not None:
        index, there = _read_index(trajectory, sample, batch)
        tl.atomic_add(trajectory.visits + index, tl.full(index.shape, 1, tl.int64), there)


@triton.jit
def _read_index(trajectory, sample, batch):
    """The samples' places in the history, and which have one."""
    index = tl.load(trajectory.index + sample, sample < batch, other=-1)
    return index, (index >= 0) & (index < trajectory.num_samples)


@triton.jit
def _sums(trajectory, m, index, there, CONFIG: tl.constexpr):
    """Of the losses recorded, and their count."""
    num_samples = widen(trajectory.num_samples)
    place = trajectory.history + m * num_samples + index
    return tl.load(place, there, other=0.0), tl.load(place + CONFIG.M * num_samples, there, other=0.0)


@triton.jit
def find_range(trajectory, m, CONFIG: tl.constexpr):
    """Set a modality's ``low`` and ``span`` from the whole history, by one program."""
    BLOCK: tl.constexpr = 2048  # wide, as one program alone has to keep enough loads on their way
    tiny: tl.constexpr = 2.2250738585072014e-308
    lane = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), float("inf"), tl.float64)
    most = -least
    start = tl.zeros((), tl.int64)
    while start < trajectory.num_samples:
        index = start + lane
        total, count = _sums(trajectory, m, index, index < trajectory.num_samples, CONFIG)
        some = count > 0
        mean = total / tl.where(some, count, 1.0)
        least = tl.minimum(least, tl.where(some, mean, float("inf")))
        most = tl.maximum(most, tl.where(some, mean, -float("inf")))
        start += BLOCK
    low = tl.min(least, 0)
    span = tl.max(most, 0) - low
    tl.store(trajectory.low + m, low)
    tl.store(trajectory.span + m, tl.where(span > tiny, span, tiny))
