"""The objective of a small, ordinary batch on a CPU: ``objective.objective`` with the fewest calls.

Below some ten thousand logits a step costs by the call, not by the byte. Here is what is left of the general code for
classification with plain means, energies at T = 1 and nothing absent, all modalities in one tensor.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .fusion import WeightRule, accumulate_dtype, softmax_lse
from .objective import Losses, LossRule, valid_targets
from .ranking import ranking

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
    weights, alpha, beta, temperature, nonnegative, normalize = weight_rule
    if (
        not target.is_cpu
        or logits[0].numel() > SMALL
        or target.dim() != 1
        or maker_gradients
        or nonnegative
        or normalize
        or loss_rule.label_smoothing
        or not (present is weights is temperature is loss_rule.class_weight is None)
    ):
        return None
    dtype = accumulate_dtype(logits)
    x = torch.stack([one if one.dtype == dtype else one.to(dtype) for one in logits])
    probs, lse = softmax_lse(x)
    energy = -lse
    alpha, beta = alpha.to(dtype).view(-1, 1, 1), beta.to(dtype).view(-1, 1, 1)
    w = torch.addcmul(beta, alpha, energy)
    fused = (w * x).sum(0)
    if not math.isfinite(fused.sum().item()):
        return None  # some row does not count
    if valid_targets(target, x.shape[2], loss_rule.ignore_index) is not None:
        return None

    label = target.view(1, -1, 1).expand(len(x), -1, 1)
    fused_probs, fused_lse = softmax_lse(fused)
    entropies = (lse - x.gather(2, label)).squeeze(2)
    unimodal_losses = entropies.mean(1)
    fused_loss = (fused_lse - fused.gather(1, label[0])).mean()
    loss = unimodal_losses.sum() + fused_loss
    sample_weights = w.squeeze(2)
    if kappa is None:
        ranking_loss, ranking_grad = loss.new_zeros(()), None
    else:
        ranking_loss, ranking_grad = ranking(sample_weights, kappa.to(dtype), loss_rule.form, loss_rule.pairs)
        loss = torch.add(loss, ranking_loss, alpha=loss_rule.ranking_weight)
    out = Losses(loss, fused_loss, unimodal_losses, ranking_loss, fused, sample_weights, energy.squeeze(2), entropies)
    if not gradients:
        return out, [], []

    share = 1 / target.numel()
    minus_share = lse.new_full(lse.shape, -share)
    d_fused = fused_probs.mul_(share).scatter_add_(1, label[0], minus_share[0])
    d_weights = None if detach_weights else (d_fused * x).sum(2, keepdim=True)
    if ranking_grad is not None:
        d_ranking = ranking_grad.unsqueeze(2)
        if d_weights is None:
            d_weights = d_ranking * loss_rule.ranking_weight
        else:
            d_weights = d_weights.add_(d_ranking, alpha=loss_rule.ranking_weight)
    # dE/dx = -softmax(x), so the weights' part joins the cross-entropy's on the softmax.
    scale = share if d_weights is None else torch.addcmul(minus_share, d_weights, alpha).neg_()
    d_logits = probs.mul_(scale).addcmul_(w, d_fused).scatter_add_(2, label, minus_share)
    return out, [d.clone() for d in d_logits.unbind(0)], []
