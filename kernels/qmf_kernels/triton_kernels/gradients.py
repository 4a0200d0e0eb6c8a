"""Gradients of rows: of the weights, and a tile of the logits' (the backward of Eq. 9, 11, 13 and 18)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .combination import combine_tile, share_gradients
from .lognorm import normalize_backward
from .measures import slope
from .passes import class_weights
from .rows import clamp_backward, coefficient, number


class Grads(NamedTuple):
    """Pointers to the gradients that come in, None for zero: scalars, ``[M]``, ``[R, K]`` and ``[M, R]``."""

    loss: Any
    fused_loss: Any
    unimodal_losses: Any
    ranking: Any
    fused: Any
    weights: Any
    energy: Any


class OfRows(NamedTuple):
    """What a tile's gradients need of its rows: ``[RB]`` each, or tuples of them, one per modality."""

    y: Any  # the class; -1 where there is none
    fused_lse: Any  # in two parts
    coefficients: Any  # of the M modalities' losses and the fused row's
    lses: Any
    measured: Any
    shares: Any
    counts: Any
    factors: Any
    energy_grads: Any
    measure_grads: Any
    sums: Any  # of votes times the fused row's gradient
    means: Any  # of votes
    weight_pulls: Any  # the gradients of weights that a mixture makes
    grad_sum: Any  # of the fused logits' incoming gradient


@triton.jit
def loss_coefficients(y, wanted, scale, inverse, mass, labels, num_classes, RULES: tl.constexpr, ACC: tl.constexpr):
    """What a row's cross-entropy puts on its label, on every class times its weight, and on the softmax."""
    hard = tl.where(wanted, 1.0, 0.0).to(ACC)
    soft = hard
    if RULES.weighted:
        hard = tl.load(labels.class_weight + y, wanted, other=0.0).to(ACC)
    hard = hard * (inverse * scale)
    share = hard
    if RULES.smoothing:
        smoothing = number(labels.smoothing, ACC)
        hard = hard * (1 - smoothing)
        soft = soft * (inverse * scale) * (smoothing / num_classes)
        share = hard + soft * mass
    return hard, soft, share


@triton.jit
def vote_sums(sums, products, ruleds, votes, ruled, fused_coefficients, mass, M: tl.constexpr, RULES: tl.constexpr):
    """Add <d f, votes> of the fused row's loss; ``votes`` are those of the row's class."""
    hard, soft, _ = fused_coefficients
    out = ()
    for m in tl.static_range(M):
        # No gradient passes through a class that is ruled out. Differences first: where the label has all of the
        # probability they are 0, which the difference of two products, one of them rounded, would not be.
        total = sums[m] + hard * (products[m] - tl.where(ruled, 0.0, votes[m]))
        if RULES.smoothing:
            total += soft * (mass * products[m] - ruleds[m])
        out = out + (total,)
    return out


@triton.jit
def weight_gradients(incoming, sums, raws, weights, shares, counts, weight_total, M: tl.constexpr, RULES: tl.constexpr):
    """Gradients of the raw weights: of what comes in, and through the fused row."""
    if RULES.mixed:
        out = ()
        for m in tl.static_range(M):
            out = out + (tl.zeros_like(incoming[m]),)
        return out
    elif RULES.detach:
        return clamp_backward(incoming, raws, weights, counts, weight_total, M, RULES)
    else:
        through = share_gradients(sums, weights, shares, counts, M, RULES)
        grads = ()
        for m in tl.static_range(M):
            grads = grads + (incoming[m] + through[m],)
        return clamp_backward(grads, raws, weights, counts, weight_total, M, RULES)


