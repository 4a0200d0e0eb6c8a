"""The backward: one read of the logits, one write of their gradients; all else is recomputed from the stats.

The gradient of a modality's logits is its weight times the fused row's, plus its own cross-entropy's, less the energy's
times softmax(x / T).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..eager.fusion import accumulate_dtype
from ..rules import LossGrads, ObjectiveOptions, RuleGrads, WeightRule
from . import tiling
from .config import Config, make_config, number
from .cross_entropy import Labels, class_weights, label_logits, loss_coefficients, make_labels, read_labels
from .launch import launch
from .memory import Memory, contiguous, recall
from .rows import lay_out, narrow, put_back, read_tiles, row_offset, temperature, tile_columns, tile_offsets
from .weights import clamp_backward, fuse_tile, stat, weigh_rows


class Written(NamedTuple):
    """Pointers to where the gradients go."""

    logits: Any  # M of [R, K]
    strides: Any
    uncertainty: Any = None  # [M, R]
    sums: Any = None  # [2 M or 3 M, programs]: of alpha, beta and T, each program's share


class Terms(NamedTuple):
    """What the gradients of logits are made of: ``[ROWS]`` each, or a tuple of such."""

    y: Any  # the class; -1 where there is none
    fused_top: Any  # the fused row's log-sum-exp in two parts, the second NaN where it has no loss
    fused_log: Any
    losses: Any  # M + 1 results of ``loss_coefficients``, the fused row's the last
    energies: Any  # M


@triton.jit(debug=True, do_not_specialize=["num_rows"])
def backward_kernel(inputs, rule, labels, grads, memory, out, num_rows, num_classes, positions, CONFIG: tl.constexpr):
    program = tl.program_id(0)
    row = program.to(tl.int64) * CONFIG.tile.rows + tl.arange(0, CONFIG.tile.rows)
    backward_rows(row, program, inputs, rule, labels, grads, memory, out, num_rows, num_classes, positions, CONFIG)


@triton.jit
def backward_rows(
    row, program, inputs, rule, labels, grads, memory, out, num_rows, num_classes, positions, CONFIG: tl.constexpr
):
    """``grads`` are ``LossGrads``, the fused logits' with strides after the M heads'."""
    M: tl.constexpr = CONFIG.M
    rows, _ = weigh_rows(row, inputs, rule, memory, num_rows, num_classes, True, CONFIG)
    zero = tl.where(rows.inside, 0.0, 0.0).to(CONFIG.ACC)
    through = (zero,) * M  # what the fused row's gradient is to each weight
    if grads.logits is not None and not CONFIG.detach:
        through = _fused_products(through, rows, inputs, grads, CONFIG)
    y, fused_top, fused_log, losses = row * 0 - 1, zero, zero, ()
    if CONFIG.losses:
        y, fused_top, fused_log, losses, through = _differentiate_losses(
            through, rows, inputs, labels, grads, memory, CONFIG
        )
    weight_grads = _weight_grads(through, rows, grads, memory, positions, CONFIG)
    weight_grads = clamp_backward(weight_grads, rows, CONFIG)
    energies = ()
    for m in tl.static_range(M):
        grad = zero
        du = weight_grads[m] * tl.load(rule.alpha + m).to(CONFIG.ACC)
        if rule.uncertainty is None:
            grad = du
        elif out.uncertainty is not None:
            tl.store(out.uncertainty + m * rows.num_rows + row, du, rows.inside)
        if grads.energy is not None:
            outside = tl.load(grads.energy + m * rows.num_rows + row, rows.inside, other=0.0)
            grad += tl.where(rows.counted[m], outside, 0.0)
        energies = energies + (grad,)
    terms = Terms(y=y, fused_top=fused_top, fused_log=fused_log, losses=losses, energies=energies)

    logs = (zero,) * M
    for tile in range(CONFIG.tile.tiles):
        logs = _write_tile(logs, tile, rows, terms, inputs, rule, labels, grads, out, CONFIG)
    if out.sums is not None:
        for m in tl.static_range(M):
            place = out.sums + m * tl.num_programs(0) + program
            tl.store(place, tl.sum(weight_grads[m] * rows.uncertainties[m], 0))
            tl.store(place + M * tl.num_programs(0), tl.sum(weight_grads[m], 0))
            if rule.temperature is not None:
                # With E = -T lse(x / T) and p = softmax(x / T), dE/dT = <p, log p>.
                tl.store(place + 2 * M * tl.num_programs(0), tl.sum(energies[m] * logs[m], 0))


@triton.jit
def _read_fused(column, in_tile, rows, inputs, grads, CONFIG: tl.constexpr):
    """A tile of the fused logits' incoming gradient."""
    M: tl.constexpr = CONFIG.M
    offset = row_offset(rows.row, inputs.sizes, inputs.strides[M], CONFIG)
    place = tile_offsets(offset, inputs.strides[M], column, CONFIG)
    return tl.load(grads.logits + place, in_tile, other=0.0).to(CONFIG.ACC)


