"""Dense prediction: each sample's means over its positions, which the ranking compares and the history records."""

import triton
import triton.language as tl

from .rows import widen


@triton.jit(do_not_specialize=["batch"])
def positions_kernel(
    weights, energy, losses, stats, sample_weights, sample_losses, counts_out, numerators, denominators,
    positions, batch, M: tl.constexpr, PB: tl.constexpr, RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """One program per sample and modality, the fused row being the last: sums and means over P positions.

    ``weights``, ``energy`` and ``losses`` are ``[M, B P]``; written are ``[M, B]``, the fractions ``[M + 1, B]``.
    """
    sample, m = (tl.program_id(0) // (M + 1)).to(tl.int64), (tl.program_id(0) % (M + 1)).to(tl.int64)
    num_rows = widen(batch) * positions
    first = m * num_rows + sample * positions
    of_modality = (m + tl.zeros((PB,), tl.int64)) < M
    weight_sum, weight_count = tl.zeros((PB,), tl.float64), tl.zeros((PB,), tl.float64)
    loss_sum, loss_count = tl.zeros((PB,), tl.float64), tl.zeros((PB,), tl.float64)
    numerator, denominator = tl.zeros((PB,), tl.float64), tl.zeros((PB,), tl.float64)
    start = tl.zeros((), tl.int64)
    while start < positions:
        lane = start + tl.arange(0, PB)
        inside = lane < positions
        counted = tl.load(energy + first + lane, inside & of_modality, other=float("inf")) < float("inf")
        weight = tl.load(weights + first + lane, counted, other=0.0)
        weight_sum += weight.to(tl.float64)
        weight_count += tl.where(counted, 1.0, 0.0).to(tl.float64)
        plain = tl.load(losses + first + lane, inside & of_modality, other=float("nan"))
        fused = tl.load(
            stats + SLOTS.fused_loss * num_rows + sample * positions + lane,
            inside & (of_modality == 0),
            other=float("nan"),
        )
        loss = tl.where(of_modality, plain, fused)
        some = loss == loss
        loss_sum += tl.where(some, loss, 0.0).to(tl.float64)
        loss_count += tl.where(some, 1.0, 0.0).to(tl.float64)
        if RULES.weighted or RULES.smoothing:
            numerator += tl.load(stats + SLOTS.numerator * num_rows + first + lane, inside, other=0.0).to(tl.float64)
            denominator += tl.load(stats + SLOTS.denominator * num_rows + first + lane, inside, other=0.0).to(
                tl.float64
            )
        start += PB
    place = m * batch + sample
    losses_here, losses_count = tl.sum(loss_sum, 0), tl.sum(loss_count, 0)
    if RULES.weighted or RULES.smoothing:
        tl.store(numerators + place, tl.sum(numerator, 0))
        tl.store(denominators + place, tl.sum(denominator, 0))
    else:
        tl.store(numerators + place, losses_here)
        tl.store(denominators + place, losses_count)
    if m < M:
        count = tl.sum(weight_count, 0)
        nothing = float("nan")
        tl.store(counts_out + place, count.to(ACC))
        tl.store(sample_weights + place, tl.where(count > 0, tl.sum(weight_sum, 0) / count, nothing).to(ACC))
        tl.store(sample_losses + place, tl.where(losses_count > 0, losses_here / losses_count, nothing).to(ACC))
