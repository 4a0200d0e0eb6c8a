"""What rules have in common whose fused logits are an average of logits: weights that sum to 1, and so Theorem 1."""

import torch
from torch import Tensor

from ..lemma_1 import Clamp
from ..rule import Rule

_SHARES = Clamp(nonnegative=True, normalize=True)


class WeightedAverage(Rule):
    """``f = sum_m w[m] * x[m]`` (Eq. 11) with weights that are at least 0 and sum to 1 over what is there.

    A subclass has ``weigh`` and ``uncertainties``.
    """

    @property
    def judged_by(self) -> str:
        return "Theorem 1, by its weights"

    def logits_from(self, rows: list[Tensor], weights: Tensor) -> Tensor:
        return (weights.unsqueeze(-1) * torch.stack(rows)).sum(0)

    def convex_weights(self, weights: Tensor, counted: Tensor) -> Tensor:
        return weights

    def static_fusion(self, rows: list[Tensor], counted: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
        """With constant shares of what is there."""
        weights = _SHARES.static(static.to(rows[0]), counted)
        return self.logits_from(rows, weights), weights
