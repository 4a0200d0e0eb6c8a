"""The objective of a small, ordinary batch on a CPU: ``objective.objective`` with the fewest calls.

Below some ten thousand logits a step costs by the call, not by the byte. Here is what is left of the general code for
classification with plain means, energies at T = 1 and nothing absent; all modalities stand in one tensor, and their
softmaxes in one with the fused row's.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fusion import WeightRule, accumulate_dtype
from .objective import Losses, LossRule
from .ranking import hinges

# Logits per head up to which copying them into one tensor is cheaper than a call more per modality.
SMALL = 16_384


def small_objective(
    logits: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_rule: WeightRule,
    loss_rule: LossRule,
    detach_weights: bool,
    gradients: bool,
    maker_gradients: bool,
) -> tuple[Losses, list[Tensor], list[Tensor]] | None:
    """What ``objective`` returns, or None where the batch is not small and ordinary."""
    weights, alpha, beta, temperature, _, nonnegative, normalize, uncertainty, combine, normalize_logits, _ = (
        weight_rule
    )
    class_weight, label_smoothing, ignore_index, ranking_weight, form, pairs = loss_rule
    first = logits[0]
    if (
        first.numel() > SMALL
        or first.dim() != 2
        or not target.is_cpu
        or maker_gradients
        or uncertainty != "energy"
        or combine != "logits"
        or normalize_logits is not None
        or nonnegative
        or normalize
        or label_smoothing
        or not (present is weights is temperature is class_weight is None)
        or 0 <= ignore_index < first.shape[1]
    ):
        return None
    num, batch = len(logits), len(first)
    x = torch.stack(list(logits))
    dtype = accumulate_dtype(logits)
    x = x if x.dtype == dtype else x.to(dtype)
    log_probs = x.new_empty((num + 1, *first.shape))
    head_log_probs, fused_log_probs = log_probs[:num], log_probs[num]

    top = x.amax(2, keepdim=True)
    _log_softmax(x, top, head_log_probs)
    energy = head_log_probs.amax(2, keepdim=True).sub_(top)  # Eq. 13: -(top - its log-probability)
    alpha, beta = _column(tuple(alpha.tolist()), dtype), _column(tuple(beta.tolist()), dtype)
    w = torch.addcmul(beta, alpha, energy)  # Eq. 9
    fused = (w * x).sum(0)  # Eq. 11
    if not math.isfinite(fused.sum().item()):
        return None  # some row does not count
    _log_softmax(fused, None, fused_log_probs)

    label = target.expand(num + 1, -1).unsqueeze(2)
    try:
        label_log_probs = log_probs.gather(2, label)
    except RuntimeError:
        return None  # some target is no class
    share = 1 / batch
    shares, minus_shares = _shares(batch, dtype)
    means = minus_shares.view(batch)
    fused_loss = label_log_probs[num].view(batch).dot(means)
    label_log_probs = label_log_probs[:num]
    unimodal_losses = label_log_probs.view(num, batch).mv(means)
    loss = unimodal_losses.sum().add_(fused_loss)
    sample_weights = w.view(num, batch)
    if kappa is None:
        ranking_loss, ranking_grad = loss.new_zeros(()), None
    else:
        total, ranking_grad, num_pairs = hinges(sample_weights, kappa.to(dtype), form, pairs)
        loss.add_(total, alpha=ranking_weight / num_pairs)  # Eq. 18
        ranking_loss = total.div_(num_pairs)
        ranking_scale = ranking_weight * batch / num_pairs
    out = Losses(
        loss=loss,
        fused_loss=fused_loss,
        unimodal_losses=unimodal_losses,
        ranking=ranking_loss,
        fused=fused,
        weights=sample_weights,
        energy=energy.view(num, batch),
        sample_losses=label_log_probs.neg().view(num, batch),
    )
    if not gradients:
        return out, [], []

    # All but the ranking's gradient carry the factor ``share``. With f's d = softmax(f) - onehot(y), the weights' are
    # <d, x[m]> and the logits' w[m] * d + softmax(x[m]) - onehot(y), less the weights' times alpha * softmax(x[m]).
    log_probs.exp_()
    probs, fused_probs = head_log_probs, fused_log_probs
    d_weights = None
    if not detach_weights:
        # The label's logit is its log-probability less the energy.
        d_weights = (fused_probs * x).sum(2, keepdim=True).sub_(label_log_probs).add_(energy)
        if ranking_grad is not None:
            d_weights.add_(ranking_grad.unsqueeze(2), alpha=ranking_scale)
    elif ranking_grad is not None:
        d_weights = ranking_grad.unsqueeze(2) * ranking_scale
    if d_weights is None:
        probs.mul_(share)
    else:
        probs.mul_(torch.addcmul(shares, d_weights, alpha, value=-share))
    probs.addcmul_(w, fused_probs, value=share)
    probs.scatter_add_(2, label[:num], torch.add(minus_shares, w, alpha=-share))
    unbind_copy: Any = torch.unbind_copy  # whose stub returns nothing
    return out, list(unbind_copy(probs)), []


@functools.lru_cache(maxsize=64)
def _column(values: tuple[float, ...], dtype: torch.dtype) -> Tensor:
    """``[M, 1, 1]``; kept, as a cast of the float64 constants costs more than to look it up."""
    return torch.tensor(values, dtype=dtype, device="cpu").view(-1, 1, 1)


@functools.lru_cache(maxsize=64)
def _shares(batch: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """1 / B and -1 / B, ``[B, 1]`` each."""
    shares = torch.full((batch, 1), 1 / batch, dtype=dtype, device="cpu")
    return shares, -shares


def _log_softmax(x: Tensor, top: Tensor | None, out: Tensor) -> None:
    """Log-softmax ``[*, K]`` into ``out``; ``top`` is the rows' largest logits ``[*, 1]`` if known."""
    if x.shape[-1] >= 16 or x.numel() < 512:
        torch.log_softmax(x, -1, out=out)
    else:
        # torch.log_softmax does not vectorise rows shorter than a CPU's vector; this is several times as fast there.
        torch.sub(x, x.amax(-1, keepdim=True) if top is None else top, out=out)
        out.sub_(out.exp().sum(-1, keepdim=True).log_())
