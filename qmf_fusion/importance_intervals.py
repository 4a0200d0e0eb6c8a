"""An interval for how much each modality brings to one sample, before its class is known.

The Shapley value of a sample, ``phi_m(x, y)`` (``qmf_fusion.importance``), needs its true class y. Before that is
known, the fused answer p(y | x) says what to expect and how sure to be of it:

    ``e_m = sum_y q(y) phi_m(x, y)``,  ``s_m^2 = sum_y q(y) (phi_m(x, y) - e_m)^2``,
    ``q = coverage * p + (1 - coverage) / K``

The part of q that is the same for all classes keeps ``s_m`` above 0 where heads are too sure of themselves: by
construction they may be wrong that often. Nothing else depends on q being right, since split conformal prediction sees
to the coverage: on held-out samples the score is ``|phi_m(x, y) - e_m| / s_m``, r_m the k-th smallest of the n scores
of samples that have the modality, ``k = ceil((n + 1) * coverage)``, and the interval of a new sample ``e_m +- r_m
s_m``.

**What is guaranteed.** If the new sample is exchangeable with the calibration samples, the interval of modality m holds
``phi_m(x, y)`` with a probability of at least ``coverage``, and of at most ``coverage + 1 / (n + 1)`` where scores do
not tie (those of accuracy do): each modality's by itself, on average over samples that have it, for any heads and any
rule. Under shift it is not.

Intervals of this kind were proposed by Chandy, Johnson, Shen, Mehrotra, Zhou, Zhou and Dai, *Uncertainty-Aware
Multimodal Learning via Conformal Shapley Intervals*, 2026 (arXiv 2602.00171): Shapley values of modalities with
conformal inference, and a selection of modalities upon them. The construction here was derived from that idea, not from
the paper's text: theirs trains a predictor for each subset, this one asks one fusion what it would say; centre, scale
and score above are this package's own, as is the test in ``qmf_fusion.selection``.
"""

import math
from typing import NamedTuple, Self

import torch
from torch import Tensor

from .checks import Logits, Present
from .conformal import Calibrated, conformal_quantile
from .fusion import Heads, QualityAwareFusion
from .importance import Worth, attribute, check_worth, of_target, worth_of
from .subsets import HeldOut, check_classes, check_held_out, subset_answers


class ShapleyInterval(NamedTuple):
    """Of N samples, ``[M, N]`` each, float64, on the CPU; 0 throughout for a modality that a sample lacks."""

    low: Tensor
    high: Tensor
    expected: Tensor
    """The centre: what the fused answer itself expects of the modality."""


class _Expected(NamedTuple):
    by_class: Tensor  # ``[M, N, K]``
    mean: Tensor  # ``[M, N]``
    deviation: Tensor  # ``[M, N]``
    present: Tensor  # bool ``[M, N]``


class ShapleyIntervals(Calibrated):
    """Conformal intervals of the Shapley values of single samples.

    It refers to the fusion, which the model owns, and has only its own state, ``radius``, which ``state_dict`` keeps.

    Args:
        fusion: any fusion of this package.
        coverage: the wanted probability that an interval holds the sample's value, between 0 and 1.
        value: as ``shapley_importance`` takes it.
        prior: as ``shapley_importance`` takes it.

    Raises:
        TypeError, ValueError: arguments of the wrong kind or range.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> target = torch.randint(4, (500,), generator=g)
        >>> heads = 2 * torch.randn(2, 500, 4, generator=g) + 3 * torch.nn.functional.one_hot(target, 4)
        >>> fusion = QualityAwareFusion(2)
        >>> intervals = ShapleyIntervals(fusion, coverage=0.9).calibrate(heads[:, :400], target[:400])
        >>> low, high, expected = intervals(heads[:, 400:])
        >>> bool((low <= expected).all()), low.shape
        (True, torch.Size([2, 100]))
    """

    radius: Tensor
    """float64 ``[M]``, in deviations of what the fused answer expects; NaN before ``calibrate``."""

    def __init__(
        self,
        fusion: QualityAwareFusion,
        coverage: float = 0.9,
        value: str | Worth = "log_loss",
        prior: Tensor | None = None,
    ) -> None:
        super().__init__(fusion, coverage, prior)
        self.worth = check_worth(value)
        unknown = torch.full((fusion.num_modalities,), math.nan, dtype=torch.float64, device="cpu")
        self.register_buffer("radius", unknown)

    @torch.no_grad()
    def calibrate(
        self, logits: Heads, target: Tensor, *, present: Present | None = None, features: Logits | None = None
    ) -> Self:
        """Find the radius of each modality on data that neither the heads nor ``fusion.calibrate`` have seen.

        Args:
            logits: the heads' logits, ``[N, K]`` each, as the fusion takes them.
            target: int ``[N]``, classes 0 to K - 1.
            present: as the fusion takes it.
            features: as the fusion takes them.

        Raises:
            TypeError, ValueError, IndexError: arguments of the wrong kind, count, shape, dtype, device or range; values
                that are not finite for every class.
        """
        held = check_held_out(self.fusion, logits, present, features, self.prior)
        target = check_classes(target, held)
        found = self._expect(held)
        own = torch.stack([of_target(each, target) for each in found.by_class])
        # A value that is the same whatever the class is known for sure.
        scores = torch.where(found.deviation > 0, (own - found.mean).abs() / found.deviation, 0)
        for m, (score, there) in enumerate(zip(scores, found.present, strict=True)):
            self.radius[m] = conformal_quantile(score[there], self.coverage) if bool(there.any()) else math.inf
        return self

    @torch.no_grad()
    def forward(self, logits: Heads, present: Present | None = None, features: Logits | None = None) -> ShapleyInterval:
        """The intervals of N samples; infinite where there were too few calibration samples.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device.
            RuntimeError: not calibrated.
        """
        if bool(self.radius.isnan().any()):
            raise RuntimeError("calibrate() these intervals first: they have no radius")
        found = self._expect(check_held_out(self.fusion, logits, present, features, self.prior))
        radius = self.radius.cpu().double().unsqueeze(-1)
        half = torch.where(found.deviation > 0, radius * found.deviation, 0)
        return ShapleyInterval(found.mean - half, found.mean + half, found.mean)

    def _expect(self, held: HeldOut) -> _Expected:
        """What the value of each modality is by class, and what the fused answer expects of it."""
        by_class, _ = attribute(self.fusion, held, lambda fused: worth_of(self.worth, fused))
        if not bool(torch.isfinite(by_class).all()):
            raise ValueError("value must be finite for every class, which the log-loss is not where logits are -inf")
        *_, full = subset_answers(self.fusion, held, torch.ones(1, self.fusion.num_modalities, dtype=torch.bool))
        chance = (1 - self.coverage) / full.logits.shape[-1]
        q = self.coverage * full.logits.softmax(-1) + chance
        mean = (q * by_class).sum(-1)
        deviation = (q * (by_class - mean.unsqueeze(-1)).square()).sum(-1).sqrt()
        there = full.present
        return _Expected(by_class, torch.where(there, mean, 0), torch.where(there, deviation, 0), there)