@triton.jit
def _fused_products(products, rows, inputs, grads, CONFIG: tl.constexpr):
    """Add <grad f, x> over the classes that are not ruled out: one more pass over the row, for such a gradient."""
    M: tl.constexpr = CONFIG.M
    for tile in range(CONFIG.tile.tiles):
        column, in_tile = tile_columns(tile, rows.inside, rows.num_classes, CONFIG)
        tiles = read_tiles(rows.offsets, column, in_tile, inputs, CONFIG)
        f, finite = fuse_tile(tiles, rows, in_tile, CONFIG)
        grad = _read_fused(column, in_tile & (f > -float("inf")), rows, inputs, grads, CONFIG)
        updated = ()
        for m in tl.static_range(M):
            updated = updated + (products[m] + tl.sum(grad * finite[m], 1),)
        products = updated
    return products


@triton.jit
def _scalar(pointer, absent: tl.constexpr, CONFIG: tl.constexpr):
    if pointer is not None:
        return tl.load(pointer).to(CONFIG.ACC)
    else:
        return tl.full((), absent, CONFIG.ACC)


@triton.jit
def _loss_grad(grads, CONFIG: tl.constexpr):
    UNIT: tl.constexpr = 1.0 if CONFIG.unit else 0.0
    return _scalar(grads.loss, UNIT, CONFIG)


@triton.jit
def _stat(slot, m, other, rows, memory):
    return tl.load(stat(memory, slot, m, rows.row, rows.num_rows), rows.inside, other=other)


@triton.jit
def _differentiate_losses(products, rows, inputs, labels, grads, memory, CONFIG: tl.constexpr):
    """The first four of ``Terms``; and ``products`` with <d f, x> of the fused row's loss added."""
    M: tl.constexpr = CONFIG.M
    y, valid = read_labels(labels, rows)
    label, ruled = label_logits(y, valid, rows, inputs, CONFIG)
    fused_top = _stat(CONFIG.slots.top, M, 0.0, rows, memory)
    fused_log = _stat(CONFIG.slots.log, M, float("nan"), rows, memory)
    mass = tl.zeros_like(fused_top)
    if labels.smoothing is not None:
        mass = _stat(CONFIG.slots.mass, 0, 0.0, rows, memory)
    losses = ()
    for m in tl.static_range(M + 1):
        scale = _loss_grad(grads, CONFIG)
        if m < M:
            wanted = rows.counted[m] & valid
            if grads.unimodal_losses is not None:
                scale += tl.load(grads.unimodal_losses + m)
        else:
            wanted = (fused_log == fused_log) & valid
            scale += _scalar(grads.fused_loss, 0.0, CONFIG)
        scale = scale * tl.load(memory.inverse + m)
        losses = losses + (loss_coefficients(y, wanted, scale, mass, labels, rows.num_classes, CONFIG),)
    hard, soft, _ = losses[M]
    out = ()
    for m in tl.static_range(M):
        mean = _stat(CONFIG.slots.product, m, 0.0, rows, memory)
        # No gradient passes through a class that is ruled out. Differences first: where the label has all of the
        # probability they are 0, which the difference of two products, one of them rounded, would not be.
        product = products[m] + hard * (mean - tl.where(ruled, 0.0, label[m]))
        if labels.smoothing is not None:
            product += soft * (mass * mean - _stat(CONFIG.slots.ruled, m, 0.0, rows, memory))
        out = out + (product,)
    return tl.where(valid, y, -1), fused_top, fused_log, losses, out


