"""The forward: energies, weights, fused logits and cross-entropies of all rows, one read of the logits (Eq. 9 to 14).

Nothing of size ``[R, K]`` is written but fused logits, where asked for.
"""

import triton
import triton.language as tl

from .combination import combine_label, made_weights, row_shares
from .history import read_history
from .passes import cross_entropies, first_pass, label_logits, read_labels, second_pass, share_in_mean
from .rows import row_offset, widen


@triton.jit(debug=True, do_not_specialize=["num_rows"])
def forward_kernel(
    logits, sizes, strides, present, present_strides, makers, labels, trajectory,
    stats, fused, weights_out, energy_out, losses_out, past_out, counter, num_rows, num_classes, positions,
    M: tl.constexpr, DIMS: tl.constexpr, RB: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr,
    RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """RB rows per program."""
    forward_rows(
        tl.program_id(0).to(tl.int64) * RB + tl.arange(0, RB),
        logits, sizes, strides, present, present_strides, makers, labels, trajectory,
        stats, fused, weights_out, energy_out, losses_out, past_out, num_rows, num_classes, positions,
        M, DIMS, KB, TILES, RULES, SLOTS, ACC,
    )  # fmt: skip
    if counter is not None:
        tl.store(counter, 0, tl.program_id(0) == 0)  # for the bookkeeping, which counts its programs


@triton.jit
def forward_rows(
    row, logits, sizes, strides, present, present_strides, makers, labels, trajectory,
    stats, fused, weights_out, energy_out, losses_out, past_out, num_rows, num_classes, positions,
    M: tl.constexpr, DIMS: tl.constexpr, KB: tl.constexpr, TILES: tl.constexpr,
    RULES: tl.constexpr, SLOTS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """Rows ``[RB]``. Without ``labels`` fusion alone; without ``fused`` no fused logits are written, with them their
    strides come after the M heads'.

    ``weights_out``, ``energy_out`` and ``losses_out`` are ``[M, R]``, ``stats`` is ``[slots, R]``.
    """
    num_rows = widen(num_rows)
    in_row = row < num_rows
    tiles, offsets, counts, lses, measured, energies, factors, weights = first_pass(
        logits, sizes, strides, present, present_strides, makers, row, in_row, num_rows, num_classes,
        M, DIMS, KB, TILES, RULES, ACC,
    )  # fmt: skip
    for m in tl.static_range(M):
        place = m * num_rows + row
        tl.store(energy_out + place, tl.where(counts[m], energies[m], float("inf")), in_row)
        if stats is not None:
            _keep(stats, SLOTS.top + m, row, num_rows, lses[0][m], in_row)
            _keep(stats, SLOTS.logs + m, row, num_rows, tl.where(counts[m], lses[1][m], float("nan")), in_row)
            if RULES.tempered:
                _keep(stats, SLOTS.tempered_top + m, row, num_rows, lses[2][m], in_row)
                _keep(stats, SLOTS.tempered_logs + m, row, num_rows, lses[3][m], in_row)
            if RULES.measured:
                _keep(stats, SLOTS.measure + m, row, num_rows, measured[m], in_row)
            if RULES.normed:
                _keep(stats, SLOTS.factors + 2 * m, row, num_rows, factors[m][0], in_row)
                _keep(stats, SLOTS.factors + 2 * m + 1, row, num_rows, factors[m][1], in_row)
    fused_offset, fused_stride = row, 0
    if fused is not None:
        fused_offset, fused_stride = row_offset(row, sizes, strides[M], DIMS), strides[M][DIMS]
    shares = row_shares(weights, counts, M, RULES)
    fused_top, fused_total, products, smooth = second_pass(
        logits, offsets, strides, factors, tiles, lses, shares, counts, makers, labels, fused, fused_offset,
        fused_stride, in_row, num_classes, M, DIMS, KB, TILES, RULES, ACC,
    )  # fmt: skip
    weights = made_weights(weights, products, fused_total, counts, makers, M, RULES, ACC)
    for m in tl.static_range(M):
        tl.store(weights_out + m * num_rows + row, weights[m], in_row)
    if RULES.losses:
        y, valid = read_labels(labels, row, in_row, num_classes)
        label, ruled = label_logits(logits, offsets, strides, factors, y, counts, valid, M, DIMS, RULES, ACC)
        fused_label, _ = combine_label(label, lses, shares, counts, valid, makers, num_classes, M, RULES, ACC)
        nlls, fused_top, fused_log = cross_entropies(
            label, fused_label, ruled, lses, counts, valid, fused_top, fused_total, M
        )
        _keep(stats, SLOTS.fused_top, row, num_rows, fused_top, in_row)
        _keep(stats, SLOTS.fused_logs, row, num_rows, fused_log, in_row)
        _keep(stats, SLOTS.fused_loss, row, num_rows, nlls[M], in_row)
        total = tl.where(fused_total > 0, fused_total, 1.0)
        for m in tl.static_range(M):
            tl.store(losses_out + m * num_rows + row, nlls[m], in_row)
            product = tl.where(fused_log == fused_log, products[m] / total, 0.0)
            _keep(stats, SLOTS.product + m, row, num_rows, product, in_row)
            if RULES.smoothing:
                _keep(stats, SLOTS.mass, row, num_rows, smooth[3], in_row)
                _keep(stats, SLOTS.ruled + m, row, num_rows, smooth[1][m], in_row)
        if RULES.weighted or RULES.smoothing:
            for m in tl.static_range(M + 1):
                if m < M:
                    lse, sums = lses[0][m] + lses[1][m], smooth[2][m]
                else:
                    lse, sums = fused_top + fused_log, smooth[0]
                numerator, denominator = share_in_mean(
                    nlls[m], lse, sums, smooth[3], y, labels, num_classes, RULES, ACC
                )
                _keep(stats, SLOTS.numerator + m, row, num_rows, numerator, in_row)
                _keep(stats, SLOTS.denominator + m, row, num_rows, denominator, in_row)
    if RULES.reads:
        # Before anybody records: a sample may stand in the batch twice.
        sample = row // positions
        read_history(trajectory, past_out, sample, in_row & (row % positions == 0), num_rows // positions, M, RULES)


@triton.jit
def _keep(stats, slot, row, num_rows, value, in_row):
    tl.store(stats + slot * num_rows + row, value, in_row)