@triton.jit
def reduce_tile(
    reduced, tiles, column, rows, labels, makers, grad_fused, in_tile, num_classes,
    M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Add a tile to three sums over the row that its gradients need: of what goes to the log-probabilities, and for
    LogitNorm <x, that and the rest> and <x, softmax(x)>.
    """
    pulls, owns, probs = _parts(tiles, column, rows, labels, makers, grad_fused, in_tile, num_classes, M, RULES, ACC)
    counts = rows.counts
    sums, alongs, means = (), (), ()
    for m in tl.static_range(M):
        inside = in_tile & counts[m][:, None]
        sums = sums + (reduced[0][m] + tl.sum(tl.where(inside, pulls[m], 0.0), 1),)
        along, mean = reduced[1][m], reduced[2][m]
        if RULES.normed:
            x = tl.where(inside, tiles[m], 0.0)
            along += tl.sum(x * (pulls[m] + owns[m]), 1)
            mean += tl.sum(x * probs[m], 1)
        alongs, means = alongs + (along,), means + (mean,)
    return sums, alongs, means


@triton.jit
def tile_gradients(
    tiles, column, rows, reduced, labels, makers, grad_fused, in_tile, num_classes,
    M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of M tiles of logits."""
    pulls, owns, probs = _parts(tiles, column, rows, labels, makers, grad_fused, in_tile, num_classes, M, RULES, ACC)
    counts, factors, sums = rows.counts, rows.factors, rows.sums
    out = ()
    for m in tl.static_range(M):
        grad = owns[m]
        if RULES.mixed or RULES.normed:
            grad += pulls[m]
        along = reduced[1][m]
        if RULES.strict:
            total = sums[m]
            if RULES.mixed:
                total = reduced[0][m]
            grad -= probs[m] * total[:, None]
            along -= total * reduced[2][m]
        if RULES.normed:
            x = tl.where(counts[m][:, None], tiles[m], 0.0)
            grad = normalize_backward(grad, x, along, factors[m], makers, ACC)
        out = out + (grad,)
    return out


@triton.jit
def _parts(
    tiles, column, rows, labels, makers, grad_fused, in_tile, num_classes,
    M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Tiles of gradients per modality: through the fused row, of logits or, where probabilities are combined, of
    log-probabilities; of the modality's own loss and uncertainty, to which the first is added already where no sum over
    the row needs it alone; and its softmax.
    """
    y, fused_lse, coefficients, lses, counts = rows.y, rows.fused_lse, rows.coefficients, rows.lses, rows.counts
    means, weight_pulls = rows.means, rows.weight_pulls
    f, votes = combine_tile(tiles, lses, rows.shares, counts, in_tile, makers, num_classes, M, RULES, ACC)
    grad_f = tl.zeros_like(f)
    label = column[None, :] == y[:, None]
    share_of_class = tl.zeros_like(f)
    fused_probs = tl.zeros_like(f)
    if RULES.losses or RULES.mixed:
        # Both NaN where the fused row has no loss.
        fused_probs = tl.exp((f - fused_lse[0][:, None]) - fused_lse[1][:, None])
        fused_probs = tl.where(fused_probs == fused_probs, fused_probs, 0.0)
    if RULES.losses:
        if RULES.smoothing:
            share_of_class = class_weights(labels, column, num_classes, RULES, ACC)[None, :]
        hard, soft, share = coefficients[M]
        grad_f = share[:, None] * fused_probs - tl.where(label, hard[:, None], 0.0)
        if RULES.smoothing:
            grad_f -= soft[:, None] * share_of_class
    if grad_fused is not None:
        grad_f += grad_fused
        if RULES.mixed:
            grad_f -= fused_probs * rows.grad_sum[:, None]
    if RULES.combine == "mixture":
        # w = <softmax(f), v>, whose slope in f is softmax(f) (v - w).
        for m in tl.static_range(M):
            grad_f += fused_probs * weight_pulls[m][:, None] * (votes[m] - means[m][:, None])
    grad_f = tl.where(f == -float("inf"), 0.0, grad_f)
    pulls, owns, softmaxes = (), (), ()
    for m in tl.static_range(M):
        counted = counts[m][:, None]
        if RULES.combine == "logits":
            pull = rows.shares[m][:, None] * grad_f
        elif RULES.combine == "mixture":
            pull = votes[m] * (grad_f + weight_pulls[m][:, None] * fused_probs * (1.0 - votes[m]))
        else:
            pull = votes[m] * grad_f
        probs = tl.where(counted, tl.exp((tiles[m] - lses[0][m][:, None]) - lses[1][m][:, None]), 0.0)
        tempered = probs
        if RULES.tempered:
            scaled = tiles[m] / coefficient(makers.temperature, m, ACC)
            tempered = tl.where(counted, tl.exp((scaled - lses[2][m][:, None]) - lses[3][m][:, None]), 0.0)
        own = tl.zeros_like(pull)
        if not (RULES.mixed or RULES.normed):
            own = pull
        if RULES.losses:
            hard, soft, share = coefficients[m]
            own += share[:, None] * probs - tl.where(label, hard[:, None], 0.0)
            if RULES.smoothing:
                own -= soft[:, None] * share_of_class
        own -= rows.energy_grads[m][:, None] * tempered
        if RULES.measured:
            slopes = slope(m, tiles[m], lses, rows.measured[m], counts[m], makers, num_classes, RULES, ACC)
            own += rows.measure_grads[m][:, None] * slopes
        pulls, owns, softmaxes = pulls + (pull,), owns + (own,), softmaxes + (probs,)
    return pulls, owns, softmaxes
