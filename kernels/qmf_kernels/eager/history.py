"""The loss history behind kappa (Eq. 14): recording a batch, reading means, and their range, in plain PyTorch.

Shape contract: ``history`` ``[2, M, N]`` float64 holds, per modality and sample, the sum of the losses recorded and
their count; ``low`` and ``span`` ``[M, 1]`` float64 hold the smallest mean loss over the samples that have one, and how
far above it the largest lies (``find_range`` sets them for a history from elsewhere, an empty one too). ``losses`` is
``[M, B]``, ``index`` int64 ``[B]`` within N, ``visits`` ``[N]`` int64 or None.
"""

import math

import torch
from torch import Tensor

# Entries, M * N, up to which to look at all of them is cheaper than to ask whether the range may have moved.
SCAN = 16_384


def kappa(history: Tensor, low: Tensor, span: Tensor, index: Tensor, minmax: bool) -> Tensor:
    """Mean recorded losses of the samples ``index`` (Eq. 14), ``[M, B]``, NaN without any; scaled if ``minmax``."""
    mean = _means(history.gather(2, _everywhere(index, history)))
    return mean.sub_(low).div_(span) if minmax else mean


def record(
    history: Tensor, low: Tensor, span: Tensor, visits: Tensor | None, start_epoch: int, losses: Tensor, index: Tensor
) -> None:
    """Add ``losses`` to the sums, in place, and bring ``low`` and ``span`` up to date.

    A loss that is not finite is left out, and so are those of a sample's first ``start_epoch - 1`` visits, of which one
    batch may hold several, in its order.
    """
    everywhere = _everywhere(index, history)
    if visits is None and losses.is_cpu and math.isfinite(losses.sum().item()):
        # Concatenation widens the losses on the way.
        update = torch.cat([losses.unsqueeze(0), history.new_ones((1, *losses.shape))])
    else:
        counted = torch.isfinite(losses)
        if visits is not None:
            counted = counted & (visits[index] + _earlier(index) >= start_epoch - 1)
            visits.index_add_(0, index, torch.ones_like(index))
        update = torch.stack([torch.where(counted, losses, 0), counted]).to(history.dtype)
    # On a device, to ask would be to wait.
    if history.shape[1] * history.shape[2] <= SCAN or not index.is_cpu:
        history.scatter_add_(2, everywhere, update)
        find_range(history, low, span)
        return
    # A batch rarely moves the range: not while its samples lie strictly inside, before and after.
    before = history.gather(2, everywhere)
    after = history.scatter_add_(2, everywhere, update).gather(2, everywhere)
    scaled = (_means(torch.cat([before, after], 2)) - low) / span
    least, most = torch.aminmax(scaled.nan_to_num_(nan=0.5))
    if not (least.item() > 0 and most.item() < 1):
        find_range(history, low, span)


def _earlier(index: Tensor) -> Tensor:
    """How many times each sample of the batch stands in it before, ``[B]``."""
    order = index.argsort(stable=True)
    ordered = index[order]
    place = torch.arange(len(index), device=index.device) - torch.searchsorted(ordered, ordered)
    return torch.empty_like(order).scatter_(0, order, place)


def find_range(history: Tensor, low: Tensor, span: Tensor) -> None:
    """Set ``low`` and ``span`` from the whole history."""
    mean = _means(history)
    low.copy_(torch.nan_to_num(mean, nan=torch.inf).amin(1, keepdim=True))
    high = torch.nan_to_num(mean, nan=-torch.inf).amax(1, keepdim=True)
    # Where all means are equal, or there are none, 0 / 0 would follow: their distance to ``low`` is 0 or NaN.
    torch.clamp(high - low, min=torch.finfo(mean.dtype).tiny, out=span)


def _means(history: Tensor) -> Tensor:
    total, count = history.unbind(0)
    return total / count  # 0 / 0, NaN, where nothing is recorded


def _everywhere(index: Tensor, history: Tensor) -> Tensor:
    return index.expand(2, history.shape[1], -1)
