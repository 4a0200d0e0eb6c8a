"""The affine rule: weights from any uncertainty by Eq. 9, fused logits by Eq. 11 or fused probabilities."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qmf_kernels import WeightRule, affine_weights, clamp_weights
from qmf_kernels.eager.fusion import accumulate_dtype, per_modality

from .calibration import CleanData, excess, hold_until_eq_6
from .checks import check_choice
from .coefficients import Coefficient, Coefficients, Constants, unless_one
from .lemma_1 import Clamp, find_shift, fit_scale, fit_temperatures, keep_nonnegative
from .rows import Features, stack_rows, stack_weighable
from .rule import Rule, Weighed, ready_rule
from .uncertainty import UNCERTAINTIES, Uncertainty

COMBINATIONS = ("logits", "probabilities")


class AffineOptions(NamedTuple):
    """What the affine rule is, besides its constants."""

    uncertainty: str | Uncertainty = "energy"
    combine: str = "logits"
    nonnegative: bool = False
    normalize: bool = False
    detach: bool = False

    def check(self) -> None:
        """Raise ValueError for an unknown name."""
        check_choice("combine", self.combine, COMBINATIONS)
        if not callable(self.uncertainty):
            check_choice("uncertainty", self.uncertainty, list(UNCERTAINTIES))

    @property
    def name(self) -> str:
        """The uncertainty's, or the callable's."""
        function = self.uncertainty
        return function if isinstance(function, str) else getattr(function, "__qualname__", type(function).__name__)

    def defaults(self, alpha: Coefficient | None, beta: Coefficient | None) -> tuple[Coefficient, Coefficient]:
        """None becomes -0.1 and 0 for the energy, as published, and -1 and 1 for others, which lie in [0, 1]."""
        published = (-0.1, 0.0) if self.uncertainty == "energy" else (-1.0, 1.0)
        return published[0] if alpha is None else alpha, published[1] if beta is None else beta

    @property
    def clamp(self) -> Clamp:
        """Probabilities are no probabilities with weights below 0."""
        return Clamp(self.nonnegative or self.combine == "probabilities", self.normalize)

    @property
    def acting(self) -> Clamp:
        """What becomes of weights before they act: of those of probabilities, only the shares do."""
        return Clamp(True, True) if self.combine == "probabilities" else self.clamp


def measure(uncertainty: str | Uncertainty, rows: Sequence[Tensor], temperature: Tensor | None) -> Tensor:
    """``u`` of Eq. 9, ``[M, *]`` in float32 or float64, of M rows ``[*, K]`` divided by T ``[M]``, where None is 1."""
    dtype = accumulate_dtype(rows)
    scaled = [x.to(dtype) for x in rows]
    if temperature is not None:
        scaled = [_divide(x, t) for x, t in zip(scaled, temperature.to(dtype), strict=True)]
    function = UNCERTAINTIES[uncertainty] if isinstance(uncertainty, str) else uncertainty
    every = [function(x) for x in scaled]
    for x, value in zip(scaled, every, strict=True):
        if not isinstance(value, Tensor) or value.shape != x.shape[:-1]:
            got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ValueError(f"uncertainty must return {tuple(x.shape[:-1])} for logits {tuple(x.shape)}, got {got}")
    u = torch.stack(every).to(dtype)
    if temperature is not None and uncertainty == "energy":
        u = u * per_modality(temperature, u)
    return u


def _divide(x: Tensor, temperature: Tensor) -> Tensor:
    # -inf has no slope in the temperature, where 0 * inf would be NaN.
    ruled_out = x == -torch.inf
    return (x.masked_fill(ruled_out, 0) / temperature).masked_fill(ruled_out, -torch.inf)


def weigh_rows(
    rows: list[Tensor],
    present: Tensor | None,
    options: AffineOptions,
    alpha: Tensor,
    beta: Tensor,
    temperature: Tensor | None,
) -> Weighed:
    """What the operators need: M of ``[*, K]``, bool ``[M, *]`` or None, ``[M]`` each; a temperature of None is 1."""
    if options.combine == "logits":
        u = None  # the energy, which the operators take from the rows themselves
        if options.uncertainty != "energy":
            u = measure(options.uncertainty, _safe_rows(rows, present), temperature)
        clamp = {"nonnegative": options.clamp.nonnegative, "normalize": options.clamp.normalize}
        return Weighed(rows, present, WeightRule(u, alpha, beta, temperature, None, detach=options.detach, **clamp))
    x, counted = stack_rows(rows, present)
    u = measure(options.uncertainty, list(x), temperature)
    weights = weights_of(u, alpha, beta, counted, options.clamp)
    fused = pool_probabilities(x, weights.detach() if options.detach else weights, counted)
    return Weighed(rows, counted, ready_rule(weights, fused, temperature))


def weights_of(u: Tensor, alpha: Tensor, beta: Tensor, counted: Tensor | None, clamp: Clamp) -> Tensor:
    """Eq. 9, clamped and normalised as asked: ``[M, *]``."""
    raw = affine_weights(u, per_modality(alpha, u), per_modality(beta, u))
    return clamp_weights(raw, counted, clamp.nonnegative, clamp.normalize)


def _safe_rows(rows: list[Tensor], present: Tensor | None) -> list[Tensor]:
    """Zeros for rows that do not count, through which an uncertainty would send NaN back whatever their weight."""
    dtypes = [torch.promote_types(x.dtype, torch.float32) for x in rows]
    heights = [torch.logsumexp(x.detach().to(dtype), -1) for x, dtype in zip(rows, dtypes, strict=True)]
    counted = [torch.isfinite(height) for height in heights]
    if present is not None:
        counted = [c & p for c, p in zip(counted, present, strict=True)]
    return [torch.where(c.unsqueeze(-1), x, 0) for c, x in zip(counted, rows, strict=True)]


def pool_probabilities(logits: Tensor, weights: Tensor, counted: Tensor | None) -> Tensor:
    """``f = log(sum_m w[m] softmax(x[m]) / sum_m w[m])``, ``[*, K]``; 0 where no modality counts.

    Logits ``[M, *, K]`` are finite, weights ``[M, *]`` at least 0; ``counted`` ``[M, *]`` None is all. A weight of 0 is
    no share at all, and of no gradient, as those that were clamped; where all are 0, those that count share equally.
    """
    weights = torch.where(weights > 0, weights, 0)
    share = clamp_weights(weights, counted, nonnegative=True, normalize=True)
    some = (share > 0).any(0)
    votes = (share > 0) | ~some
    log_share = torch.where(votes & some, share, 1).log().masked_fill(~votes, -torch.inf)
    terms = log_share.unsqueeze(-1) + torch.log_softmax(logits.to(share.dtype), -1)
    return torch.where(some.unsqueeze(-1), torch.logsumexp(terms, 0), 0)


class AffineRule(Rule):
    """``w[m] = alpha[m] * u[m] + beta[m]`` (Eq. 9) and what the weights add up: see ``QualityAwareFusion``."""

    def __init__(self, num_modalities: int, options: AffineOptions, coefficients: Coefficients) -> None:
        super().__init__(num_modalities)
        self.options, self.coefficients = options, coefficients

    def kind(self) -> str:
        _, combine, nonnegative, normalize, _ = self.options
        clamped = f"nonnegative={nonnegative}, normalize={normalize}"
        return f"{super().kind()}(uncertainty={self.options.name!r}, combine={combine!r}, {clamped})"

    @property
    def judged_by(self) -> str:
        if self.options.combine == "probabilities":
            return "Theorem 1, by the shares of its weights, as only they act on fused probabilities"
        return "Theorem 1, by its weights"

    def constants(self) -> Constants:
        return self.coefficients.calibrated()

    @property
    def adaptable(self) -> tuple[str, ...]:
        return () if self.options.detach else ("weights", "temperature")

    def adapted(self, factors: Tensor) -> dict[str, Tensor]:
        """With its weights' factor on alpha and beta alike, which so keep their signs."""
        corrections = {"scale": factors[0], "keep": factors[0], "shift": factors[0], "temper": factors[1]}
        return {f"coefficients.{name}": getattr(self.coefficients, name) * x for name, x in corrections.items()}

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        alpha, beta, temperature = self.constants()
        return weigh_rows(rows, present, self.options, alpha, beta, unless_one(temperature))

    def read(self, rows: list[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
        return (stack_weighable if self.options.combine == "logits" else stack_rows)(rows, present)

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        return measure(self.options.uncertainty, rows, unless_one(self.constants().temperature))

    def weights_from(self, uncertainties: Tensor) -> Tensor:
        alpha, beta, _ = self.constants()
        return weights_of(uncertainties, alpha, beta, None, self.options.clamp)

    def logits_from(self, rows: list[Tensor], weights: Tensor) -> Tensor:
        return self._add_up(rows, weights, None)

    def _add_up(self, rows: list[Tensor], weights: Tensor, counted: Tensor | None) -> Tensor:
        x = torch.stack(rows)
        if self.options.combine == "probabilities":
            return pool_probabilities(x, weights, counted)
        # As the operators do: -inf rules its class out, whatever the weight.
        ruled_out = x == -torch.inf
        total = (weights.unsqueeze(-1) * x.masked_fill(ruled_out, 0)).sum(0)
        return total.masked_fill(ruled_out.any(0), -torch.inf)

    def convex_weights(self, weights: Tensor, counted: Tensor) -> Tensor:
        acting = self.options.acting
        return clamp_weights(weights, counted, True, True) if acting.normalize else weights

    def static_fusion(self, rows: list[Tensor], counted: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
        weights = self.options.acting.static(static.to(rows[0]), counted)
        return self._add_up(rows, weights, counted), weights

    def calibrate(self, data: CleanData, static: Tensor | None, fit: Sequence[str], confidence: float) -> Tensor | None:
        clamp = self.options.acting
        static = self._check_static(static, data).to(data.losses)
        wanted = clamp.static(static, data.counted)

        def weigh() -> Tensor:
            self.coefficients.hold(self.calibration.held)
            return excess(self.convex_weights(self.fuse(data.rows, data.counted)[1], data.counted), wanted, data)

        scale, shift, temper = torch.ones_like(static), torch.zeros_like(static), torch.ones_like(static)
        if "temperature" in fit:
            temper = fit_temperatures(data) / self.constants().temperature.to(static)
        self.coefficients.correct(scale=scale, shift=shift, temper=temper)
        u = torch.where(data.counted, self.uncertainties(data.rows), 0)
        alpha, beta, _ = (per_modality(x, u) for x in self.constants())
        slope = alpha * u
        level = float(data.mean(slope + beta).sum())
        if "alpha" in fit:

            def fuse(weights: Tensor) -> Tensor:
                return self._add_up(data.rows, weights, data.counted)

            scale = scale * fit_scale(slope, data, static, clamp, level, fuse)
            slope = slope * per_modality(scale, slope)
        cut = None
        if not clamp.nonnegative and not clamp.normalize:
            cut = keep_nonnegative(slope, data, static)
            scale, slope = scale * cut, slope * per_modality(cut, slope)
        shift = find_shift(slope + beta, data, static, clamp, level)
        self.coefficients.correct(scale=scale, shift=shift, temper=temper)
        hold_until_eq_6(self.calibration, weigh, data, confidence, static, together=clamp.normalize)
        return cut

    def _check_static(self, static: Tensor | None, data: CleanData) -> Tensor:
        """Static weights ``[M]``: of shares they sum to 1."""
        if self.options.acting.normalize:
            if static is None:
                return torch.full((self.num_modalities,), 1 / self.num_modalities, dtype=torch.float64)
            if self.options.normalize and abs(float(static.sum()) - 1) > 1e-6:
                raise ValueError(f"static_weights must sum to 1 with normalize=True, got {static.tolist()}")
            return static / static.sum()
        if static is None:
            mean = data.mean(self.fuse(data.rows, data.counted)[1]).mean()
            if not mean > 0:
                raise ValueError(f"static_weights must be given where the mean weight is not positive: {float(mean)}")
            static = mean.expand(self.num_modalities)
        return static

    def reset_calibration(self) -> None:
        super().reset_calibration()
        self.coefficients.clear()

    def extra_repr(self) -> str:
        shown = [f"uncertainty={self.options.uncertainty!r}"]
        if self.options.combine != "logits":
            shown.append(f"combine={self.options.combine!r}")
        named = {"learnable": self.coefficients.learnable, "normalize": self.options.normalize}
        named |= {"nonnegative": self.options.nonnegative, "detach_weights": self.options.detach}
        return ", ".join([*shown, *(f"{name}=True" for name, on in named.items() if on)])
