"""What the kernels do to rows of logits: find them, read a tile, and weigh them (Eq. 13, 9).

A program holds RB rows of M modalities, and a tuple of M tensors ``[RB]`` for whatever is one number per row. Stats,
one tensor ``[slots, R]``, carry such numbers from the forward to the backward.
"""

import functools
import struct
from typing import Any, NamedTuple

import triton
import triton.language as tl


class Rules(NamedTuple):
    """What the kernels are compiled for, besides M and the tile."""

    losses: bool  # there are labels; without, fusion alone
    uncertainty: (
        str  # "energy", "msp", "entropy", "evidence"; "given" or "made" for weights that are ready, or come last
    )
    tempered: bool  # T is given, and not 1
    nonnegative: bool
    normalize: bool
    weighted: bool  # classes have weights
    smoothing: bool
    detach: bool = False
    unit: bool = False  # the gradient of the loss itself
    form: str = "paper"
    pairs: str = "adjacent"
    ranks: bool = False
    reads: bool = False  # kappa, or a history
    minmax: bool = False
    records: bool = False
    measured: bool = False  # the uncertainty is "msp", "entropy" or "evidence"
    combine: str = "logits"
    strict: bool = False  # only rows that are finite throughout count
    mixed: bool = False  # "mixture" or "product", which make the weights
    normed: bool = False  # LogitNorm

    @property
    def crowded(self) -> bool:
        """Whether rows take more registers than those of logits that are weighed."""
        return self.strict or self.normed


class Makers(NamedTuple):
    """What makes the weights: pointers to ``[M]`` each, and to ``[M, R]`` weights that are ready; and numbers."""

    weights: Any
    alpha: Any
    beta: Any
    temperature: Any
    static: Any  # a mixture's
    odds: Any  # numbers in two parts: a mixture's
    norm: Any  # LogitNorm's temperature


class Labels(NamedTuple):
    """The targets ``[R]``, the class weights ``[K]``, and numbers, those that are no integers in two parts."""

    target: Any
    class_weight: Any
    ignore_index: Any
    smoothing: Any


class Stats(NamedTuple):
    """The slots of ``stats`` in units of R."""

    top: int  # M, largest logit
    logs: int  # M, log-sum-exp less that; NaN in a row that does not count
    product: int  # M, <softmax(f), x[m]>, or the votes that stand for x[m]
    fused_top: int
    fused_logs: int  # NaN where the fused row has no loss
    fused_loss: int
    tempered_top: int  # M, the same for x / T
    tempered_logs: int
    measure: int  # M, see ``measures``
    ruled: int  # M, sum of the class weights times the votes over the classes that are not ruled out
    numerator: int  # M + 1, a row's share in its mean's numerator
    denominator: int  # M + 1
    mass: int  # sum of the class weights
    factors: int  # 2 M, LogitNorm's
    size: int


@functools.lru_cache(maxsize=256)
def plan_stats(num: int, rules: Rules) -> Stats:
    """Slots for M modalities; none for what the rules do not need."""
    sizes = {
        "top": num,
        "logs": num,
        "product": num,
        "fused_top": 1,
        "fused_logs": 1,
        "fused_loss": 1,
        "tempered_top": num * rules.tempered,
        "tempered_logs": num * rules.tempered,
        "measure": num * rules.measured,
        "ruled": num * rules.smoothing,
        "numerator": (num + 1) * (rules.weighted or rules.smoothing),
        "denominator": (num + 1) * (rules.weighted or rules.smoothing),
        "mass": int(rules.smoothing),
        "factors": 2 * num * rules.normed,
    }
    starts, end = [], 0
    for size in sizes.values():
        starts.append(end)
        end += size
    return Stats._make([*starts, end])


@functools.lru_cache(maxsize=256)
def split_number(value: float) -> tuple[float, float]:
    """A number in two parts: kernels take float32, and one part would leave float64 the digits of that."""
    high = struct.unpack("f", struct.pack("f", value))[0]
    return high, value - high


@triton.jit
def number(parts, ACC: tl.constexpr):
    return tl.full((), parts[0], ACC) + tl.full((), parts[1], ACC)


@triton.jit
def widen(number):
    """An integer as int64, so that what it multiplies may exceed 2^31; of one that is compiled in too."""
    return tl.full((), number, tl.int64)


@triton.jit
def narrow(value, pointer):
    """``value`` in what ``pointer`` points to; from float64 to half precision by way of float32, as PyTorch does."""
    if pointer.dtype.element_ty == tl.float64:
        return value.to(tl.float64)
    else:
        return value.to(tl.float32).to(pointer.dtype.element_ty)


