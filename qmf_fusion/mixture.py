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
from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from qmf_kernels.eager.fusion import per_modality

from .calibration import CleanData, hold_until_eq_6
from .checks import can_look
from .rows import stack_rows
from .rule import Rule, Weighed, ready_rule
from .typicality import ClassStatistics, RunningStatistics, Statistics, class_distances, untypicality


def _mixture(ratio: Tensor, odds: Tensor, log_prior: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Fused ``[*, K]`` and weights ``[M, *]`` of ``[M, *, K]``, ``[M, *, 1]``, ``[K]`` and ``[M, *]``.

    In plain autograd: with its slopes written down, a training step takes only 3 % less.
    """
    votes = torch.where(counted.unsqueeze(-1), torch.log1p(ratio / odds), 0)
    fused = torch.log_softmax(log_prior + votes.sum(0), -1)
    weights = (fused.exp() * (ratio / (ratio + odds))).sum(-1)
    # A modality alone has exactly this weight. Left to the sum above, roundings would differ from sample to sample, and
    # the ranking loss would take them for an order.
    return fused, torch.where(counted.sum(0) > 1, weights, (1 / (1 + odds)).squeeze(-1))


def _product(ratio: Tensor, odds: Tensor, log_prior: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """The same without agreement, ``prod_m r_m ** (1 / (1 + rho_m))``."""
    trust = 1 / (1 + odds)
    votes = torch.where(counted.unsqueeze(-1), ratio.clamp_min(1e-12).log() * trust, 0)
    return torch.log_softmax(log_prior + votes.sum(0), -1), trust.squeeze(-1)


class ContaminatedProduct(Rule):
    """Fuse logits as a product of experts of which any may be broken; every ingredient has its switch.

    Evidence ``r(y) = (1 - a) * softmax(x)_y / prior_y + a * t(y) / sum_k prior_k t(k)`` with the class-distance
    likelihood ``t(y) ~ (1 + d_y / s) ** -sharpness`` (a Student's t around each class mean, whose heavy tails say
    little about a row far from every class); odds ``rho = odds * (1 + exp(min(u, ceiling) - onset))``.

    Args:
        num_modalities: M.
        num_classes: K.
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
        TypeError, ValueError: a number of the wrong kind, out of its range or not finite.
    """

    num_classes: int

    def __init__(
        self,
        num_modalities: int,
        num_classes: int,
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
        super().__init__(num_modalities)
        if isinstance(num_classes, bool) or not isinstance(num_classes, int):
            raise TypeError(f"num_classes must be an integer, got {num_classes!r}")
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        for demand, holds, values in (
            ("positive", lambda v: v > 0, {"odds": odds, "sharpness": sharpness}),
            ("at least 0", lambda v: v >= 0, {"floor": floor, "spread": spread}),
            ("from 0 to 1", lambda v: 0 <= v <= 1, {"distance_evidence": distance_evidence}),
            ("a number", lambda _: True, {"onset": onset, "ceiling": ceiling}),
        ):
            for name, value in values.items():
                if not math.isfinite(value) or not holds(value):
                    raise ValueError(f"{name} must be finite and {demand}, got {value}")
        self.typicality_norm, self.typicality_distance = typicality_norm, typicality_distance
        self.distance_evidence, self.class_prior, self.agreement = distance_evidence, class_prior, agreement
        self.odds, self.onset, self.ceiling, self.sharpness, self.floor = odds, onset, ceiling, sharpness, floor
        plain = odds * (1 + math.exp(min(min(0.0, ceiling) - onset, 700.0)))
        if not 1e-30 <= plain <= 1e30:  # so that float32 holds them
            raise ValueError(f"odds and onset must make odds of 1e-30 to 1e30 where nothing is untypical, got {plain}")
        self.num_classes, self.gather = num_classes, gather
        self.running = RunningStatistics(num_modalities, num_classes, spread, everywhere)
        self.fitted = ClassStatistics(num_modalities, num_classes, spread)

    def statistics(self) -> Statistics | None:
        """The calibrated ones, else those gathered in training, else None.

        On a device, where to ask which would be to wait for it, those of which nothing follows stand for None.
        """
        fitted, running = self.fitted, self.running
        if can_look(fitted.known):
            chosen = fitted if fitted.known > 0 else running
            return chosen.statistics() if chosen.known > 0 else None
        pairs = zip(fitted.statistics(), running.statistics(), strict=True)
        return Statistics(*(torch.where(fitted.known > 0, f, r) for f, r in pairs))

    def evidence(self, logits: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """What each modality says on its own, of logits ``[M, *, K]``, finite.

        The likelihood ratio ``r`` of each class ``[M, *, K]``, whose mean over the prior is 1, and the untypicality
        ``u`` ``[M, *]``, at least 0. Without statistics, r = K softmax and u = 0.
        """
        probs = torch.softmax(logits, -1)
        if statistics is None:
            return probs * logits.shape[-1], torch.zeros_like(logits[..., 0])
        prior = self.prior(logits, statistics)
        ratio = probs / prior
        distances = class_distances(logits, statistics)
        known = statistics.scale > 0
        if self.distance_evidence:
            usable = per_modality(statistics.seen.any(-1) & known, logits)
            # A class never seen has no distance; where none has been, all are at 0, and nothing is made of it.
            finite = torch.where(usable > 0, distances, 0)
            scale = per_modality(torch.where(known, statistics.scale, 1), logits)
            tail = torch.softmax(-self.sharpness * torch.log1p(finite / scale), -1)
            share = self.distance_evidence * usable
            ratio = (1 - share) * ratio + share * tail / (tail * prior).sum(-1, keepdim=True)
        sees = {"norm": self.typicality_norm, "distance": self.typicality_distance}
        return ratio, untypicality(logits, distances, statistics, **sees, floor=self.floor)

    def odds_of(self, u: Tensor) -> Tensor:
        """rho, broken : clean before the others are heard, which rises with the untypicality u."""
        return self.odds * (1 + torch.exp(u.clamp_max(self.ceiling) - self.onset))

    def prior(self, logits: Tensor, statistics: Statistics | None) -> Tensor:
        """``[K]``; uniform without statistics or ``class_prior``."""
        if statistics is None or not self.class_prior:
            return logits.new_full(logits.shape[-1:], 1 / logits.shape[-1])
        return statistics.prior.to(logits)

    def posterior(self, logits: Tensor, counted: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """Fused log-probabilities ``[*, K]``, 0 where nothing counts, and ``P(clean | all)`` ``[M, *]``.

        Logits ``[M, *, K]`` are finite; False in ``counted`` ``[M, *]`` drops a modality, exactly, with weight 0. No
        statistics make the plain form. A modality held by calibration has that constant weight, and the odds
        ``1 / weight - 1``.
        """
        ratio, u = self.evidence(logits, statistics)
        odds, held = self.odds_of(u), None
        if not can_look(self.calibration.held) or any(self.calibration.held.tolist()):
            held = per_modality(self.calibration.held, odds)
            odds = torch.where(held == 0, odds, (1 / held.clamp(1e-6, 1) - 1).clamp_min(1e-6))
        log_prior = self.prior(logits, statistics).log()
        fused, weights = (_mixture if self.agreement else _product)(ratio, odds.unsqueeze(-1), log_prior, counted)
        if held is not None:
            weights = torch.where(held == 0, weights, held)
        return torch.where(counted.any(0).unsqueeze(-1), fused, 0), torch.where(counted, weights, 0)

    def weigh(self, rows: list[Tensor], present: Tensor | None, *, plain: bool = False) -> Weighed:
        self._check(rows)
        statistics = None if plain else self.statistics()
        with torch.autocast(rows[0].device.type, enabled=False):
            x, counted = stack_rows(rows, present)
            fused, weights = self.posterior(x, counted, statistics)
        return Weighed(rows, counted, ready_rule(weights, fused))

    def _check(self, rows: Sequence[Tensor]) -> None:
        known, got = self.num_classes, rows[0].shape[-1]
        if got != known:
            raise ValueError(f"logits must have the {known} classes of the statistics of robust(), got {got}")

    def uncertainties(self, rows: list[Tensor]) -> Tensor:
        """The untypicality, which the odds rise with: 0 everywhere without statistics."""
        self._check(rows)
        x, finite = stack_rows(rows, None)
        return torch.where(finite, self.evidence(x, self.statistics())[1], torch.nan)

    def observe(self, rows: list[Tensor], target: Tensor, present: Tensor | None, ignore_index: int) -> None:
        """Count a batch in the running statistics, unless that is left to ``calibrate``."""
        if not self.gather:
            return
        self._check(rows)
        with torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
            x, counted = stack_rows([row.detach() for row in rows], present)
            valid = target != ignore_index
            label, counted = torch.where(valid, target, 0), counted & valid
            self.running.update(
                rearrange(x, "m b ... k -> m (b ...) k"),
                rearrange(label, "b ... -> (b ...)"),
                rearrange(counted, "m b ... -> m (b ...)"),
            )

    def calibrate(self, data: CleanData, static: Tensor | None, fit: Sequence[str], confidence: float) -> None:
        if static is not None:
            raise ValueError(
                "static_weights must be None for robust(): its weights are probabilities, not coefficients"
            )
        if fit:
            raise ValueError(f"fit must be empty for this rule, which has no such constants, got {list(fit)}")
        self._check(data.rows)
        self.fitted.fit(
            rearrange(torch.stack(data.rows), "m ... k -> m (...) k"),
            rearrange(data.target, "... -> (...)"),
            rearrange(data.counted, "m ... -> m (...)"),
        )
        # To hold one modality moves the posteriors of the others, their means and their correlations.
        hold_until_eq_6(self.calibration, lambda: self.fuse(data.rows, data.counted)[1], data, confidence, None)

    def reset_calibration(self) -> None:
        """Undo ``calibrate``; statistics gathered in training stay."""
        super().reset_calibration()
        self.fitted.clear()

    def default_static(self, means: Tensor) -> Tensor:
        """Its own mean weights, which no constants could bring to others."""
        return means

    def extra_repr(self) -> str:
        names = "num_classes typicality_norm typicality_distance distance_evidence class_prior agreement"
        return ", ".join(f"{name}={getattr(self, name)}" for name in names.split())