@triton.jit
def _weight_grads(through, rows, grads, memory, positions, CONFIG: tl.constexpr):
    """The gradients of the weights: ``through`` the fused row, of what comes in, and of the ranking."""
    M: tl.constexpr = CONFIG.M
    out = ()
    for m in tl.static_range(M):
        grad = tl.zeros_like(through[m])
        if grads.weights is not None:
            grad += tl.load(grads.weights + m * rows.num_rows + rows.row, rows.inside, other=0.0)
        if memory.ranking_grad is not None:
            scale = _loss_grad(grads, CONFIG) * number(memory.ranking_weight, CONFIG.ACC)
            scale += _scalar(grads.ranking_loss, 0.0, CONFIG)
            place = m * (rows.num_rows // positions) + rows.row // positions
            grad += scale * tl.load(memory.ranking_grad + place, rows.inside, other=0.0)
        if not CONFIG.detach:
            grad += through[m]
        out = out + (grad,)
    return out


@triton.jit
def _write_tile(logs, tile, rows, terms, inputs, rule, labels, grads, out, CONFIG: tl.constexpr):
    """A tile's gradients; where T has one, returns ``logs`` with <p, log p> added, p = softmax(x / T)."""
    M: tl.constexpr = CONFIG.M
    column, in_tile = tile_columns(tile, rows.inside, rows.num_classes, CONFIG)
    tiles = read_tiles(rows.offsets, column, in_tile, inputs, CONFIG)
    f, _ = fuse_tile(tiles, rows, in_tile, CONFIG)
    fused_grad = tl.zeros_like(f)
    if CONFIG.losses:
        probs = tl.exp((f - terms.fused_top[:, None]) - terms.fused_log[:, None])
        probs = tl.where(probs == probs, probs, 0.0)
        fused_grad = _cross_entropy_grad(probs, M, column, terms, rows, labels, CONFIG)
    if grads.logits is not None:
        fused_grad += _read_fused(column, in_tile, rows, inputs, grads, CONFIG)
    fused_grad = tl.where(f == -float("inf"), 0.0, fused_grad)
    updated, out_grads = (), ()
    for m in tl.static_range(M):
        counts = rows.counted[m][:, None]
        probs = tl.where(counts, tl.exp((tiles[m] - rows.tops[m][:, None]) - rows.logs[m][:, None]), 0.0)
        grad = rows.weights[m][:, None] * fused_grad
        if CONFIG.losses:
            grad += _cross_entropy_grad(probs, m, column, terms, rows, labels, CONFIG)
        log = logs[m]
        if rule.temperature is not None:
            scaled = tiles[m] / temperature(m, rule, CONFIG)
            log_probs = (scaled - rows.tempered_tops[m][:, None]) - rows.tempered_logs[m][:, None]
            probs = tl.where(counts, tl.exp(log_probs), 0.0)
            if out.sums is not None:
                log += tl.sum(tl.where(probs > 0, probs * log_probs, 0.0), 1)
        out_grads = out_grads + (grad - terms.energies[m][:, None] * probs,)
        updated = updated + (log,)
    # All gradients come before the first store, which would keep the compiler from reusing registers between them.
    for m in tl.static_range(M):
        offset = row_offset(rows.row, inputs.sizes, out.strides[m], CONFIG)
        place = out.logits[m] + tile_offsets(offset, out.strides[m], column, CONFIG)
        tl.store(place, narrow(out_grads[m], out.logits[m]), in_tile)
    return updated


@triton.jit
def _cross_entropy_grad(probs, m, column, terms, rows, labels, CONFIG: tl.constexpr):
    """A tile of the gradient of the rows' cross-entropy, from their softmax."""
    hard, soft, share = terms.losses[m]
    grad = share[:, None] * probs - tl.where(column[None, :] == terms.y[:, None], hard[:, None], 0.0)
    if labels.smoothing is not None:
        grad -= soft[:, None] * class_weights(column, labels, rows.num_classes, CONFIG)[None, :]
    return grad


def fuse_backward(
    grads: Sequence[Tensor], energies: Tensor, logits: Sequence[Tensor], rule: WeightRule, rule_gradients: bool
) -> tuple[list[Tensor], RuleGrads | None]:
    """From the gradients of fused logits, weights and energies to those of the logits and, where asked for, of the
    rule's tensors: one launch, and one more to sum up the latter.
    """
    fused, weights, of_energies = grads
    incoming = LossGrads(logits=fused, weights=weights, energy=of_energies)
    config = make_config(len(logits), accumulate_dtype(logits), rule)
    return launch_backward(incoming, Memory(energy=energies.contiguous()), logits, None, rule, rule_gradients, config)


def objective_backward(
    grads: LossGrads,
    kept: Sequence[Tensor],
    logits: Sequence[Tensor],
    given: ObjectiveOptions,
    rule_gradients: bool,
) -> tuple[list[Tensor], RuleGrads | None]:
    """From the gradients of the losses to those of the logits and, where asked for, of the rule's tensors: one launch,
    and one more to sum up the latter. ``kept`` is what ``objective`` returned.
    """
    memory, labels = recall(kept, given.loss_rule), make_labels(given.target, given.loss_rule)
    config = make_config(len(logits), accumulate_dtype(logits), given.weight_rule, given.loss_rule)
    return launch_backward(grads, memory, logits, labels, given.weight_rule, rule_gradients, config)


def launch_backward(
    grads: LossGrads,
    memory: Memory,
    logits: Sequence[Tensor],
    labels: Labels | None,
    rule: WeightRule,
    rule_gradients: bool,
    config: Config,
    grad_dtype: torch.dtype | None = None,
) -> tuple[list[Tensor], RuleGrads | None]:
    """``grad_dtype``: of the logits' gradients; default: the logits' own."""
    num, first = len(logits), logits[0]
    d_logits = [torch.empty_like(x, dtype=grad_dtype) for x in logits]
    inputs, others = lay_out(logits, None, d_logits if grads.logits is None else [grads.logits, *d_logits])
    fused, written = others[:-num], others[-num:]
    num_rows, num_classes = inputs.num_rows, inputs.num_classes
    tile = tiling.tile(num, num_classes, num_rows, config.ACC == tl.float64)
    programs = -(-num_rows // tile.rows)
    out = Written(logits=written, strides=inputs.strides[-num:])
    if rule_gradients:
        rows, dtype = (num, *first.shape[:-1]), accumulate_dtype(logits)
        out = out._replace(
            uncertainty=None if rule.uncertainty is None else first.new_empty(rows, dtype=dtype),
            sums=first.new_empty((2 if rule.temperature is None else 3, num, programs), dtype=dtype),
        )
    inputs = inputs._replace(strides=inputs.strides[:-num])
    grads = contiguous(grads._replace(logits=None))._replace(logits=fused[0] if fused else None)
    arguments = (inputs, contiguous(rule), labels, grads, memory, out)
    sizes = (num_rows, num_classes, num_rows // first.shape[0])
    config = config._replace(DIMS=len(inputs.sizes), tile=tile)
    launch(backward_kernel, programs, tile.warps, first.device, *arguments, *sizes, config=config)
    put_back(written, d_logits)
    if not rule_gradients:
        return d_logits, None
    alpha, beta, temperature = (*(x.clone() for x in out.sums.sum(2)), None)[:3]
    return d_logits, RuleGrads(uncertainty=out.uncertainty, alpha=alpha, beta=beta, temperature=temperature, fused=None)