@triton.jit
def row_offset(row, sizes, strides, DIMS: tl.constexpr):
    """Elements from a tensor's start to the given rows, int64."""
    if DIMS == 1:
        return row * strides[0]
    elif DIMS == 2:
        return (row // sizes[1]) * strides[0] + (row % sizes[1]) * strides[1]
    else:
        inner = widen(sizes[1]) * sizes[2]
        rest = row % inner
        return (row // inner) * strides[0] + (rest // sizes[2]) * strides[1] + (rest % sizes[2]) * strides[2]


@triton.jit
def read_tile(pointer, offset, strides, column, inside, DIMS: tl.constexpr, ACC: tl.constexpr):
    """Logits ``[RB, KB]``; -inf outside."""
    place = offset[:, None] + column.to(tl.int64)[None, :] * strides[DIMS]
    return tl.load(pointer + place, inside, other=-float("inf")).to(ACC)


@triton.jit
def accumulate(top, total, x):
    """Online log-sum-exp over the classes: ``top`` the largest so far, ``total`` the sum of exp(x - top)."""
    new = tl.maximum(top, tl.max(x, 1))
    base = tl.where(new == -float("inf"), 0.0, new)
    return new, total * tl.exp(top - base) + tl.sum(tl.exp(x - base[:, None]), 1)


@triton.jit
def keep_finite(x, counted):
    """Logits with 0 for -inf and in rows that do not count, and which classes they rule out."""
    out = (x == -float("inf")) & counted[:, None]
    return tl.where(out | (counted == 0)[:, None], 0.0, x), out


@triton.jit
def coefficient(pointer, m, ACC: tl.constexpr):
    return tl.load(pointer + m).to(ACC)


@triton.jit
def raw_weight(m, lse, u, makers, row, present_row, num_rows, RULES: tl.constexpr, ACC: tl.constexpr):
    """Eq. 9 before clamping, from the log-sum-exp of x / T; the energy (Eq. 13); and the uncertainty, which is ``u``
    where it is not the energy.
    """
    energy = -lse
    if RULES.tempered:
        energy = energy * coefficient(makers.temperature, m, ACC)
    if not RULES.measured:
        u = energy
    if RULES.uncertainty == "given":
        raw = tl.load(makers.weights + m * num_rows + row, present_row, other=0.0).to(ACC)
    elif RULES.uncertainty == "made":
        raw = tl.zeros_like(lse)
    else:
        raw = coefficient(makers.alpha, m, ACC) * u + coefficient(makers.beta, m, ACC)
    return raw, energy, u


@triton.jit
def divide(x, y):
    """Correctly rounded, so that x / x is 1: without asking, a GPU's float32 quotient is not."""
    if x.dtype == tl.float32:
        return tl.div_rn(x, y)
    else:
        return x / y


@triton.jit
def clamp_weights(raws, counts, M: tl.constexpr, RULES: tl.constexpr):
    """Weights, 0 where a row does not count; and the sum that they were divided by, 0 where there is none."""
    weights = ()
    total = tl.zeros_like(raws[0])
    share = tl.zeros_like(raws[0])
    for m in tl.static_range(M):
        w = raws[m]
        if RULES.nonnegative or RULES.normalize:
            w = tl.where(w < 0, 0.0, w)
        w = tl.where(counts[m], w, 0.0)
        weights = weights + (w,)
        total += w
        share += tl.where(counts[m], 1.0, 0.0)
    if RULES.normalize:
        # Where every weight is 0, the modalities that count share equally.
        some = total > 0
        whole = tl.where(some, total, tl.where(share > 0, share, 1.0))
        normalized = ()
        for m in tl.static_range(M):
            part = tl.where(some, weights[m], tl.where(counts[m], 1.0, 0.0))
            normalized = normalized + (divide(part, whole),)
        weights = normalized
    return weights, total


@triton.jit
def clamp_backward(grads, raws, weights, counts, total, M: tl.constexpr, RULES: tl.constexpr):
    """From the gradients of the weights to those of the weights before clamping and normalising."""
    out = ()
    inner = tl.zeros_like(total)
    for m in tl.static_range(M):
        inner += tl.where(counts[m], grads[m] * weights[m], 0.0)
    for m in tl.static_range(M):
        grad = tl.where(counts[m], grads[m], 0.0)
        if RULES.normalize:
            grad = tl.where(total > 0, (grad - inner) / tl.where(total > 0, total, 1.0), 0.0)
        if RULES.nonnegative or RULES.normalize:
            grad = tl.where(raws[m] > 0, grad, 0.0)
        out = out + (tl.where(counts[m], grad, 0.0),)
    return out
