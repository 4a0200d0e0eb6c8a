"""The uncertainties that are no energies, and their slopes (``qmf_kernels.uncertainty`` has the formulas).

While a row is read, each gathers one number: how many logits are largest (msp), the sum of exp(z - top) * (z - top)
(entropy) or of softplus(z) (evidence), for z = x / T. Once it is read, one number is kept, its ``measure``: one over
the first for msp, whose value follows from the log-sum-exp, and the value itself for the others.
"""

import triton
import triton.language as tl

from .rows import coefficient, widen


@triton.jit
def gather(gathered, x, z, old_top, top, scaled_old_top, scaled_old_total, scaled_top, RULES: tl.constexpr):
    """Add a tile: ``old_top`` and ``top`` are the largest x before and with it, ``scaled`` the same for z."""
    if RULES.uncertainty == "msp":
        largest = tl.sum(tl.where(x == top[:, None], 1.0, 0.0).to(gathered.dtype), 1)
        return tl.where(top > old_top, 0.0, gathered) + largest
    elif RULES.uncertainty == "entropy":
        base = tl.where(scaled_top == -float("inf"), 0.0, scaled_top)
        moved = tl.where(scaled_old_total > 0, scaled_old_total * (scaled_old_top - base), 0.0)
        exps = tl.exp(z - base[:, None])
        added = tl.sum(tl.where(exps > 0, exps * (z - base[:, None]), 0.0), 1)
        return (gathered + moved) * tl.exp(scaled_old_top - base) + added
    elif RULES.uncertainty == "evidence":
        # What log(1 + small) loses is nothing beside the 1 that each class adds to this.
        return gathered + tl.sum(tl.maximum(z, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(z))), 1)
    else:
        return gathered


@triton.jit
def measure(gathered, total, log, counted, num_classes, RULES: tl.constexpr, ACC: tl.constexpr):
    """The number to keep, from what was gathered of a row, and the sum of exp(z - top) and its logarithm."""
    if RULES.uncertainty == "msp":
        return 1.0 / tl.where(counted, gathered, 1.0)
    elif RULES.uncertainty == "entropy":
        entropy = (log - gathered / tl.where(counted, total, 1.0)) / _log_classes(num_classes, ACC)
        return tl.where(counted, entropy, 0.0)
    elif RULES.uncertainty == "evidence":
        number = widen(num_classes).to(ACC)
        return tl.where(counted, number / (gathered + number), 0.0)
    else:
        return log


@triton.jit
def value(measured, log, RULES: tl.constexpr):
    """The uncertainty, from its measure and the logarithm of the sum of exp(z - top)."""
    if RULES.uncertainty == "msp":
        return 1.0 - tl.exp(-log)
    else:
        return measured


@triton.jit
def slope(m, x, lses, measured, counted, makers, num_classes, RULES: tl.constexpr, ACC: tl.constexpr):
    """The uncertainty's slope in a tile of logits."""
    z = x
    scale = tl.full((), 1.0, ACC)
    if RULES.tempered:
        scale = coefficient(makers.temperature, m, ACC)
        z = x / scale
    log_probs = (z - lses[2][m][:, None]) - lses[3][m][:, None]
    probs = tl.exp(log_probs)
    if RULES.uncertainty == "msp":
        share = tl.where(x == lses[0][m][:, None], measured[:, None], 0.0)
        out = tl.exp(-lses[3][m])[:, None] * (probs - share)
    elif RULES.uncertainty == "entropy":
        out = tl.where(probs > 0, -probs * (log_probs / _log_classes(num_classes, ACC) + measured[:, None]), 0.0)
    else:
        factor = measured * measured / widen(num_classes).to(ACC)
        out = -factor[:, None] / (1.0 + tl.exp(-z))
    return tl.where(counted[:, None], out / scale, 0.0)


@triton.jit
def moment(slopes, x, top, RULES: tl.constexpr):
    """<slope, x>, by which T's gradient goes; about the largest logit where the slopes add up to 0."""
    if RULES.uncertainty != "evidence":
        x = x - top[:, None]
    return tl.sum(tl.where(slopes == 0, 0.0, slopes * x), 1)


@triton.jit
def _log_classes(num_classes, ACC: tl.constexpr):
    """The logarithm of K, or 1 where that is 0: the entropy of one class is 0 as it stands."""
    number = widen(num_classes).to(ACC)
    return tl.where(number > 1, tl.log(number), 1.0)
