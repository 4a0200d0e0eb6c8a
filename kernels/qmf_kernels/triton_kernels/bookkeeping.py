"""Between forward and backward: the ranking, every mean, and the loss history (Eq. 14 to 18), in one launch.

Each program takes SAMPLES samples: it ranks them, records their losses and sums up their shares in the means. The last
one to finish, found by counting, adds the programs' sums in their order, so that results do not depend on who was last.
"""

import triton
import triton.language as tl

from .config import Config, number
from .history import Trajectory, count_visits, find_range, record_samples
from .launch import launch
from .memory import Memory
from .ranking import count_pairs, rank_samples
from .rows import widen


@triton.jit(debug=True, do_not_specialize=["batch"])
def bookkeeping_kernel(memory, trajectory, batch, CONFIG: tl.constexpr):
    program, programs = tl.program_id(0), tl.num_programs(0)
    book_samples(program, programs, memory, trajectory, batch, CONFIG)
    # All of the program's writes before its mark, all marks before the last one's reads.
    tl.debug_barrier()
    before = tl.atomic_add(memory.counter, 1, sem="acq_rel", scope="gpu")
    if before == programs - 1:
        tl.debug_barrier()
        finish_sums(memory, trajectory, programs, batch, CONFIG)


@triton.jit
def book_samples(program, programs, memory, trajectory, batch, CONFIG: tl.constexpr):
    """Block ``program`` of memory. Its sums go into ``partial``: of the hinges, for each modality whether the
    history's range has moved, of M + 1 numerators and of as many denominators.
    """
    batch = widen(batch)
    sample = widen(program) * CONFIG.block.samples + tl.arange(0, CONFIG.block.samples)
    inside = sample < batch
    hinges = tl.zeros((), tl.float64)
    if memory.ranking_grad is not None:
        pairs = count_pairs(batch, CONFIG).to(CONFIG.ACC)
        for m in range(CONFIG.M):
            total, grad = rank_samples(memory, m, sample, batch, CONFIG)
            hinges += total
            tl.store(memory.ranking_grad + m * batch + sample, grad / pairs, inside)
    tl.store(memory.partial + program, hinges)
    if CONFIG.records:
        for m in range(CONFIG.M):
            moved = record_samples(trajectory, memory, m, sample, batch, CONFIG)
            tl.store(memory.partial + (1 + m) * programs + program, moved.to(tl.float64))
        count_visits(trajectory, sample, batch)
    for m in range(CONFIG.M + 1):
        numerator = tl.load(memory.numerator + m * batch + sample, inside, other=0.0)
        denominator = tl.load(memory.denominator + m * batch + sample, inside, other=0.0)
        place = memory.partial + (1 + CONFIG.M + m) * programs + program
        tl.store(place, tl.sum(numerator.to(tl.float64), 0))
        tl.store(place + (CONFIG.M + 1) * programs, tl.sum(denominator.to(tl.float64), 0))


@triton.jit
def finish_sums(memory, trajectory, programs, batch, CONFIG: tl.constexpr):
    """The means, the objective, and the history's range if it has moved."""
    cross_entropies = tl.zeros((), tl.float64)
    for m in range(CONFIG.M + 1):
        numerator = _sum_programs(memory.partial, 1 + CONFIG.M + m, programs, CONFIG)
        denominator = _sum_programs(memory.partial, 2 + 2 * CONFIG.M + m, programs, CONFIG)
        # Where the targets' classes weigh nothing, there is nothing to average, and no gradient.
        inverse = tl.where(denominator > 0, 1.0 / tl.where(denominator > 0, denominator, 1.0), 0.0)
        mean = tl.where(denominator > 0, numerator * inverse, 0.0)
        tl.store(memory.inverse + m, inverse.to(CONFIG.ACC))
        if m < CONFIG.M:
            tl.store(memory.unimodal_losses + m, mean.to(CONFIG.ACC))
        else:
            tl.store(memory.fused_loss, mean.to(CONFIG.ACC))
        cross_entropies += mean
    ranking = _sum_programs(memory.partial, 0, programs, CONFIG) / count_pairs(batch, CONFIG)
    tl.store(memory.ranking_loss, ranking.to(CONFIG.ACC))
    tl.store(memory.loss, objective_loss(cross_entropies, ranking, memory).to(CONFIG.ACC))
    if CONFIG.records:
        for m in range(CONFIG.M):
            if _sum_programs(memory.partial, 1 + m, programs, CONFIG) > 0:
                find_range(trajectory, m, CONFIG)


@triton.jit
def objective_loss(cross_entropies, ranking, memory):
    """Eq. 18: ``CE(f) + sum_m CE(x[m]) + lambda * ranking``, from the sum of the first two."""
    return cross_entropies + number(memory.ranking_weight, tl.float64) * ranking


@triton.jit
def _sum_programs(partial, slot, programs, CONFIG: tl.constexpr):
    """The sum of all programs' sums, in an order of its own, float64."""
    WIDTH: tl.constexpr = 1 if CONFIG.block.alone else 128
    total = tl.zeros((WIDTH,), tl.float64)
    start = tl.zeros((), tl.int32)
    while start < programs:
        lane = start + tl.arange(0, WIDTH)
        # Past the cache of this multiprocessor, which others' writes do not reach.
        total += tl.load(partial + slot * programs + lane, lane < programs, other=0.0, cache_modifier=".cg")
        start += WIDTH
    return tl.sum(total, 0)


def launch_bookkeeping(memory: Memory, trajectory: Trajectory | None, batch: int, config: Config) -> None:
    programs, warps = -(-batch // config.block.samples), config.block.warps
    launch(bookkeeping_kernel, programs, warps, memory.losses.device, memory, trajectory, batch, config=config)
