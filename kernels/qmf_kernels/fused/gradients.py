"""Gradients of rows: of the weights, and a tile of the logits' (the backward of Eq. 9, 11, 13 and 18)."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .measures import slope
from .passes import class_weights, fuse_tile
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
def weight_gradients(
    incoming, products, ruleds, label, ruled, fused_coefficients, mass, raws, weights, counts, weight_total,
    M: tl.constexpr, RULES: tl.constexpr,
):  # fmt: skip
    """Gradients of the raw weights: of what comes in, and of the fused row's loss through <d f, x[m]>."""
    hard, soft, _ = fused_coefficients
    grads = ()
    for m in tl.static_range(M):
        grad = incoming[m]
        if not RULES.detach:
            # No gradient passes through a class that is ruled out. Differences first: where the label has all of the
            # probability they are 0, which the difference of two products, one of them rounded, would not be.
            grad += hard * (products[m] - tl.where(ruled, 0.0, label[m]))
            if RULES.smoothing:
                grad += soft * (mass * products[m] - ruleds[m])
        grads = grads + (grad,)
    return clamp_backward(grads, raws, weights, counts, weight_total, M, RULES)


@triton.jit
def tile_gradients(
    tiles, column, y, fused_lse, coefficients, lses, measured, weights, energy_grads, measure_grads, counts, labels,
    makers, grad_fused, in_tile, num_classes, M: tl.constexpr, RULES: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """The gradients of M tiles of logits. ``coefficients`` holds the M modalities' and the fused row's."""
    f, _ = fuse_tile(tiles, weights, counts, in_tile, M)
    grad_f = tl.zeros_like(f)
    label = column[None, :] == y[:, None]
    share_of_class = tl.zeros_like(f)
    if RULES.losses:
        if RULES.smoothing:
            share_of_class = class_weights(labels, column, num_classes, RULES, ACC)[None, :]
        hard, soft, share = coefficients[M]
        # Both NaN where the fused row has no loss.
        probs = tl.exp((f - fused_lse[0][:, None]) - fused_lse[1][:, None])
        grad_f = share[:, None] * tl.where(probs == probs, probs, 0.0) - tl.where(label, hard[:, None], 0.0)
        if RULES.smoothing:
            grad_f -= soft[:, None] * share_of_class
    if grad_fused is not None:
        grad_f += grad_fused
    grad_f = tl.where(f == -float("inf"), 0.0, grad_f)
    out = ()
    for m in tl.static_range(M):
        counted = counts[m][:, None]
        grad = weights[m][:, None] * grad_f
        probs = tl.where(counted, tl.exp((tiles[m] - lses[0][m][:, None]) - lses[1][m][:, None]), 0.0)
        tempered = probs
        if RULES.tempered:
            scaled = tiles[m] / coefficient(makers.temperature, m, ACC)
            tempered = tl.where(counted, tl.exp((scaled - lses[2][m][:, None]) - lses[3][m][:, None]), 0.0)
        if RULES.losses:
            hard, soft, share = coefficients[m]
            grad += share[:, None] * probs - tl.where(label, hard[:, None], 0.0)
            if RULES.smoothing:
                grad -= soft[:, None] * share_of_class
        grad -= energy_grads[m][:, None] * tempered
        if RULES.measured:
            slopes = slope(m, tiles[m], lses, measured[m], counts[m], makers, num_classes, RULES, ACC)
            grad += measure_grads[m][:, None] * slopes
        out = out + (grad,)
    return out
