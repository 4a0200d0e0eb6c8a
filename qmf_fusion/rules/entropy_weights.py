"""Weights from entropies, at test time (MLA; Zhang et al., CVPR 2024)."""

import torch
from torch import Tensor

from qmf_kernels import WeightRule, clamp_weights

from ..precision import without_autocast
from ..rows import Features, stack_rows
from ..rule import Weighed
from ..uncertainty import entropy, entropy_uncertainty
from .weighted_average import WeightedAverage


class EntropyWeights(WeightedAverage):
    """MLA's fusion: logits averaged with weights ``w = softmax(-H)`` over the modalities that are there.

    H is the entropy of each modality's softmax in nats, so that a modality is worth at most K times another.

    Weights are of the test, as published: in training they are computed alike, and the gradient of the fused logits
    stops at them (a ranking's does not: ``ranking_weight=0``). MLA trains each head by its own cross-entropy, in turn,
    on a classifier that they share; that is no part of this rule, which fuses heads however trained. Nothing is learned
    and there is nothing to calibrate. Noise that makes a head sure is trusted.

    Args:
        num_modalities: M.

    A row with any value that is not finite is absent.

    Source: Zhang, Yoon, Bansal and Yao, *Multimodal Representation Learning by Alternating Unimodal Adaptation*, CVPR
    2024, by its equation, for each sample by itself. The published code takes the softmax over the batch instead of the
    classes, and adds up: one weight for all samples, which depends on which samples are tested together.

    Example:
        >>> from qmf_fusion import QualityAwareFusion
        >>> fusion = QualityAwareFusion(["rgb", "depth"], combine="entropy_weights")
        >>> out = fusion({"rgb": torch.tensor([[4.0, 0.0]]), "depth": torch.tensor([[0.0, 1.0]])})
        >>> out.weights
        tensor([[0.6206],
                [0.3794]])
    """

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        with without_autocast(rows[0].device):
            x, counted = stack_rows(rows, present)
            weights = clamp_weights(torch.exp(-entropy(x)), counted, nonnegative=True, normalize=True)
            one = weights.new_ones(len(weights))
            return Weighed(x.unbind(0), counted, WeightRule(weights, one, torch.zeros_like(one), None, detach=True))

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """The entropy over its maximum."""
        x, counted = stack_rows(rows, None)
        return torch.where(counted, entropy_uncertainty(x), torch.nan)
