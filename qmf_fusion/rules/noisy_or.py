"""Noisy-or of the modalities' probabilities, whose logits shrink where entropy is untypical (UNO; ICRA 2020)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from qmf_kernels.eager.fusion import per_modality

from ..calibration import CleanData
from ..precision import KeepsPrecision, without_autocast
from ..rows import Features, stack_rows
from ..rule import Rule, Weighed, ready_rule
from ..uncertainty import entropy, entropy_uncertainty


def noisy_or(x: Tensor, counted: Tensor) -> Tensor:
    """``log`` of the normalised ``q(y) = 1 - prod_m (1 - p_m(y))``, ``[*, K]``; 0 where no modality counts.

    As ``q = p_1 + (1 - p_1) p_2 + (1 - p_1)(1 - p_2) p_3 + ...`` by logarithms, whose terms are all positive: neither
    probabilities near 1 nor such that underflow lose a digit.

    Args:
        x: logits ``[M, *, K]``, finite.
        counted: bool ``[M, *]``.

    Example:
        >>> x = torch.tensor([[0.8, 0.2], [0.7, 0.3]]).log()
        >>> noisy_or(x, torch.ones(2, dtype=torch.bool)).exp()  # of 0.94 and 0.44
        tensor([0.6812, 0.3188])
    """
    least = torch.finfo(x.dtype).min
    log_probs = torch.log_softmax(x, -1)
    # log(1 - p): by the other classes' sum for the likeliest class, whose own p may round to 1; else p is at most 1/2.
    top = torch.zeros_like(x, dtype=torch.bool).scatter(-1, x.argmax(-1, keepdim=True), True)
    rest = torch.logsumexp(log_probs.masked_fill(top, least), -1, keepdim=True)
    log_not = torch.where(top, rest, torch.log1p(-log_probs.masked_fill(top, least).exp()))
    log_not = torch.where(counted.unsqueeze(-1), log_not, 0)
    before = torch.cat([torch.zeros_like(log_not[:1]), log_not[:-1].cumsum(0)])
    either = torch.logsumexp(torch.where(counted.unsqueeze(-1), log_probs + before, least), 0)
    return torch.where(counted.any(0).unsqueeze(-1), torch.log_softmax(either, -1), 0)


class NoisyOr(KeepsPrecision, Rule):
    """UNO: a class is there if any modality sees it; logits shrink by how far their entropy exceeds what is typical.

    ``q(y) = 1 - prod_m (1 - p_m(y))``, normalised over the classes, of ``p_m = softmax(d_m * x_m)`` with the deviation
    ratio ``d = mu / (mu + max(0, H - mu - sigma))``: H the row's entropy in nats, mu and sigma its mean and standard
    deviation on clean data. ``calibrate`` measures them, on held-out data; before, and in ``QMFLoss`` in training, d is
    1. Weights are d, from 0 to 1: how much of its logits a modality is left with. Fused logits are log-probabilities.
    It trains by Eq. 18.

    One modality that is sure wins whatever the others say, and two that are sure of different classes share: entropy
    sees a modality that is sure of nothing, not one that is sure of something wrong.

    Args:
        num_modalities: M.

    A row with any value that is not finite is absent.

    Source: Tian, Cheung, Glaser, Liu and Kira, *UNO: Uncertainty-Aware Noisy-Or Multimodal Fusion for Unanticipated
    Input Degradation*, ICRA 2020, as far as the code published with it goes. Left out: deviation ratios of the measures
    that take several passes with dropout, the learned temperature of each pixel, the recalibration by class priors, and
    the mean of entropies over an image: in dense prediction each position has its own ratio.

    Example:
        >>> from qmf_fusion import QualityAwareFusion
        >>> fusion = QualityAwareFusion(["rgb", "depth"], combine="noisy_or")
        >>> fusion({"rgb": torch.tensor([[4.0, 0.0]]), "depth": torch.tensor([[0.0, 1.0]])}).logits.exp()
        tensor([[0.5728, 0.4272]])
    """

    typical: Tensor
    gives_log_probabilities = True
    takes_clean_statistics = True

    def __init__(self, num_modalities: int) -> None:
        super().__init__(num_modalities)
        # Each modality's mean and standard deviation of the entropy, and 1 where they are known.
        self.register_buffer("typical", torch.zeros(num_modalities, 3, dtype=torch.float64, device="cpu"))

    def deviation_ratio(self, x: Tensor) -> Tensor:
        """How much is left of logits ``[M, *, K]``, ``[M, *]``; 1 where nothing is known."""
        h = entropy(x)
        mean, spread, known = (per_modality(each, h) for each in self.typical.unbind(-1))
        total = mean + (h - mean - spread).relu()
        # Of a modality that is always sure, any entropy is infinitely untypical, and none is typical.
        return torch.where((known > 0) & (total > 0), mean / torch.where(total > 0, total, 1), 1)

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        with without_autocast(rows[0].device):
            x, counted = stack_rows(rows, present)
            ratio = torch.ones_like(x[..., 0]) if plain else self.deviation_ratio(x)
            fused = noisy_or(ratio.unsqueeze(-1) * x, counted)
            return Weighed(x.unbind(0), counted, ready_rule(torch.where(counted, ratio, 0), fused))

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """The entropy over its maximum."""
        x, counted = stack_rows(rows, None)
        return torch.where(counted, entropy_uncertainty(x), torch.nan)

    def calibrate(self, data: CleanData, static: Tensor | None, fit: Sequence[str], confidence: float) -> None:
        """Measure what entropy is typical. Theorem 2's conditions are of other rules."""
        if static is not None or fit:
            raise ValueError(
                "static_weights and fit must be left out for noisy_or: calibrate measures what entropy is typical"
            )
        h = entropy(torch.stack(data.rows))
        mean = data.mean(h)
        spread = data.mean((h - per_modality(mean, h)).square()).sqrt()
        self.typical.copy_(torch.stack([mean, spread, torch.ones_like(mean)], -1))

    def reset_calibration(self) -> None:
        super().reset_calibration()
        self.typical.zero_()
