"""The loss history (Eq. 14) in a kernel: reading a batch's means, recording its losses, keeping the means' range.

``past`` is float64 ``[2, M, B]``: a sample's kappa, NaN without a history; and how many losses it had, NaN where its
visits so far are too few for this one to be recorded.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .rows import widen


class Trajectory(NamedTuple):
    """Pointers as in ``qmf_kernels.trajectory``, and numbers; ``history`` is None where kappa alone is given."""

    kappa: Any  # [M, B] or None
    history: Any
    low: Any
    span: Any
    visits: Any
    index: Any
    num_samples: Any
    start_epoch: Any


@triton.jit
def read_history(trajectory, past, sample, wanted, batch, M: tl.constexpr, RULES: tl.constexpr):
    """``past`` of the samples ``[RB]``, before anybody records: a sample may stand in the batch twice."""
    if trajectory.history is None:
        for m in tl.static_range(M):
            place = m * batch + sample
            tl.store(past + place, tl.load(trajectory.kappa + place, wanted, other=0.0).to(tl.float64), wanted)
    else:
        index = tl.load(trajectory.index + sample, wanted, other=0)
        within = (index >= 0) & (index < trajectory.num_samples)
        tl.device_assert((wanted == 0) | within, "index must be within the trajectory's num_samples")
        there = wanted & within
        for m in tl.static_range(M):
            total, count = _sums(trajectory, m, index, there, M)
            mean = tl.where(count > 0, total / tl.where(count > 0, count, 1.0), float("nan"))
            if RULES.minmax:
                mean = (mean - tl.load(trajectory.low + m)) / tl.load(trajectory.span + m)
            tl.store(past + m * batch + sample, mean, wanted)
            if RULES.records:
                if trajectory.visits is not None:
                    visits = tl.load(trajectory.visits + index, there, other=0)
                    count = tl.where(visits >= trajectory.start_epoch - 1, count, float("nan"))
                tl.store(past + (M + m) * batch + sample, count, wanted)


@triton.jit(debug=True, do_not_specialize=["batch"])
def record_kernel(trajectory, losses, past, batch, M: tl.constexpr, SB: tl.constexpr, RULES: tl.constexpr):
    """One program: everything is read before anything is recorded."""
    lane = tl.arange(0, SB).to(tl.int64)
    start = tl.zeros((), tl.int64)
    while start < batch:
        read_history(trajectory, past, start + lane, start + lane < batch, batch, M, RULES)
        start += SB
    tl.debug_barrier()
    for m in range(M):
        moved = tl.zeros((), tl.int32)
        start = tl.zeros((), tl.int64)
        while start < batch:
            moved = tl.maximum(moved, record_samples(trajectory, past, losses, m, start + lane, batch, M, RULES))
            start += SB
        if moved > 0:
            tl.debug_barrier()
            find_range(trajectory, m, M)
    start = tl.zeros((), tl.int64)
    while start < batch:
        count_visits(trajectory, start + lane, batch)
        start += SB


@triton.jit
def record_samples(trajectory, past, losses, m, sample, batch, M: tl.constexpr, RULES: tl.constexpr):
    """Record a modality's losses of the samples ``[SB]``, and say whether its means' range may have moved (int32, 0 or
    1).
    """
    inside = sample < batch
    index = tl.load(trajectory.index + sample, inside, other=0)
    there = inside & (index >= 0) & (index < trajectory.num_samples)
    place = m * batch + sample
    loss = tl.load(losses + place, inside, other=0.0)
    kappa = tl.load(past + place, inside, other=0.0)
    count = tl.load(past + M * batch + place, inside, other=0.0)
    return _record(trajectory, m, kappa, count, loss, index, there, M, RULES)


@triton.jit
def count_visits(trajectory, sample, batch):
    """Where visits are counted, one more of the samples ``[SB]``."""
    if trajectory.visits is not None:
        inside = sample < batch
        index = tl.load(trajectory.index + sample, inside, other=0)
        there = inside & (index >= 0) & (index < trajectory.num_samples)
        tl.atomic_add(trajectory.visits + index, tl.full(index.shape, 1, tl.int64), there)


@triton.jit
def _sums(trajectory, m, index, there, M: tl.constexpr):
    num_samples = widen(trajectory.num_samples)
    place = trajectory.history + m * num_samples + index
    total = tl.load(place, there, other=0.0)
    count = tl.load(place + M * num_samples, there, other=0.0)
    return total, count


@triton.jit
def _record(trajectory, m, kappa, count_before, losses, index, there, M: tl.constexpr, RULES: tl.constexpr):
    low, span = tl.load(trajectory.low + m), tl.load(trajectory.span + m)
    losses = losses.to(tl.float64)
    finite = (losses == losses) & (tl.abs(losses) < float("inf"))
    adds = there & finite & (count_before == count_before)
    num_samples = widen(trajectory.num_samples)
    place = trajectory.history + m * num_samples + index
    total = tl.atomic_add(place, losses, adds)
    count = tl.atomic_add(place + M * num_samples, tl.where(adds, 1.0, 0.0).to(tl.float64), adds)
    before = kappa if RULES.minmax else (kappa - low) / span
    after = ((total + losses) / (count + 1) - low) / span
    # It has not while the samples lie strictly inside, before and after. A count that is not the one read means that
    # another of the batch has added to the same sample, whose sums then can't be told here.
    moved = (before <= 0) | (before >= 1) | (after <= 0) | (after >= 1) | (count != count_before)
    return tl.max(tl.where(adds & moved, 1, 0), 0)


@triton.jit
def find_range(trajectory, m, M: tl.constexpr):
    """Set a modality's ``low`` and ``span`` from the whole history, by one program."""
    BLOCK: tl.constexpr = 2048  # wide, as one program alone has to keep enough loads on their way
    tiny: tl.constexpr = 2.2250738585072014e-308
    lane = tl.arange(0, BLOCK)
    least = tl.full((BLOCK,), float("inf"), tl.float64)
    most = -least
    start = tl.zeros((), tl.int64)
    while start < trajectory.num_samples:
        index = start + lane
        total, count = _sums(trajectory, m, index, index < trajectory.num_samples, M)
        some = count > 0
        mean = total / tl.where(some, count, 1.0)
        least = tl.minimum(least, tl.where(some, mean, float("inf")))
        most = tl.maximum(most, tl.where(some, mean, -float("inf")))
        start += BLOCK
    low = tl.min(least, 0)
    span = tl.max(most, 0) - low
    tl.store(trajectory.low + m, low)
    tl.store(trajectory.span + m, tl.where(span > tiny, span, tiny))
