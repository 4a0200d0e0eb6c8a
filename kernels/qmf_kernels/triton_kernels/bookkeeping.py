"""Between forward and backward: the ranking, every mean, and the loss history (Eq. 14 to 18), in one launch.

Each program takes SAMPLES samples: it ranks them, records their losses and sums up their shares in the means. The last
one to finish, found by counting, adds the programs' sums in their order, so that results do not depend on who was last.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from .config import Config, number
from .history import Trajectory, count_visits, find_range, record_samples
from .launch import launch
from .ranking import count_pairs, rank_samples
from .rows import widen
from .tiling import Block


class Samples(NamedTuple):
    """Pointers to what is known of each sample, ``[M, B]`` unless said otherwise."""

    weights: Any
    losses: Any  # NaN where there is none
    fused_loss: Any  # [B]
    numerator: Any  # [M + 1, B], or None where the losses themselves are
    denominator: Any
    past: Any  # see ``history``; None: nothing is ranked or recorded
    positions: Any  # how many count, or None for one each


class Results(NamedTuple):
    """Pointers to the scalars and to what the backward needs, and a number in two parts."""

    loss: Any
    fused_loss: Any
    unimodal_losses: Any  # [M]
    ranking: Any
    inverse: Any  # [M + 1], one over each mean's denominator
    ranking_grad: Any  # [M, B], or None without ranking
    ranking_weight: Any
    partial: Any  # float64 [3 M + 3, programs], each program's sums
    counter: Any  # of the programs that have finished, int32, 0; None: there is but one


@triton.jit(debug=True, do_not_specialize=["batch"])
def bookkeeping_kernel(samples, results, trajectory, batch, CONFIG: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    book_samples(program, programs, samples, results, trajectory, batch, CONFIG)
    # All of the program's writes before its mark, all marks before the last one's reads.
    tl.debug_barrier()
    before = tl.atomic_add(results.counter, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        tl.debug_barrier()
        finish_sums(results, trajectory, programs, batch, CONFIG)


@triton.jit
def book_samples(program, programs, samples, results, trajectory, batch, CONFIG: tl.constexpr):
    """Block ``program`` of samples. Its sums go into ``partial``: of the hinges, for each modality whether the
    history's range has moved, of M + 1 numerators and of as many denominators.
    """
    batch = widen(batch)
    sample = widen(program) * CONFIG.SAMPLES + tl.arange(0, CONFIG.SAMPLES)
    inside = sample < batch
    hinges = tl.zeros((), tl.float64)
    if results.ranking_grad is not None:
        pairs = count_pairs(batch, CONFIG).to(CONFIG.ACC)
        for m in range(CONFIG.M):
            total, grad = rank_samples(samples.weights, samples.past, samples.losses, m, sample, batch, CONFIG)
            hinges += total
            grad = grad / pairs
            if samples.positions is not None:
                count = tl.load(samples.positions + m * batch + sample, inside, other=1.0)
                grad = grad / tl.where(count > 0, count, 1.0)
            tl.store(results.ranking_grad + m * batch + sample, grad, inside)
    tl.store(results.partial + program, hinges)
    if CONFIG.records:
        for m in range(CONFIG.M):
            moved = record_samples(trajectory, samples.past, samples.losses, m, sample, batch, CONFIG)
            tl.store(results.partial + (1 + m) * programs + program, moved.to(tl.float64))
        count_visits(trajectory, sample, batch)
    for m in range(CONFIG.M + 1):
        numerator, denominator = _shares(samples, m, sample, inside, batch, CONFIG)
        place = results.partial + (1 + CONFIG.M + m) * programs + program
        tl.store(place, numerator)
        tl.store(place + (CONFIG.M + 1) * programs, denominator)


@triton.jit
def _shares(samples, m, sample, inside, batch, CONFIG: tl.constexpr):
    """A block's sums of numerators and denominators, float64; the fused row comes after the modalities."""
    if samples.numerator is not None:
        numerator = tl.load(samples.numerator + m * batch + sample, inside, other=0.0)
        denominator = tl.load(samples.denominator + m * batch + sample, inside, other=0.0)
    else:
        of_modality = (m + tl.zeros_like(sample)) < CONFIG.M
        loss = tl.load(samples.losses + m * batch + sample, inside & of_modality, other=float("nan"))
        fused = tl.load(samples.fused_loss + sample, inside & (of_modality == 0), other=float("nan"))
        loss = tl.where(of_modality, loss, fused)
        numerator = tl.where(loss == loss, loss, 0.0)
        denominator = tl.where(loss == loss, 1.0, 0.0)
    return tl.sum(numerator.to(tl.float64), 0), tl.sum(denominator.to(tl.float64), 0)


@triton.jit
def finish_sums(results, trajectory, programs, batch, CONFIG: tl.constexpr):
    """The means, the objective, and the history's range if it has moved."""
    cross_entropies = tl.zeros((), tl.float64)
    for m in range(CONFIG.M + 1):
        numerator = _sum_programs(results.partial, 1 + CONFIG.M + m, programs, CONFIG)
        denominator = _sum_programs(results.partial, 2 + 2 * CONFIG.M + m, programs, CONFIG)
        inverse = 1.0 / tl.where(denominator > 0, denominator, 1.0)
        mean = numerator * inverse
        tl.store(results.inverse + m, inverse.to(CONFIG.ACC))
        if m < CONFIG.M:
            tl.store(results.unimodal_losses + m, mean.to(CONFIG.ACC))
        else:
            tl.store(results.fused_loss, mean.to(CONFIG.ACC))
        cross_entropies += mean
    ranking = _sum_programs(results.partial, 0, programs, CONFIG) / count_pairs(batch, CONFIG)
    tl.store(results.ranking, ranking.to(CONFIG.ACC))
    tl.store(results.loss, objective_loss(cross_entropies, ranking, results).to(CONFIG.ACC))
    if CONFIG.records:
        for m in range(CONFIG.M):
            if _sum_programs(results.partial, 1 + m, programs, CONFIG) > 0:
                find_range(trajectory, m, CONFIG)


@triton.jit
def objective_loss(cross_entropies, ranking, results):
    """Eq. 18: ``CE(f) + sum_m CE(x[m]) + lambda * ranking``, from the sum of the first two."""
    return cross_entropies + number(results.ranking_weight, tl.float64) * ranking


@triton.jit
def _sum_programs(partial, slot, programs, CONFIG: tl.constexpr):
    """The sum of all programs' sums, in an order of its own, float64."""
    SUMS: tl.constexpr = CONFIG.SUMS
    total = tl.zeros((SUMS,), tl.float64)
    start = tl.zeros((), tl.int32)
    while start < programs:
        lane = start + tl.arange(0, SUMS)
        # Past the cache of this multiprocessor, which others' writes do not reach.
        total += tl.load(partial + slot * programs + lane, lane < programs, other=0.0, cache_modifier=".cg")
        start += SUMS
    return tl.sum(total, 0)


def launch_bookkeeping(
    samples: Samples,
    results: Results,
    trajectory: Trajectory | None,
    batch: int,
    block: Block,
    config: Config,
) -> None:
    device: torch.device = samples.losses.device
    programs = -(-batch // block.samples)
    arguments = (samples, results, trajectory, batch)
    launch(bookkeeping_kernel, programs, block.warps, device, *arguments, config=config.blocked(block))
