"""Whether a confidence can be relied on, and how accuracy stands up to noise."""

from collections.abc import Sequence

import torch
from torch import Tensor


def risk_coverage_area(confidence: Tensor, correct: Tensor) -> float:
    """Area under the risk-coverage curve: the mean, over all coverages, of the error among the most confident samples.

    From 0 (no error) to 1; samples of one confidence count as in the mean over their orders.

    Source: Geifman, Uziel and El-Yaniv, *Bias-Reduced Uncertainty Estimation for Deep Neural Classifiers*, ICLR 2019.

    Args:
        confidence: ``[B]``.
        correct: bool ``[B]``.

    Example:
        >>> risk_coverage_area(torch.tensor([0.9, 0.8]), torch.tensor([True, False]))
        0.25
    """
    order = confidence.argsort(descending=True)
    wrong = 1 - correct[order].double()
    _, group, sizes = confidence[order].unique_consecutive(return_inverse=True, return_counts=True)
    means = torch.zeros(len(sizes), dtype=torch.float64).index_add_(0, group, wrong) / sizes
    ranks = torch.arange(1, len(wrong) + 1, dtype=torch.float64)
    return float((means[group].cumsum(0) / ranks).mean())


def calibration_error(probabilities: Tensor, target: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of confidence.

    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., ICML 2017 (15 bins).

    Args:
        probabilities: ``[B, K]``.
        target: int ``[B]``.
        bins: of equal width.
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    return float(multiclass_calibration_error(probabilities, target, probabilities.shape[1], n_bins=bins, norm="l1"))


def damage_detection(weights: Tensor, damaged: Tensor) -> float | None:
    """Area under the ROC curve of "this modality is damaged" as small weights say it, averaged over modalities.

    Args:
        weights: ``[V, B]``.
        damaged: bool ``[V, B]``.

    Returns:
        From 0 to 1; 0.5 is chance. None where no modality is damaged in some of the samples and whole in others.

    Example:
        >>> damage_detection(torch.tensor([[0.1, 0.9, 0.3]]), torch.tensor([[True, False, False]]))
        1.0
    """
    from torchmetrics.functional.classification import binary_auroc

    found = []
    for w, hit in zip(weights.double(), damaged, strict=True):
        if bool(hit.any()) and not bool(hit.all()):
            # Into [0, 1], as torchmetrics takes whatever lies outside for logits, whose sigmoid would make ties.
            span = (w.max() - w.min()).clamp_min(torch.finfo(w.dtype).tiny)
            found.append(float(binary_auroc((w.max() - w) / span, hit.long())))
    return sum(found) / len(found) if found else None


def relative_robustness(levels: Sequence[float], accuracies: Sequence[float]) -> float | None:
    """Area under accuracy over noise, the levels scaled to reach from 0 to 1; None for fewer than two levels.

    Source: Liang et al., *MultiBench*, NeurIPS 2021 (trapezoids, as in its code).

    Example:
        >>> round(relative_robustness([0, 5, 10], [0.9, 0.7, 0.3]), 3)
        0.65
    """
    if len(levels) < 2:
        return None
    areas = [(accuracies[n] + accuracies[n + 1]) / 2 * (levels[n + 1] - levels[n]) for n in range(len(levels) - 1)]
    return sum(areas) / (levels[-1] - levels[0])


def effective_robustness(accuracies: Sequence[float], late_fusion: Sequence[float]) -> float | None:
    """By how much accuracy falls less than late fusion's does, added up over levels; None for fewer than two levels.

    Both are taken from their first level, so that a head start counts for nothing.

    Source: Liang et al., *MultiBench*, NeurIPS 2021 (a sum over levels, as in its code).

    Example:
        >>> round(effective_robustness([0.9, 0.8, 0.6], [0.8, 0.6, 0.4]), 3)
        0.2
    """
    if len(accuracies) < 2:
        return None
    return sum(
        (ours - accuracies[0]) - (late - late_fusion[0]) for ours, late in zip(accuracies, late_fusion, strict=True)
    )
