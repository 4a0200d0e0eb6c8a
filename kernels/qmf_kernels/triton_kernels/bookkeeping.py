"""Between forward and backward: the ranking, every mean, and the loss history (Eq. 14 to 18), in one launch.

Each program takes SB samples: it ranks them, records their losses and sums up their shares in the means. The last one
to finish, found by counting, adds the programs' sums in their order, so that results do not depend on who was last.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .history import count_visits, find_range, record_samples
from .ranking import count_pairs, rank_adjacent, rank_all
from .rows import number, widen


class Samples(NamedTuple):
    """Pointers to what the forward left of each sample, ``[M, B]``; the fused row's ``[B]``."""

    weights: Any
    losses: Any  # NaN where there is none
    fused_loss: Any
    past: Any
    numerator: Any  # [M + 1, B], or None where the losses themselves are
    denominator: Any
    positions: Any  # [M, B], how many count, or None for one each


class Results(NamedTuple):
    """Pointers to the scalars, and to what the backward needs."""

    loss: Any
    fused_loss: Any
    unimodal_losses: Any  # [M]
    ranking: Any
    inverse: Any  # [M + 1], one over each mean's denominator
    ranking_grad: Any  # [M, B], or None without ranking


@triton.jit(debug=True, do_not_specialize=["batch"])
def bookkeeping_kernel(
    samples, results, trajectory, partial, counter, batch, ranking_weight,
    M: tl.constexpr, SB: tl.constexpr, JB: tl.constexpr, GB: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """SB samples per program; ``counter`` is int32, 0."""
    program, programs = tl.program_id(0), tl.num_programs(0)
    book_samples(program, programs, samples, results, trajectory, partial, batch, M, SB, JB, RULES, ACC)
    # All of the program's writes before its mark, all marks before the last one's reads.
    tl.debug_barrier()
    before = tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        tl.debug_barrier()
        finish_sums(results, trajectory, partial, programs, batch, ranking_weight, M, GB, RULES, ACC)


@triton.jit
def book_samples(
    program, programs, samples, results, trajectory, partial, batch,
    M: tl.constexpr, SB: tl.constexpr, JB: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Block ``program`` of SB samples; its sums go into ``partial``, float64 ``[3 M + 3, programs]``: the hinges,
    for each modality whether the history's range has moved, M + 1 numerators and as many denominators.
    """
    batch = widen(batch)
    sample = widen(program) * SB + tl.arange(0, SB)
    inside = sample < batch
    num_pairs = count_pairs(batch, RULES)
    hinges = tl.zeros((), tl.float64)
    for m in range(M):
        if results.ranking_grad is not None:
            if RULES.pairs == "adjacent":
                total, grad = rank_adjacent(
                    samples.weights, samples.past, samples.losses, m, sample, inside, batch, RULES, ACC
                )
            else:
                total, grad = rank_all(
                    samples.weights, samples.past, samples.losses, m, sample, inside, batch, JB, RULES, ACC
                )
            hinges += total
            grad = grad / num_pairs.to(ACC)
            if samples.positions is not None:
                count = tl.load(samples.positions + m * batch + sample, inside, other=1.0)
                grad = grad / tl.where(count > 0, count, 1.0)
            tl.store(results.ranking_grad + m * batch + sample, grad, inside)
    tl.store(partial + program, hinges)
    if RULES.records:
        for m in range(M):
            moved = record_samples(trajectory, samples.past, samples.losses, m, sample, batch, M, RULES)
            tl.store(partial + (1 + m) * programs + program, moved.to(tl.float64))
        count_visits(trajectory, sample, batch)
    for m in range(M + 1):
        numerator, denominator = _shares(samples, m, sample, inside, batch, M, ACC)
        tl.store(partial + (1 + M + m) * programs + program, numerator)
        tl.store(partial + (2 + 2 * M + m) * programs + program, denominator)


@triton.jit
def _shares(samples, m, sample, inside, batch, M: tl.constexpr, ACC: tl.constexpr):
    """A block's sums of numerators and denominators, float64."""
    if samples.numerator is not None:
        numerator = tl.load(samples.numerator + m * batch + sample, inside, other=0.0)
        denominator = tl.load(samples.denominator + m * batch + sample, inside, other=0.0)
    else:
        of_modality = (m + tl.zeros_like(sample)) < M
        loss = tl.load(samples.losses + m * batch + sample, inside & of_modality, other=float("nan"))
        fused = tl.load(samples.fused_loss + sample, inside & (of_modality == 0), other=float("nan"))
        loss = tl.where(of_modality, loss, fused)
        numerator = tl.where(loss == loss, loss, 0.0)
        denominator = tl.where(loss == loss, 1.0, 0.0)
    return tl.sum(numerator.to(tl.float64), 0), tl.sum(denominator.to(tl.float64), 0)


@triton.jit
def finish_sums(
    results, trajectory, partial, programs, batch, ranking_weight,
    M: tl.constexpr, GB: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The means, the loss (Eq. 18), and the history's range if it has moved."""
    loss = tl.zeros((), tl.float64)
    for m in range(M + 1):
        numerator = _sum_slot(partial, 1 + M + m, programs, GB)
        denominator = _sum_slot(partial, 2 + 2 * M + m, programs, GB)
        inverse = 1.0 / tl.where(denominator > 0, denominator, 1.0)
        mean = numerator * inverse
        tl.store(results.inverse + m, inverse.to(ACC))
        if m < M:
            tl.store(results.unimodal_losses + m, mean.to(ACC))
        else:
            tl.store(results.fused_loss, mean.to(ACC))
        loss += mean
    ranking = _sum_slot(partial, 0, programs, GB) / count_pairs(batch, RULES)
    tl.store(results.ranking, ranking.to(ACC))
    tl.store(results.loss, (loss + number(ranking_weight, tl.float64) * ranking).to(ACC))
    if RULES.records:
        for m in range(M):
            if _sum_slot(partial, 1 + m, programs, GB) > 0:
                find_range(trajectory, m, M)


@triton.jit
def _sum_slot(partial, slot, programs, GB: tl.constexpr):
    """A slot's sum over the programs, in an order of its own, float64."""
    total = tl.zeros((GB,), tl.float64)
    start = tl.zeros((), tl.int32)
    while start < programs:
        lane = start + tl.arange(0, GB)
        # Past the cache of this multiprocessor, which others' writes do not reach.
        total += tl.load(partial + slot * programs + lane, lane < programs, other=0.0, cache_modifier=".cg")
        start += GB
    return tl.sum(total, 0)
