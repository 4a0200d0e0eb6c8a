"""The layer: weight each modality per sample by how certain it is (Eq. 9), and add up (Eq. 11)."""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import functional
from .checks import Logits, check_choice, check_logits, check_present, modality_names
from .functional import WeightOptions
from .precision import KeepsPrecision
from .uncertainty import UNCERTAINTIES, Uncertainty

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
        class_dim: where the classes lie in each modality's tensor: -1, or 1 for ``[B, K, H, W]``. The fused logits lie
            the same.

    Shapes: inputs ``[*, K]`` each; outputs as in ``FusionOutput``. All floating dtypes; arithmetic and outputs are
    float32 (float64 if any input is), under autocast too.

    Absent and broken inputs: a modality that is absent (``present`` False, or None in place of its logits), or whose
    logits for a sample hold NaN or +inf or nothing but -inf, gets weight exactly 0, energy +inf and no gradient there;
    other samples and modalities are unaffected. A -inf among finite logits rules its class out of the fused result. A
    sample with no modality gets fused logits 0.

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
        class_dim: int = -1,
    ) -> None:
        super().__init__()
        self.names = modality_names(modalities)
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
        a = _coefficient("alpha", (-1.0 if bounded else -0.1) if alpha is None else alpha, num)
        b = _coefficient("beta", (1.0 if bounded else 0.0) if beta is None else beta, num)
        t = _coefficient("temperature", temperature, num)
        if not learnable:
            self.register_buffer("raw_alpha", a)
            self.register_buffer("raw_beta", b)
            self.register_buffer("raw_temperature", t)
        else:
            dtype = torch.get_default_dtype()
            self.raw_alpha = nn.Parameter(a.neg().log().to(dtype))
            self.raw_beta = nn.Parameter(b.to(dtype))
            self.raw_temperature = nn.Parameter(t.log().to(dtype))
        self._find_unit_temperature()
        self.register_load_state_dict_post_hook(_after_load)

    def _find_unit_temperature(self) -> None:
        # Known once, so that no step has to ask a device whether T is 1.
        self._unit_temperature = not self.learnable and bool((self.raw_temperature == 1).all())

    @property
    def num_modalities(self) -> int:
        return len(self.names)

    @property
    def alpha(self) -> Tensor:
        """``[M]``, negative (Eq. 9)."""
        return -self.raw_alpha.exp() if self.learnable else self.raw_alpha

    @property
    def beta(self) -> Tensor:
        """``[M]``, not negative (Eq. 9)."""
        # |b|, with slope 1 at 0, so that a beta that starts at 0 can leave it.
        return torch.where(self.raw_beta >= 0, self.raw_beta, -self.raw_beta) if self.learnable else self.raw_beta

    @property
    def temperature(self) -> Tensor:
        """``[M]``, positive (Eq. 13)."""
        return self.raw_temperature.exp() if self.learnable else self.raw_temperature

    def uncertainties(self, logits: Logits) -> Tensor:
        """The ``u`` of Eq. 9 for each modality, ``[M, *]``; NaN or infinite where a row's logits are not finite."""
        rows, _ = check_logits(logits, self.names, self.class_dim)
        return self._measure(rows)

    def _measure(self, rows: Sequence[Tensor]) -> Tensor:
        dtype = torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32
        scaled: Sequence[Tensor] = [x.to(dtype) for x in rows]
        if not self._unit_temperature:
            scaled = [x / t for x, t in zip(scaled, self.temperature.to(dtype), strict=True)]
        if self.uncertainty == "energy":
            values = torch.stack([UNCERTAINTIES["energy"](x) for x in scaled])
            return values * self.temperature.to(dtype).view(-1, *(1,) * (values.dim() - 1))
        measure = UNCERTAINTIES[self.uncertainty] if isinstance(self.uncertainty, str) else self.uncertainty
        values = [measure(x) for x in scaled]
        for x, value in zip(scaled, values, strict=True):
            if not isinstance(value, Tensor) or value.shape != x.shape[:-1]:
                got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise ValueError(
                    f"uncertainty must return {tuple(x.shape[:-1])} for logits {tuple(x.shape)}, got {got}"
                )
        return torch.stack(values).to(dtype)

    def weight_options(self, rows: Sequence[Tensor], present: Tensor | None) -> WeightOptions:
        """What the operators need to weight ``rows``, M of ``[*, K]``; ``present`` is ``[M, *]`` or None."""
        weights, temperature = None, None if self._unit_temperature else self.temperature
        if self.uncertainty != "energy":
            # Rows that do not count would send NaN back through the uncertainty, whatever their weight.
            dtypes = [torch.promote_types(x.dtype, torch.float32) for x in rows]
            heights = [torch.logsumexp(x.detach().to(dtype), -1) for x, dtype in zip(rows, dtypes, strict=True)]
            counted = torch.stack([torch.isfinite(height) for height in heights])
            counted = counted if present is None else counted & present
            safe = [torch.where(c.unsqueeze(-1), x, 0) for c, x in zip(counted, rows, strict=True)]
            u = self._measure(safe)
            per_modality = (-1, *(1,) * (u.dim() - 1))
            weights = self.alpha.to(u.dtype).view(per_modality) * u + self.beta.to(u.dtype).view(per_modality)
        return WeightOptions(
            weights, self.alpha, self.beta, temperature, self.nonnegative, self.normalize, self.detach_weights
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
        fused, weights, energy = functional.fuse_with(rows, mask, self.weight_options(rows, mask))
        if self.class_dim != -1:
            fused = fused.movedim(-1, self.class_dim)
            rows = [x.movedim(-1, self.class_dim) for x in rows]
        return FusionOutput(fused, weights, energy, tuple(rows), mask)

    def extra_repr(self) -> str:
        shown = [repr(list(self.names)), f"uncertainty={self.uncertainty!r}"]
        shown += [
            f"{name}=True"
            for name in ("learnable", "normalize", "nonnegative", "detach_weights")
            if getattr(self, name)
        ]
        return ", ".join(shown if self.class_dim == -1 else [*shown, f"class_dim={self.class_dim}"])


def _after_load(fusion: QualityAwareFusion, _: object) -> None:
    """A function of the module, as pickle wants its hooks."""
    fusion._find_unit_temperature()


def _coefficient(name: str, value: Coefficient, num: int) -> Tensor:
    """``value`` as float64 ``[num]``, of the sign that its name demands."""
    try:
        given = torch.as_tensor(value, dtype=torch.float64).detach().cpu()
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, a sequence or a tensor, got {value!r}") from error
    if given.dim() > 1 or given.numel() not in (1, num):
        raise ValueError(f"{name} must be a number or one per modality ({num}), got shape {tuple(given.shape)}")
    values = given.expand(num).clone()
    demand, holds = {
        "alpha": ("negative", values < 0),
        "beta": ("at least 0", values >= 0),
        "temperature": ("positive", values > 0),
    }[name]
    if not all(math.isfinite(x) for x in values.tolist()) or not holds.all():
        raise ValueError(f"{name} must be finite and {demand}, got {value}")
    return values
