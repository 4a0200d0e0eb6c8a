"""The released formulation without its trips to the host, as one would write it in PyTorch today; and its float64 twin,
by other means, for checking whatever is timed.

``logits`` are M of ``[B, K]``, ``target`` and ``index`` ``[B]`` int64; ``sums`` ``[M, N]`` are the samples' summed
losses, to which the batch's are added in place.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

RANKING_WEIGHT = 0.1
SHARPNESS = 0.1  # minus alpha


def plain_objective(logits: Sequence[Tensor], target: Tensor, index: Tensor, sums: Tensor) -> Tensor:
    """The loss, each cross-entropy computed once and nothing leaving the device."""
    weights = [SHARPNESS * torch.logsumexp(x, 1) for x in logits]
    fused = logits[0] * weights[0].unsqueeze(1)
    for x, w in zip(logits[1:], weights[1:], strict=True):
        fused = fused + x * w.unsqueeze(1)
    losses = [F.cross_entropy(x, target, reduction="none") for x in logits]
    loss = F.cross_entropy(fused, target)
    for per_sample in losses:
        loss = loss + per_sample.mean()
    low, high = torch.aminmax(sums, dim=1, keepdim=True)
    kappa = (sums[:, index] - low) / (high - low)
    gap = kappa - kappa.roll(-1, 1)
    for w, g in zip(weights, gap, strict=True):
        loss = loss + RANKING_WEIGHT * F.margin_ranking_loss(w, w.roll(-1) + g, -g.sign())
    sums.index_add_(1, index, torch.stack(losses).detach().to(sums.dtype))
    return loss


def reference_step(
    logits: Sequence[Tensor], target: Tensor, index: Tensor, sums: Tensor
) -> tuple[float, list[Tensor], Tensor]:
    """Loss, gradients and the history afterwards, in float64 on the CPU from the same numbers."""
    rows = [x.detach().cpu().double().requires_grad_() for x in logits]
    target, index, before = target.cpu(), index.cpu(), sums.detach().cpu().double()
    batch, every = len(target), torch.arange(len(target))

    def negative_log_likelihood(x: Tensor) -> Tensor:
        top = x.detach().amax(1, keepdim=True)
        return (x - top).exp().sum(1).log() + top.squeeze(1) - x[every, target]

    weights = torch.stack([SHARPNESS * (negative_log_likelihood(x) + x[every, target]) for x in rows])
    losses = torch.stack([negative_log_likelihood(x) for x in rows])
    fused = torch.stack([w.unsqueeze(1) * x for w, x in zip(weights, rows, strict=True)]).sum(0)
    ranking = torch.zeros((), dtype=torch.float64)
    for m in range(len(rows)):
        span = before[m].max() - before[m].min()
        for i in range(batch):
            j = (i + 1) % batch
            ahead = (before[m, index[i]] - before[m, index[j]]) / span  # min-max scaling cancels the minimum
            apart = weights[m, i] - weights[m, j]
            # The larger history's weight may not exceed the other's by more than the histories differ.
            excess = apart - ahead if ahead > 0 else ahead - apart
            if ahead != 0 and excess > 0:
                ranking = ranking + excess / batch
    loss = losses.sum() / batch + negative_log_likelihood(fused).mean() + RANKING_WEIGHT * ranking
    loss.backward()
    after = before.clone()
    for m in range(len(rows)):
        for i in range(batch):
            after[m, index[i]] += losses[m, i].detach()
    return loss.item(), [x.grad for x in rows if x.grad is not None], after
