"""The layer: weight each modality per sample by how certain it is (Eq. 9), and add up (Eq. 11)."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from . import composed, functional
from .calibration import Calibration, calibrate
from .checks import Logits, check_choice, check_logit_norm, check_logits, check_present, modality_names
from .functional import WeightOptions
from .mixture import ContaminatedProduct
from .precision import KeepsPrecision
from .typicality import ClassStatistics
from .uncertainty import UNCERTAINTIES, Uncertainty

COMBINATIONS = ("logits", "probabilities", "mixture")

Coefficient = float | Sequence[float] | Tensor


class FusionOutput(NamedTuple):
    """What the layer returns; M modalities, ``*`` any leading dimensions, K classes."""

    logits: Tensor
    """Fused logits ``[*, K]`` (Eq. 11), float32, or float64 if any input is."""
    weights: Tensor
    """``[M, *]`` (Eq. 9); exactly 0 for an absent modality."""
    energy: Tensor
    """``[M, *]`` (Eq. 13), whatever the uncertainty; +inf for an absent modality."""
    unimodal_logits: tuple[Tensor, ...]
    """The M inputs, ``[*, K]`` each; zeros where the input was None."""
    present: Tensor | None
    """Which modalities were there, bool ``[M, *]``; None for all."""


class QualityAwareFusion(KeepsPrecision):
    """Fuse the logits of M modalities, each weighted per sample by its certainty.

    ``f = sum_m w[m] * x[m]`` with ``w[m] = alpha[m] * u[m] + beta[m]``, ``alpha < 0``, ``beta >= 0`` (Eq. 9 and 11 of
    Zhang et al., ICML 2023), and the energy ``u[m] = -T[m] * logsumexp(x[m] / T[m])`` (Eq. 13) unless chosen otherwise.

    Args:
        modalities: how many, from 1 up, or their names.
        alpha: negative; a number or one per modality. Default: -0.1 for the energy, as published, and -1 for the other
            uncertainties, which lie in [0, 1].
        beta: not negative; a number or one per modality. Default: 0 for the energy, 1 for the others.
        temperature: positive; a number or one per modality. Divides the logits that the uncertainty sees.
        uncertainty: ``"energy"``, ``"msp"``, ``"entropy"``, ``"evidence"`` (see ``qmf_fusion.uncertainty``), or a
            callable from ``[*, K]`` to ``[*]``, differentiable if the weights are to be trained.
        learnable: make alpha, beta and temperature parameters, whose signs hold by construction
            (``alpha = -exp(a)``, ``beta = |b|``, ``T = exp(t)``).
        normalize: clamp weights at 0 and divide by their sum over the present modalities; equal shares where all are 0.
        nonnegative: clamp weights at 0. Eq. 9 as published lets them go negative (for the energy: when every logit is
            far below 0), which turns a modality's vote around.
        detach_weights: stop the gradient of the fused logits at the weights, as the released text-image code does (its
            RGB-D code does not). The ranking loss still reaches them.
        combine: what the weights add up: ``"logits"`` (Eq. 11); ``"probabilities"``, ``f = log(sum_m w[m] softmax(x[m])
            / sum_m w[m])``, with weights clamped at 0; or a ``ContaminatedProduct``, which has weights of its own (see
            ``QualityAwareFusion.robust``). With the last two a row with any value that is not finite is absent.
        normalize_logits: divide each row of logits by its Euclidean norm times this temperature, in training and
            after (LogitNorm, Wei et al., ICML 2022, who take 0.04); ``unimodal_logits`` stay as they came. From 1e-30
            to 1e30. A row with any value that is not finite is absent.
        class_dim: where the classes lie in each modality's tensor: -1, or 1 for ``[B, K, H, W]``. The fused logits lie
            the same.

    Shapes: inputs ``[*, K]`` each; outputs as in ``FusionOutput``. All floating dtypes; arithmetic and outputs are
    float32 (float64 if any input is), under autocast too.

    Absent and broken inputs: a modality that is absent (``present`` False, or None in place of its logits), or whose
    logits for a sample hold NaN or +inf or nothing but -inf, gets weight exactly 0, energy +inf and no gradient there;
    other samples and modalities are unaffected. A -inf among finite logits rules its class out of the fused result,
    where rows that are not finite throughout are not absent anyway (``combine``, ``normalize_logits``). A sample with
    no modality gets fused logits 0.

    Raises:
        TypeError, ValueError: for any argument out of the above, naming it.

    Example:
        >>> fusion = QualityAwareFusion(["rgb", "depth"])
        >>> out = fusion({"rgb": torch.tensor([[4.0, 0.0]]), "depth": torch.tensor([[0.0, 1.0]])})
        >>> out.weights
        tensor([[0.4018],
                [0.1313]])
        >>> out.logits
        tensor([[1.6073, 0.1313]])
    """

    fixed_alpha: Tensor
    fixed_beta: Tensor
    fixed_temperature: Tensor

    def __init__(
        self,
        modalities: int | Iterable[str],
        *,
        alpha: Coefficient | None = None,
        beta: Coefficient | None = None,
        temperature: Coefficient = 1.0,
        uncertainty: str | Uncertainty = "energy",
        learnable: bool = False,
        normalize: bool = False,
        nonnegative: bool = False,
        detach_weights: bool = False,
        combine: str | ContaminatedProduct = "logits",
        normalize_logits: float | None = None,
        class_dim: int = -1,
    ) -> None:
        super().__init__()
        self.names = modality_names(modalities)
        self.mixture = combine if isinstance(combine, ContaminatedProduct) else None
        if isinstance(combine, str):
            check_choice("combine", combine, COMBINATIONS[:2])
        elif self.mixture is None:
            raise TypeError(f"combine must be a string or a ContaminatedProduct, got {type(combine).__name__}")
        elif self.mixture.running.num_modalities != len(self.names):
            raise ValueError(
                f"combine must be of {len(self.names)} modalities, got {self.mixture.running.num_modalities}"
            )
        self.combine = combine if isinstance(combine, str) else "mixture"
        self.normalize_logits = check_logit_norm(normalize_logits)
        if not callable(uncertainty):
            check_choice("uncertainty", uncertainty, list(UNCERTAINTIES))
        self.uncertainty = uncertainty
        self.learnable = learnable
        self.normalize = normalize
        self.nonnegative = nonnegative
        self.detach_weights = detach_weights
        self.class_dim = class_dim
        bounded = uncertainty != "energy"
        num = len(self.names)
        a = coefficient("alpha", (-1.0 if bounded else -0.1) if alpha is None else alpha, num)
        b = coefficient("beta", (1.0 if bounded else 0.0) if beta is None else beta, num)
        t = coefficient("temperature", temperature, num)
        # Under other names where they mean something else, so that the state of one kind does not load as the other's.
        if not learnable:
            self.register_buffer("fixed_alpha", a)
            self.register_buffer("fixed_beta", b)
            self.register_buffer("fixed_temperature", t)
        else:
            dtype = torch.get_default_dtype()
            self.log_minus_alpha = nn.Parameter(a.neg().log().to(dtype))
            self.signed_beta = nn.Parameter(b.to(dtype))
            self.log_temperature = nn.Parameter(t.log().to(dtype))
        self.calibration = Calibration(num)
        self._find_unit_temperature()
        self.register_load_state_dict_post_hook(_after_load)

    def _find_unit_temperature(self) -> None:
        # Known once, so that no step has to ask a device whether T is 1.
        temperature = self.temperature
        self._unit_temperature = not (self.learnable or temperature.is_meta) and bool((temperature == 1).all())

    @classmethod
    def robust(
        cls,
        modalities: int | Iterable[str],
        *,
        normalize_logits: float | None = None,
        class_dim: int = -1,
        num_classes: int | None = None,
        **switches: Any,
    ) -> Self:
        """The rule to start with where modalities may be broken: a contaminated product of experts.

        Weights are ``P(modality is clean | all logits)``, fused logits are log-probabilities. It measures how untypical
        a modality's logits are, with statistics that ``QMFLoss`` gathers in training or ``calibrate`` takes from clean
        data; before either, it takes every modality to be typical. ``QMFLoss`` trains with that plain form, whatever
        has been gathered.

        Args:
            modalities: how many, or their names.
            normalize_logits: see ``QualityAwareFusion``.
            class_dim: see ``QualityAwareFusion``.
            num_classes: K; where it is not given, the first training batch or ``calibrate`` makes the room for the
                statistics.
            switches: the ingredients, each to be switched off or tuned; see ``qmf_fusion.mixture.ContaminatedProduct``.

        Raises:
            TypeError, ValueError: an unknown switch or a number out of its range.

        Example:
            >>> fusion = QualityAwareFusion.robust(["rgb", "depth", "audio"])
            >>> agree, other = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 6.0, 0.0]])
            >>> out = fusion([agree, agree, other])  # the third is outvoted
            >>> out.logits.argmax(-1), out.weights[:, 0]
            (tensor([0]), tensor([0.8043, 0.8043, 0.1263]))
        """
        names = modality_names(modalities)
        mixture = ContaminatedProduct(len(names), **switches)
        if num_classes is not None:
            mixture.running.allocate(num_classes, torch.device("cpu"))
        return cls(names, combine=mixture, normalize_logits=normalize_logits, class_dim=class_dim)

    @property
    def num_modalities(self) -> int:
        return len(self.names)

    @property
    def alpha(self) -> Tensor:
        """``[M]``, negative (Eq. 9); 0 where calibration holds a modality at its static weight."""
        return self.calibration.alpha(-self.log_minus_alpha.exp() if self.learnable else self.fixed_alpha)

    @property
    def beta(self) -> Tensor:
        """``[M]``, not negative (Eq. 9), unless calibrated (Lemma 1 needs any real number)."""
        # |b|, with slope 1 at 0, so that a beta that starts at 0 can leave it.
        if not self.learnable:
            return self.calibration.beta(self.fixed_beta)
        given = torch.where(self.signed_beta >= 0, self.signed_beta, -self.signed_beta)
        return self.calibration.beta(given)

    @property
    def temperature(self) -> Tensor:
        """``[M]``, positive (Eq. 13)."""
        return self.calibration.temperature(self.log_temperature.exp() if self.learnable else self.fixed_temperature)

    def uncertainties(self, logits: Logits) -> Tensor:
        """The ``u`` of Eq. 9 for each modality, ``[M, *]``; NaN or infinite where a row's logits are not finite.

        For ``robust`` the untypicality, which its odds rise with: 0 everywhere without statistics.
        """
        rows, _ = check_logits(logits, self.names, self.class_dim)
        if self.mixture is not None:
            x, finite = composed.stack_rows(self.prepare(rows), None)
            u = self.mixture.evidence(x, self.mixture.statistics()).untypical
            return torch.where(finite, u, torch.nan)
        return self._measure(self.prepare(rows))

    def prepare(self, rows: list[Tensor]) -> list[Tensor]:
        """Rows ``[*, K]`` as the rule sees them: LogitNorm where asked, a second time without effect."""
        if self.normalize_logits is None:
            return rows
        return [composed.normalize_logits(x, self.normalize_logits) for x in rows]

    def _measure(self, rows: Sequence[Tensor]) -> Tensor:
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32
        scaled: Sequence[Tensor] = [x.to(dtype) for x in rows]
        if not self._unit_temperature:
            scaled = [x / t for x, t in zip(scaled, self.temperature.to(dtype), strict=True)]
        if self.uncertainty == "energy":
            values = torch.stack([UNCERTAINTIES["energy"](x) for x in scaled])
            return values * self.temperature.to(dtype).view(-1, *(1,) * (values.dim() - 1))
        measure = UNCERTAINTIES[self.uncertainty] if isinstance(self.uncertainty, str) else self.uncertainty
        every = [measure(x) for x in scaled]
        for x, value in zip(scaled, every, strict=True):
            if not isinstance(value, Tensor) or value.shape != x.shape[:-1]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"uncertainty must return {tuple(x.shape[:-1])} for logits {tuple(x.shape)}, got {got}"
                )
        return torch.stack(every).to(dtype)

    def weight_options(self, rows: list[Tensor], present: Tensor | None) -> WeightOptions:
        """What the operators need to fuse ``rows``, M of ``[*, K]``; ``present`` is ``[M, *]`` or None.

        ``robust`` without statistics: they know no other.
        """
        if self.mixture is not None:
            return WeightOptions(
                *(None, self.alpha.detach(), self.beta.detach(), None, self.calibration.held),
                combine="mixture" if self.mixture.agreement else "product",
                normalize_logits=self.normalize_logits,
                odds=self.mixture.plain_odds,
            )
        weights, name = None, self.uncertainty
        if not isinstance(name, str):
            rows = self.prepare(rows)
            # Rows that do not count would send NaN back through the uncertainty, whatever their weight.
            dtypes = [torch.promote_types(x.dtype, torch.float32) for x in rows]
            heights = [torch.logsumexp(x.detach().to(dtype), -1) for x, dtype in zip(rows, dtypes, strict=True)]
            counted = torch.stack([torch.isfinite(height) for height in heights])
            if self.combine != "logits":
                counted = counted & torch.stack([torch.isfinite(x).all(-1) for x in rows])
            counted = counted if present is None else counted & present
            safe = [torch.where(c.unsqueeze(-1), x, 0) for c, x in zip(counted, rows, strict=True)]
            u = self._measure(safe)
            per_modality = (-1, *(1,) * (u.dim() - 1))
            weights = self.alpha.to(u.dtype).view(per_modality) * u + self.beta.to(u.dtype).view(per_modality)
            name = "energy"
        return WeightOptions(
            *(weights, self.alpha, self.beta, None if self._unit_temperature else self.temperature, None),
            *(self.nonnegative, self.normalize, name, self.combine, self.normalize_logits),
            detach_weights=self.detach_weights,
        )

    def forward(self, logits: Logits, present: Tensor | None = None) -> FusionOutput:
        """Fuse.

        Args:
            logits: M tensors ``[*, K]`` as a sequence, a mapping by name or stacked ``[M, *, K]``; None in a sequence
                or a mapping for a modality that is absent from the whole batch.
            present: bool ``[M]``, ``[M, B]`` or ``[M, *]``; False where a modality is absent.

        Returns:
            FusionOutput.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device, naming them.
        """
        rows, there = check_logits(logits, self.names, self.class_dim)
        mask = check_present(present, there, (len(rows), *rows[0].shape[:-1]), rows[0].device)
        if self.mixture is None or self.mixture.statistics() is None:
            fused, weights, energy = functional.fuse_with(rows, mask, self.weight_options(rows, mask))
        else:
            fused, weights, energy = composed.fuse(self.mixture, self.calibration.held, self.prepare(rows), mask)
        if self.class_dim != -1:
            fused = fused.movedim(-1, self.class_dim)
            rows = [x.movedim(-1, self.class_dim) for x in rows]
        return FusionOutput(fused, weights, energy, tuple(rows), mask)

    def observe(self, rows: list[Tensor], target: Tensor, present: Tensor | None, ignore_index: int = -100) -> None:
        """Let a training batch, as ``QMFLoss`` has checked it, count in the running statistics of ``robust``."""
        if self.mixture is not None and self.mixture.gather:
            composed.observe(self.mixture, self.prepare(rows), target, present, ignore_index)

    def calibrate(
        self,
        logits: Logits,
        target: Tensor,
        static_weights: Coefficient | None = None,
        *,
        present: Tensor | None = None,
        fit: Sequence[str] = (),
        confidence: float = 0.95,
        ignore_index: int = -100,
    ) -> Self:
        """Make Theorem 2's conditions hold on clean data, held out if there is any, and keep them in ``state_dict``.

        Eq. 5: ``beta`` becomes, by Lemma 1, what makes each modality's mean weight its static weight, to 1e-6. Eq. 6:
        a modality whose weights correlate positively with its loss at ``confidence`` is held at its static weight,
        with a warning. ``robust`` also fits its statistics. Calling it again starts from the uncalibrated layer, and
        ``reset_calibration`` restores that exactly.

        Args:
            logits: as ``forward`` takes them.
            target: int ``[*]``.
            static_weights: positive; a number or one per modality. With ``normalize`` they sum to 1, each times the
                share of rows that have the modality. Default: the same for all, at the mean of all
                weights (a plain mean of logits at the present scale); for ``robust`` its mean weights, as they are
                probabilities, not coefficients, and cannot be set.
            present: as ``forward`` takes it.
            fit: also ``"temperature"`` (each modality's, by its likelihood; Guo et al., ICML 2017) and ``"alpha"`` (one
                factor for all, by the fused likelihood under Eq. 5).
            confidence: from 0 to 1, of the one-sided test of Eq. 6 by Fisher's z; 0.5 takes the correlation's sign.
            ignore_index: a target that does not count.

        Returns:
            The layer.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, shape or range, or static weights that cannot be met.

        Example:
            >>> logits = 3 * torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
            >>> fusion = QualityAwareFusion(2).calibrate(logits, logits.sum(0).argmax(-1), static_weights=0.5)
            >>> fusion(logits).weights.mean(1)
            tensor([0.5000, 0.5000])
        """
        if static_weights is not None:
            static_weights = coefficient("static_weights", static_weights, self.num_modalities)
        calibrate(self, logits, target, static_weights, present, fit, confidence, ignore_index)
        self._find_unit_temperature()
        return self

    def reset_calibration(self) -> Self:
        """Undo ``calibrate``, exactly; statistics gathered in training stay."""
        self.calibration.clear()
        if self.mixture is not None:
            self.mixture.fitted.clear()
        self._find_unit_temperature()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        # A layer saved without calibration or statistics has none; a dict of something else says nothing of it.
        own = {name.removeprefix(prefix) for name in state_dict if name.startswith(prefix)}
        if any("." not in name or name.startswith(("calibration.", "mixture.")) for name in own):
            parts: dict[str, Calibration | ClassStatistics] = {"calibration.static": self.calibration}
            if self.mixture is not None:
                parts["mixture.fitted.whiten"] = self.mixture.fitted
                parts["mixture.running.whiten"] = self.mixture.running
            for name, part in parts.items():
                if name not in own:
                    part.clear()
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        shown = [repr(list(self.names)), f"uncertainty={self.uncertainty!r}"]
        if self.mixture is not None:
            shown = shown[:1]
        elif self.combine != "logits":
            shown.append(f"combine={self.combine!r}")
        if self.normalize_logits is not None:
            shown.append(f"normalize_logits={self.normalize_logits}")
        shown += [
            f"{name}=True"
            for name in ("learnable", "normalize", "nonnegative", "detach_weights")
            if getattr(self, name)
        ]
        return ", ".join(shown if self.class_dim == -1 else [*shown, f"class_dim={self.class_dim}"])


def _after_load(module: nn.Module, _: Any) -> None:
    # A function with a name, so that the layer pickles.
    if isinstance(module, QualityAwareFusion):
        module._find_unit_temperature()


def coefficient(name: str, value: Coefficient, num: int) -> Tensor:
    """``value`` as float64 ``[num]``, of the sign that its name demands."""
    try:
        # On the CPU whatever the default device, so that its values can be looked at.
        given = torch.as_tensor(value, dtype=torch.float64, device="cpu").detach()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, a sequence or a tensor, got {value!r}") from error
    if given.dim() > 1 or given.numel() not in (1, num):
        raise ValueError(f"{name} must be a number or one per modality ({num}), got shape {tuple(given.shape)}")
    values = given.expand(num).clone()
    demand, holds = {
        "alpha": ("negative", values < 0),
        "beta": ("at least 0", values >= 0),
        "temperature": ("positive", values > 0),
        "static_weights": ("positive", values > 0),
    }[name]
    if not all(math.isfinite(x) for x in values.tolist()) or not holds.all():
        raise ValueError(f"{name} must be finite and {demand}, got {value}")
    return values
