"""Dense prediction: each sample's means over its positions, which the ranking compares and the history records."""

import torch
import triton
import triton.language as tl

from .config import Config
from .launch import launch
from .memory import Memory
from .rows import widen


@triton.jit(do_not_specialize=["batch"])
def positions_kernel(rows, samples, positions, batch, CONFIG: tl.constexpr):
    """One program per sample and modality, the fused row being the last: sums and means over P positions.

    ``rows`` and ``samples`` are ``Memory``, of B P rows and of as many samples' means as B.
    """
    BLOCK: tl.constexpr = 1024
    programs = CONFIG.M + 1
    sample, m = (tl.program_id(0) // programs).to(tl.int64), (tl.program_id(0) % programs).to(tl.int64)
    first = m * (widen(batch) * positions) + sample * positions
    zero = tl.zeros((BLOCK,), tl.float64)
    weight_sum, weight_count, loss_sum, loss_count, numerator, denominator = zero, zero, zero, zero, zero, zero
    start = tl.zeros((), tl.int64)
    while start < positions:
        lane = start + tl.arange(0, BLOCK)
        inside = lane < positions
        counted = tl.load(rows.energy + first + lane, inside & (m < CONFIG.M), other=float("inf")) < float("inf")
        weight_sum += tl.load(rows.weights + first + lane, counted, other=0.0).to(tl.float64)
        weight_count += tl.where(counted, 1.0, 0.0).to(tl.float64)
        loss = tl.load(rows.losses + first + lane, inside, other=float("nan"))
        loss_sum += tl.where(loss == loss, loss, 0.0).to(tl.float64)
        loss_count += tl.where(loss == loss, 1.0, 0.0).to(tl.float64)
        if rows.numerator is not None:
            numerator += tl.load(rows.numerator + first + lane, inside, other=0.0).to(tl.float64)
            denominator += tl.load(rows.denominator + first + lane, inside, other=0.0).to(tl.float64)
        start += BLOCK
    if rows.numerator is None:
        numerator, denominator = loss_sum, loss_count
    place = m * batch + sample
    tl.store(samples.numerator + place, tl.sum(numerator, 0))
    tl.store(samples.denominator + place, tl.sum(denominator, 0))
    _store_mean(samples.losses + place, tl.sum(loss_sum, 0), tl.sum(loss_count, 0), CONFIG)
    if m < CONFIG.M:
        count = tl.sum(weight_count, 0)
        _store_mean(samples.weights + place, tl.sum(weight_sum, 0), count, CONFIG)
        tl.store(samples.positions + place, count.to(CONFIG.ACC))


@triton.jit
def _store_mean(pointer, total, count, CONFIG: tl.constexpr):
    """NaN of nothing."""
    tl.store(pointer, tl.where(count > 0, total / count, float("nan")).to(CONFIG.ACC))


def sample_means(rows: Memory, batch: int, config: Config) -> Memory:
    """From the memory of B P rows to that of B samples: one launch."""
    new, num = rows.energy.new_empty, config.M
    samples = rows._replace(
        weights=new((num, batch)),
        losses=new((num + 1, batch)),
        numerator=new((num + 1, batch), dtype=torch.float64),
        denominator=new((num + 1, batch), dtype=torch.float64),
        positions=new((num, batch)),
    )
    arguments = (rows, samples, rows.losses.shape[1] // batch, batch)
    launch(positions_kernel, batch * (num + 1), 8, rows.energy.device, *arguments, config=config)
    return samples
