"""Figures over seeds, and the correlation of weight and loss."""

import statistics
from collections.abc import Sequence

from torch import Tensor

from qmf_fusion.correlation import pearson


def over_seeds(values: Sequence[float]) -> tuple[float, float | None, float]:
    """Mean, sample standard deviation (None for one value) and the smallest."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None, min(values)


def mean_or_none(values: Sequence[float | None]) -> float | None:
    """The mean of those that are there."""
    there = [value for value in values if value is not None]
    return statistics.fmean(there) if there else None


def correlation(weights: Tensor, losses: Tensor) -> float | None:
    """The correlation over samples of each view's weight and loss (the paper's Table 3), averaged over views.

    Args:
        weights: ``[V, B]``.
        losses: ``[V, B]``, each view's own cross-entropy.

    Returns:
        From -1 (as it should be: the larger the loss, the smaller the weight) to 1; None where in no view both vary.

    Example:
        >>> import torch
        >>> round(correlation(torch.tensor([[3.0, 2.0, 1.0]]), torch.tensor([[0.0, 1.0, 3.0]])), 3)
        -0.982
    """
    found = [float(pearson(w, x)) for w, x in zip(weights.cpu(), losses.cpu(), strict=True)]
    # ``pearson`` says 0 where nothing varies.
    return mean_or_none([r if r else None for r in found])
