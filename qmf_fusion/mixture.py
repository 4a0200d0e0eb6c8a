"""The contaminated product of experts: the rule of ``QualityAwareFusion.robust``.

Every modality is clean or broken, independently, with odds ``rho`` (broken : clean) that rise with its
untypicality ``u``. A clean modality speaks for class y with the likelihood ratio ``r(y)``; a broken one says nothing
about the class, whatever it shows: noise, a blank, another sample's data. Hence, exactly,

    ``p(y | all)  ~  prior(y) * prod_m (r_m(y) + rho_m)``
    ``w_m = P(m is clean | all) = sum_y p(y | all) * r_m(y) / (r_m(y) + rho_m)``

Small odds give a product of experts, large ones a linear pool with weights 1 / rho. A modality's vote is bounded by
``log(1 + max r / rho)``, so that the others can outvote it: agreement needs no leave-one-out sums and any M will do.
``w_m`` has the form ``A / (A + rho_m * B)`` with A and B free of rho_m, and so never rises with u (the place of Eq. 9).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .typicality import ClassStatistics, RunningStatistics, Statistics, check_num_classes, class_distances, untypicality


class Evidence(NamedTuple):
    """What each modality says on its own."""

    ratio: Tensor
    """``[M, *, K]``: the likelihood ratio r of each class; its mean over the prior is 1."""
    untypical: Tensor
    """``[M, *]``: u, at least 0."""
    odds: Tensor
    """``[M, *]``: rho, broken : clean, before the others are heard."""


class ContaminatedProduct(nn.Module):
    """Fuse logits as a product of experts of which any may be broken; every ingredient has its switch.

    Evidence ``r(y) = (1 - a) * softmax(x)_y / prior_y + a * t(y) / sum_k prior_k t(k)`` with the class-distance
    likelihood ``t(y) ~ (1 + d_y / s) ** -sharpness`` (a Student's t around each class mean, whose heavy tails say
    little about a row far from every class); odds ``rho = odds * (1 + exp(min(u, ceiling) - onset))``.

    Args:
        num_modalities: M.
        typicality_norm: u sees the two-sided z-score of the log-norm.
        typicality_distance: u sees the z-score of the distance to the nearest class.
        distance_evidence: a, the share of the class-distance likelihood in r, from 0 to 1; 0 leaves the softmax.
        class_prior: divide the class frequencies out of every modality and put them back once.
        agreement: the mixture above. False: a weighted product, ``prod_m r_m ** (1 / (1 + rho_m))``, in which no
            modality can outvote another.
        odds: rho at u far below ``onset``; where nothing is untypical it must come to 1e-30 to 1e30.
        onset: the u at which rho has doubled and starts to rise.
        ceiling: the u at which it stops.
        sharpness: the tail's exponent.
        spread: the least variance within a class that the statistics are believed to have, as a share of that between.
        floor: the least standard deviation of a logarithm that they are believed to have.
        gather: let ``QMFLoss`` gather running statistics in training, at the cost of factorising a ``[K, K]`` matrix
            per modality and step. False leaves them to ``calibrate``.
        everywhere: where ``torch.distributed`` is initialised, gather over all its processes, step by step, as
            ``SyncBatchNorm`` does (so every process takes the same number of steps). False keeps each to its own
            samples, without a collective.

    Raises:
        ValueError: a number out of its range or not finite.
    """

    def __init__(
        self,
        num_modalities: int,
        *,
        typicality_norm: bool = True,
        typicality_distance: bool = True,
        distance_evidence: float = 0.5,
        class_prior: bool = True,
        agreement: bool = True,
        odds: float = 0.3,
        onset: float = 3.0,
        ceiling: float = 6.0,
        sharpness: float = 5.0,
        spread: float = 0.1,
        floor: float = 0.3,
        gather: bool = True,
        everywhere: bool = True,
    ) -> None:
        super().__init__()
        anything, at_least_0, positive = (lambda _: True), (lambda v: v >= 0), (lambda v: v > 0)
        for name, value, demand, holds in (
            ("odds", odds, "positive", positive),
            ("sharpness", sharpness, "positive", positive),
            ("floor", floor, "at least 0", at_least_0),
            ("spread", spread, "at least 0", at_least_0),
            ("distance_evidence", distance_evidence, "from 0 to 1", lambda v: 0 <= v <= 1),
            ("onset", onset, "a number", anything),
            ("ceiling", ceiling, "a number", anything),
        ):
            if not math.isfinite(value) or not holds(value):
                raise ValueError(f"{name} must be finite and {demand}, got {value}")
        self.typicality_norm, self.typicality_distance = typicality_norm, typicality_distance
        self.distance_evidence, self.class_prior, self.agreement = distance_evidence, class_prior, agreement
        self.odds, self.onset, self.ceiling, self.sharpness, self.floor = odds, onset, ceiling, sharpness, floor
        if not 1e-30 <= self.plain_odds <= 1e30:  # so that float32 holds them
            raise ValueError(
                f"odds and onset must make odds of 1e-30 to 1e30 where nothing is untypical, got {self.plain_odds}"
            )
        self.gather = gather
        self.running = RunningStatistics(num_modalities, spread, everywhere)
        self.fitted = ClassStatistics(num_modalities, spread)

    def statistics(self) -> Statistics | None:
        """The calibrated ones, else those gathered in training, else None."""
        fitted = self.fitted.statistics()
        return self.running.statistics() if fitted is None else fitted

    def evidence(self, logits: Tensor, statistics: Statistics | None) -> Evidence:
        """What each modality says: logits ``[M, *, K]``, finite. Without statistics, r = K softmax and u = 0."""
        probs = torch.softmax(logits, -1)
        if statistics is None:
            ratio, u = probs * logits.shape[-1], torch.zeros_like(logits[..., 0])
            return Evidence(ratio, u, self._odds(u))
        check_num_classes(logits, statistics.prior)
        per_modality = (-1, *(1,) * (logits.dim() - 1))
        prior = self.prior(logits, statistics)
        ratio = probs / prior
        distances = class_distances(logits, statistics)
        known = statistics.scale > 0
        if self.distance_evidence:
            usable = statistics.seen.any(-1) & known
            # A class never seen has no distance; where none has been, all are at 0, and nothing is made of it.
            finite = torch.where(usable.view(per_modality), distances, 0)
            scale = torch.where(known, statistics.scale, 1).to(logits).view(per_modality)
            tail = torch.softmax(-self.sharpness * torch.log1p(finite / scale), -1)
            share = self.distance_evidence * usable.to(logits.dtype).view(per_modality)
            ratio = (1 - share) * ratio + share * tail / (tail * prior).sum(-1, keepdim=True)
        u = untypicality(
            logits,
            distances,
            statistics,
            norm=self.typicality_norm,
            distance=self.typicality_distance,
            floor=self.floor,
        )
        return Evidence(ratio, u, self._odds(u))

    @property
    def plain_odds(self) -> float:
        """The odds of a modality that is not untypical, as all are without statistics."""
        return self.odds * (1 + math.exp(min(min(0.0, self.ceiling) - self.onset, 700.0)))

    def _odds(self, u: Tensor) -> Tensor:
        return self.odds * (1 + torch.exp(u.clamp_max(self.ceiling) - self.onset))

    def prior(self, logits: Tensor, statistics: Statistics | None) -> Tensor:
        """``[K]``; uniform without statistics or ``class_prior``."""
        if statistics is None or not self.class_prior:
            return logits.new_full(logits.shape[-1:], 1 / logits.shape[-1])
        return statistics.prior.to(logits)

    def forward(self, logits: Tensor, counted: Tensor, static: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Fuse.

        Args:
            logits: ``[M, *, K]``, finite; what they are where they do not count does not matter.
            counted: bool ``[M, *]``; False drops the modality, exactly.
            static: ``[M]``; where not NaN, the modality has this constant weight (odds ``1 / weight - 1``) instead.

        Returns:
            Fused log-probabilities ``[*, K]``, and ``P(clean | all)`` ``[M, *]``, 0 where a modality does not count.
        """
        statistics = self.statistics()
        ratio, _, odds = self.evidence(logits, statistics)
        if static is not None:
            fixed = static.to(logits).view(-1, *(1,) * (odds.dim() - 1))
            odds = torch.where(torch.isnan(fixed), odds, 1 / fixed.clamp(1e-6, 1) - 1).clamp_min(1e-6)
        odds = odds.unsqueeze(-1)
        votes = torch.log1p(ratio / odds) if self.agreement else ratio.clamp_min(1e-12).log() / (1 + odds)
        votes = torch.where(counted.unsqueeze(-1), votes, 0)
        fused = torch.log_softmax(self.prior(logits, statistics).log() + votes.sum(0), -1)
        weights = (fused.exp() * ratio / (ratio + odds)).sum(-1) if self.agreement else 1 / (1 + odds.squeeze(-1))
        if static is not None:
            weights = torch.where(torch.isnan(fixed), weights, fixed)
        return fused, torch.where(counted, weights, 0)

    def extra_repr(self) -> str:
        names = ("typicality_norm", "typicality_distance", "distance_evidence", "class_prior", "agreement")
        return ", ".join(f"{name}={getattr(self, name)}" for name in names)
