"""Cross-entropies of rows in a kernel, as ``torch.nn.CrossEntropyLoss`` has them, and their gradients' coefficients.

Where a row has no loss (it does not count, or its target is ``ignore_index``) its cross-entropy is NaN.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..rules import LossRule
from .config import number, split_number


class Labels(NamedTuple):
    """The targets ``[R]``, the classes' weights ``[K]``, and numbers, of which smoothing is one in two parts."""

    target: Any
    class_weight: Any  # None: 1 each
    ignore_index: Any
    smoothing: Any  # None: 0


def make_labels(target: Tensor, loss_rule: LossRule) -> Labels:
    return Labels(
        target=target.contiguous(),
        class_weight=None if loss_rule.class_weight is None else loss_rule.class_weight.contiguous(),
        ignore_index=loss_rule.ignore_index,
        smoothing=split_number(float(loss_rule.label_smoothing)) if loss_rule.label_smoothing else None,
    )


@triton.jit
def read_labels(labels, rows):
    """Each row's class, 0 where it has none, and whether it has one."""
    y = tl.load(labels.target + rows.row, rows.inside, other=0)
    valid = rows.inside & (y != labels.ignore_index)
    within = (y >= 0) & (y < rows.num_classes)
    tl.device_assert((valid == 0) | within, "target must hold classes 0 to K - 1 (or ignore_index)")
    valid = valid & within
    return tl.where(valid, y, 0), valid


@triton.jit
def label_logits(y, valid, rows, inputs, CONFIG: tl.constexpr):
    """Each modality's logit of the row's class, 0 where the row has none; and whether that class is ruled out."""
    M: tl.constexpr = CONFIG.M
    DIMS: tl.constexpr = CONFIG.DIMS
    out = ()
    ruled = valid & (valid == 0)
    for m in tl.static_range(M):
        place = inputs.logits[m] + rows.offsets[m] + y.to(tl.int64) * inputs.strides[m][DIMS]
        x = tl.load(place, rows.counted[m] & valid, other=0.0).to(CONFIG.ACC)
        ruled = ruled | (x == -float("inf"))
        out = out + (x,)
    return out, ruled


@triton.jit
def class_weights(column, labels, num_classes, CONFIG: tl.constexpr):
    """The classes' weights ``[CLASSES]``, 0 past the last class."""
    inside = column < num_classes
    if labels.class_weight is not None:
        return tl.load(labels.class_weight + column, inside, other=0.0).to(CONFIG.ACC)
    else:
        return tl.where(inside, 1.0, 0.0).to(CONFIG.ACC)


@triton.jit
def cross_entropies(label, ruled, valid, rows, fused_top, fused_total, CONFIG: tl.constexpr):
    """Plain cross-entropies of the M modalities and of the fused row; and the fused row's log-sum-exp in two parts, the
    second NaN where a sample has no modality, or none that leaves it a class.

    ``label`` and ``ruled`` come from ``label_logits``.
    """
    M: tl.constexpr = CONFIG.M
    out = ()
    some = valid & (valid == 0)
    fused_label = tl.zeros_like(fused_top)
    for m in tl.static_range(M):
        nll = (rows.tops[m] - label[m]) + rows.logs[m]
        out = out + (tl.where(rows.counted[m] & valid, nll, float("nan")),)
        some = some | rows.counted[m]
        fused_label += rows.weights[m] * tl.where(label[m] == -float("inf"), 0.0, label[m])
    counts = some & (fused_total > 0) & (fused_total < float("inf"))
    fused_top = tl.where(counts, fused_top, 0.0)
    fused_log = tl.log(tl.where(counts, fused_total, 1.0))
    nll = (fused_top - tl.where(ruled, -float("inf"), fused_label)) + fused_log
    out = out + (tl.where(counts & valid, nll, float("nan")),)
    return out, fused_top, tl.where(counts, fused_log, float("nan"))


@triton.jit
def share_in_mean(nll, lse, class_sum, mass, y, labels, num_classes, CONFIG: tl.constexpr):
    """A row's share in its mean, numerator and denominator, from its cross-entropy, its log-sum-exp, and the sum of its
    logits times the classes' weights, whose own sum is ``mass``.
    """
    wanted = nll == nll
    weight = tl.where(wanted, 1.0, 0.0).to(CONFIG.ACC)
    if labels.class_weight is not None:
        weight = tl.load(labels.class_weight + y, wanted, other=0.0).to(CONFIG.ACC)
    hard = weight
    if labels.smoothing is not None:
        hard = weight * (1 - number(labels.smoothing, CONFIG.ACC))
    loss = tl.where(hard > 0, hard * nll, 0.0)
    if labels.smoothing is not None:
        loss += (mass * lse - class_sum) * (number(labels.smoothing, CONFIG.ACC) / num_classes)
    return tl.where(wanted, loss, 0.0), weight


@triton.jit
def loss_coefficients(y, wanted, scale, mass, labels, num_classes, CONFIG: tl.constexpr):
    """What a row's cross-entropy, times ``scale``, puts on its label, on every class times its weight, and on the
    softmax.
    """
    hard = tl.where(wanted, 1.0, 0.0).to(CONFIG.ACC)
    soft = hard
    if labels.class_weight is not None:
        hard = tl.load(labels.class_weight + y, wanted, other=0.0).to(CONFIG.ACC)
    hard = hard * scale
    share = hard
    if labels.smoothing is not None:
        smoothing = number(labels.smoothing, CONFIG.ACC)
        hard = hard * (1 - smoothing)
        soft = soft * scale * (smoothing / num_classes)
        share = hard + soft * mass
    return hard, soft, share
