"""The contaminated product of experts: the rule of ``QualityAwareFusion.robust``.

Every modality is clean or broken, independently, with odds ``rho`` (broken : clean) that rise with its
untypicality ``u``. A clean modality speaks for class y with the likelihood ratio ``r(y)``; a broken one says nothing
about the class, whatever it shows: noise, a blank, another sample's data. Hence, exactly,

    ``p(y | all)  ~  prod_m (r_m(y) + rho_m)``
    ``w_m = P(m is clean | all) = sum_y p(y | all) * r_m(y) / (r_m(y) + rho_m)``

Small odds give a product of experts, large ones a linear pool with weights 1 / rho. A modality's vote is bounded by
``log(1 + max r / rho)``, so that the others can outvote it: agreement needs no leave-one-out sums and any M will do.
``w_m`` has the form ``A / (A + rho_m * B)`` with A and B free of rho_m, and so never rises with u (the place of Eq. 9).
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from qmf_kernels.eager.fusion import per_modality

from .calibration import CleanData, hold_until_eq_6
from .checks import can_look, check_integer, check_number, check_widths
from .coefficients import Coefficient, own_coefficient
from .evidential import evidential
from .precision import KeepsPrecision, without_autocast
from .rows import Features, stack_rows
from .rule import Rule, Weighed, ready_rule
from .typicality import (
    LARGEST,
    OWN,
    SIZE,
    CleanStatistics,
    Statistics,
    Sums,
    class_distances,
    untypicality,
)
from .warn import warn_user


class Stacked(NamedTuple):
    """A batch as the rule computes with it."""

    x: Tensor  # ``[M, *, K]``: logits, float32 or float64; 0 where they do not count
    counted: Tensor | None  # ``[M, *]`` bool: present, with finite logits and features; None: all are
    features: Features  # ``[*, D]`` for each modality that has any: without gradients, 0 where they are not finite

    def where_counted(self, values: Tensor, other: float) -> Tensor:
        """``[M, *]``."""
        return values if self.counted is None else torch.where(self.counted, values, other)


def _mixture(probs: Tensor, odds: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """Fused ``[*, K]`` and weights ``[M, *]`` of likelihoods ``[M, *, K]``, odds ``[M, *, 1]`` and ``[M, *]``.

    In plain autograd: with its slopes written down, a training step takes only 3 % less.
    """
    share = odds / probs.shape[-1]  # r is K times the likelihood
    either = probs + share
    votes = either.log()
    if counted is not None:
        votes = votes * counted.unsqueeze(-1).to(votes.dtype)  # all of them finite
    fused = torch.log_softmax(votes.sum(0), -1)
    weights = (fused.exp() * (probs / either)).sum(-1)
    # A modality alone has exactly this weight. Left to the sum above, roundings would differ from sample to sample, and
    # the ranking loss would take them for an order.
    alone = (1 / (1 + odds)).squeeze(-1)
    if counted is None:
        return fused, weights if len(probs) > 1 else alone
    return fused, torch.where(counted.sum(0) > 1, weights, alone)


def _product(probs: Tensor, odds: Tensor, counted: Tensor | None) -> tuple[Tensor, Tensor]:
    """The same without agreement, ``prod_m r_m ** (1 / (1 + rho_m))``."""
    trust = 1 / (1 + odds)
    votes = (probs * probs.shape[-1]).clamp_min(1e-12).log() * trust
    if counted is not None:
        votes = torch.where(counted.unsqueeze(-1), votes, 0)
    return torch.log_softmax(votes.sum(0), -1), trust.squeeze(-1)


class ContaminatedProduct(KeepsPrecision, Rule):
    """Fuse logits as a product of experts of which any may be broken; every ingredient has its switch.

    Evidence ``r(y) = K * ((1 - a) * p(y) + a * t(y))`` with the head's likelihood p, ``softmax(z)`` of the evidential
    ``z = log(1 + softplus(x))``, and the class-distance likelihood ``t(y) ~ (1 + d_y / s) ** -5`` (a Student's t around
    each class mean, whose heavy tails say little about a row far from every class); odds
    ``rho = odds * (1 + exp(min(u, ceiling) - onset))``. All unimodal losses are of z.

    Args:
        num_modalities: M.
        num_classes: K.
        features: the width of each modality's features, None for one without; None for no features at all.
        evidential: z as above; False takes z = x, the usual softmax.
        typicality_norm: u sees the two-sided z-score of the log-norm.
        typicality_distance: u sees the z-score of the distance to the nearest class.
        distance_evidence: a, the share of the class-distance likelihood in r, from 0 to 1; 0 leaves the head's.
        agreement: the mixture above. False: a weighted product, ``prod_m r_m ** (1 / (1 + rho_m))``, in which no
            modality can outvote another.
        odds: rho at u far below ``onset``, a number or one per modality; where nothing is untypical it must come to
            1e-30 to 1e30. Kept in ``state_dict``; ``set_odds`` sets others.
        onset: the u at which rho has doubled and starts to rise.
        ceiling: the u at which it stops.
        floor: the least standard deviation of a logarithm of logits that the statistics are believed to have; below
            1e-5, which roundings make of equal ones, it is taken for that.
        gather: let ``QMFLoss`` gather running statistics in training. False leaves them to ``calibrate``.
        everywhere: where ``torch.distributed`` is initialised, gather over all its processes, step by step, as
            ``SyncBatchNorm`` does (so every process takes the same number of steps). False keeps each to its own
            samples, without a collective.

    Gradients reach the logits through everything that is computed of them; none reach the features, which are measured
    only: a head that were trained to look typical would say nothing by it.

    Raises:
        TypeError, ValueError: an argument of the wrong kind, out of its range or not finite.
    """

    num_classes: int
    odds: Tensor
    takes_clean_statistics = True
    gives_p_clean = True
    measures_untypicality = True
    has_odds = True
    gives_log_probabilities = True

    def __init__(
        self,
        num_modalities: int,
        num_classes: int,
        *,
        features: Sequence[int | None] | None = None,
        evidential: bool = True,
        typicality_norm: bool = True,
        typicality_distance: bool = True,
        distance_evidence: float = 0.25,
        agreement: bool = True,
        odds: Coefficient = 0.3,
        onset: float = 3.0,
        ceiling: float = 6.0,
        floor: float = 0.3,
        gather: bool = True,
        everywhere: bool = True,
    ) -> None:
        super().__init__(num_modalities)
        num_classes = check_integer("num_classes", num_classes)
        if num_classes < 1:
            raise ValueError(f"num_classes must be at least 1, got {num_classes}")
        for demand, holds, values in (
            ("at least 0", lambda v: v >= 0, {"floor": floor}),
            ("from 0 to 1", lambda v: 0 <= v <= 1, {"distance_evidence": distance_evidence}),
            ("a number", lambda _: True, {"onset": onset, "ceiling": ceiling}),
        ):
            for name, value in values.items():
                check_number(name, value)
                if not math.isfinite(value) or not holds(value):
                    raise ValueError(f"{name} must be finite and {demand}, got {value}")
        self.feature_widths = check_widths(features, num_modalities)
        self.evidential, self.agreement, self.distance_evidence = evidential, agreement, distance_evidence
        self.typicality_norm, self.typicality_distance = typicality_norm, typicality_distance
        self.onset, self.ceiling, self.floor = onset, ceiling, floor
        self.register_buffer("odds", torch.empty(num_modalities, dtype=torch.float64))
        self.set_odds(odds)
        self.num_classes, self.gather = num_classes, gather
        widths = self.feature_widths or (None,) * num_modalities
        self.running = CleanStatistics(num_modalities, num_classes, widths, everywhere)
        self.fitted = CleanStatistics(num_modalities, num_classes, widths)

    def kind(self) -> str:
        names = "evidential typicality_norm typicality_distance agreement"
        return f"{super().kind()}({', '.join(f'{name}={getattr(self, name)}' for name in names.split())})"

    def set_odds(self, odds: Coefficient) -> None:
        """Set ``odds``, a number or one per modality in order, in place: compiled and wrapped models see them.

        Raises:
            TypeError, ValueError: no number, not one per modality, not positive or not finite, or out of what float32
                holds.

        Example:
            >>> rule = ContaminatedProduct(2, num_classes=3)
            >>> rule.set_odds([0.3, 3.0])
            >>> rule.odds_of(torch.zeros(2, 1)).flatten()
            tensor([0.3149, 3.1494])
        """
        given = own_coefficient("odds", odds, self.num_modalities)
        plain = given * (1 + math.exp(min(min(0.0, self.ceiling) - self.onset, 700.0)))
        if not bool(((plain >= 1e-30) & (plain <= 1e30)).all()):  # so that float32 holds them
            shown = plain.unique().tolist()
            raise ValueError(f"odds and onset must make odds of 1e-30 to 1e30 where nothing is untypical, got {shown}")
        self.odds.copy_(given)

    def odds_of(self, u: Tensor) -> Tensor:
        """``rho``, broken : clean before the others are heard, which rises with the untypicality u, ``[M, *]`` both."""
        return per_modality(self.odds, u) * (1 + torch.exp(u.clamp_max(self.ceiling) - self.onset))

    @property
    def adaptable(self) -> tuple[str, ...]:
        return ("odds",)

    def adapted(self, factors: Tensor) -> dict[str, Tensor]:
        return {"odds": self.odds * factors[0]}

    def statistics(self, dtype: torch.dtype = torch.float64, *, look: bool = True) -> Statistics | None:
        """The calibrated ones, else those gathered in training; None where there can be seen to be neither.

        On a device, to ask would be to wait for it: there, or without ``look``, nothing may be known of what is
        returned, and nothing follows from it.
        """
        fitted, running = self.fitted.sums(), self.running.sums()
        calibrated, gathered = (sums.measured[:, 0, SIZE].any() for sums in (fitted, running))
        if not (look and can_look(calibrated)):
            either = [
                torch.where(calibrated, f, r)
                for f, r in zip(self.fitted.buffers(), self.running.buffers(), strict=True)
            ]
            chosen = Sums(*either)
        elif calibrated or gathered:
            chosen = fitted if calibrated else running
        else:
            return None
        return chosen.statistics(self.running.widths, dtype)

    def evidence(self, batch: Stacked, z: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """What each modality says on its own.

        Its likelihood ``[M, *, K]``, which sums to 1 (``r`` is K times that), and the untypicality ``u`` ``[M, *]``, at
        least 0. Without statistics, they are the head's likelihood, ``softmax(z)``, and 0.
        """
        x, probs = batch.x, torch.softmax(z, -1)
        if statistics is None:
            return probs, torch.zeros_like(x[..., 0])
        x = x.clamp(-LARGEST, LARGEST)
        distances = class_distances(x, statistics.centers)
        if self.distance_evidence:
            known = per_modality(statistics.known[:, OWN], x)
            scale = per_modality(statistics.mean[:, OWN].clamp_min(1e-12), x)
            # Relative to the nearest class, so that some class's is 1, however far they all are.
            tail = (scale + distances.amin(-1, keepdim=True)) / (scale + distances)
            tail = tail.square().square() * tail
            probs = torch.lerp(probs, tail / tail.sum(-1, keepdim=True), self.distance_evidence * known)
        sees = {"norm": self.typicality_norm, "distance": self.typicality_distance}
        return probs, untypicality(x, distances, batch.features, statistics, **sees, floor=self.floor)

    def likelihood(self, rows: Tensor) -> Tensor:
        return evidential(rows) if self.evidential else rows

    def posterior(self, batch: Stacked, z: Tensor, statistics: Statistics | None) -> tuple[Tensor, Tensor]:
        """Fused log-probabilities ``[*, K]``, 0 where nothing counts, and ``P(clean | all)`` ``[M, *]``.

        What does not count is dropped, exactly, with weight 0. No statistics make the plain form. A modality held by
        calibration has that constant weight, and the odds ``1 / weight - 1``.
        """
        counted = batch.counted
        probs, u = self.evidence(batch, z, statistics)
        odds, held = self.odds_of(u), None
        if not can_look(self.calibration.held) or any(self.calibration.held.tolist()):
            held = per_modality(self.calibration.held, odds)
            odds = torch.where(held == 0, odds, (1 / held.clamp(1e-6, 1.0) - 1).clamp_min(1e-6))
        fused, weights = (_mixture if self.agreement else _product)(probs, odds.unsqueeze(-1), counted)
        if held is not None:
            weights = torch.where(held == 0, weights, held)
        if counted is not None:
            fused = torch.where(counted.any(0).unsqueeze(-1), fused, 0)
        return fused, batch.where_counted(weights, 0)

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        with without_autocast(rows[0].device):
            batch = self.stack(rows, present, features, look=True)
            z = self.likelihood(batch.x)
            fused, weights = self.posterior(batch, z, None if plain else self.statistics(z.dtype))
            return Weighed(z.unbind(0), batch.counted, ready_rule(weights, fused), self._energy(batch))

    def fuse(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Without the operators, which would have nothing to add."""
        with without_autocast(rows[0].device):
            batch = self.stack(rows, present, features)
            z = self.likelihood(batch.x)
            # Activation checkpointing, which computes this again when the criterion has learned from the batch, must
            # find the same operations: no look at what there is.
            known = self.statistics(z.dtype, look=not torch.is_grad_enabled())
            return *self.posterior(batch, z, known), self._energy(batch)

    def _energy(self, batch: Stacked) -> Tensor:
        """``[M, *]`` (Eq. 13), of the logits as they came."""
        return batch.where_counted(-torch.logsumexp(batch.x, -1), torch.inf)

    def stack(
        self,
        rows: Sequence[Tensor],
        present: Tensor | None = None,
        features: Features | None = None,
        *,
        look: bool = False,
    ) -> Stacked:
        """M rows ``[*, K]`` and features ``[*, D]`` as the rule computes with them.

        ``look`` leaves the mask out where there is nothing to leave out: a training step gains more by that than it
        costs to see.
        """
        known, got = self.num_classes, rows[0].shape[-1]
        if got != known:
            raise ValueError(f"logits must have the {known} classes of the statistics of robust(), got {got}")
        x, counted = stack_rows(rows, present)
        seen: list[Tensor | None] = [None] * len(rows)
        if features is not None and any(f is not None for f in features):
            wide = [None if f is None else f.detach().to(x.dtype) for f in features]
            finite = [counted[m] if f is None else torch.isfinite(f).all(-1) for m, f in enumerate(wide)]
            seen = [f if f is None else torch.where(c.unsqueeze(-1), f, 0) for f, c in zip(wide, finite, strict=True)]
            counted = counted & torch.stack(finite)
            x = torch.where(counted.unsqueeze(-1), x, 0)
        return Stacked(x, None if look and can_look(counted) and bool(counted.all()) else counted, seen)

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """The untypicality, which the odds rise with: 0 everywhere without statistics."""
        batch = self.stack(rows, None, features)
        u = self.evidence(batch, self.likelihood(batch.x), self.statistics(batch.x.dtype))[1]
        return batch.where_counted(u, torch.nan)

    def observe(
        self,
        rows: list[Tensor],
        target: Tensor,
        present: Tensor | None,
        ignore_index: int,
        features: Features | None = None,
    ) -> None:
        """Count a batch in the running statistics, unless that is left to ``calibrate``."""
        if not self.gather:
            return
        with torch.no_grad(), without_autocast(rows[0].device):
            batch = self.stack([row.detach() for row in rows], present, features)
            valid = target != ignore_index
            counted = valid.expand(batch.x.shape[:-1]) if batch.counted is None else batch.counted & valid
            self.running.update(*_flat(batch, torch.where(valid, target, 0), counted))

    @property
    def judged_by(self) -> str:
        return (
            "what is measured, and whether P(clean) can be relied on: Theorem 1 is about weighted averages of logits, "
            "and says nothing of this rule, whose weights are probabilities"
        )

    def clean_given_label(self, data: CleanData) -> Tensor:
        """``r(y) / (r(y) + rho)`` at the class y, ``[M, *]``: its mean over p(y | all) is the weight."""
        batch = self.stack(data.rows, data.counted, data.features)
        probs, u = self.evidence(batch, self.likelihood(batch.x), self.statistics(batch.x.dtype))
        own = self.num_classes * probs.gather(-1, data.target.expand(u.shape).unsqueeze(-1)).squeeze(-1)
        return own / (own + self.odds_of(u))

    def calibrate(self, data: CleanData, static: Tensor | None, fit: Sequence[str], confidence: float) -> None:
        if static is not None:
            raise ValueError(
                "static_weights must be None for robust(): its weights are probabilities, not coefficients"
            )
        if fit:
            raise ValueError(f"fit must be empty for this rule, which has no such constants, got {list(fit)}")
        batch = self.stack(data.rows, data.counted, data.features)
        counted = data.counted if batch.counted is None else batch.counted
        self.fitted.fit(*_flat(batch, data.target, counted), former=self.running)
        unknown = (self.fitted.classes[:, 0, 0] == 0).any(0).nonzero().flatten().tolist()
        if unknown:
            shown = f"{unknown[:10]}".replace("]", ", ...]" if len(unknown) > 10 else "]")
            warn_user(
                f"target has no row of the classes {shown} for some modality, nor had training: each vote for them "
                "will be taken for untypical"
            )
        self.fitted.keep_features(self.running, [f is None for f in batch.features])
        # To hold one modality moves the posteriors of the others, their means and their correlations.
        hold_until_eq_6(
            self.calibration, lambda: self.fuse(data.rows, data.counted, data.features)[1], data, confidence, None
        )

    def reset_calibration(self) -> None:
        """Undo ``calibrate``; statistics gathered in training stay."""
        super().reset_calibration()
        self.fitted.clear()

    def default_static(self, means: Tensor) -> Tensor:
        """Its own mean weights, which no constants could bring to others."""
        return means

    def extra_repr(self) -> str:
        names = "num_classes evidential typicality_norm typicality_distance distance_evidence agreement"
        shown = [f"{name}={getattr(self, name)}" for name in names.split()]
        return ", ".join([*shown, *([] if self.feature_widths is None else [f"features={list(self.feature_widths)}"])])


def _flat(batch: Stacked, target: Tensor, counted: Tensor) -> tuple[Tensor, Tensor, Tensor, Features]:
    """``[M, R, K]``, ``[R]``, ``[M, R]`` and ``[R, D]`` each, for the statistics."""
    return (
        rearrange(batch.x, "m ... k -> m (...) k"),
        rearrange(target, "... -> (...)"),
        rearrange(counted, "m ... -> m (...)"),
        [None if f is None else rearrange(f, "... d -> (...) d") for f in batch.features],
    )
