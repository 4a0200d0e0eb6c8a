"""Eq. 9's constants and Eq. 13's temperature: checked, fixed or learnable, and what calibration makes of them."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .checks import can_look
from .precision import KeepsPrecision

Coefficient = float | Sequence[float] | Tensor

# What each must be besides finite: comparisons with infinity leave out what is not, NaN included.
_DEMANDS = {
    "alpha": ("negative", lambda x: (x < 0) & (x > -math.inf)),
    "beta": ("at least 0", lambda x: (x >= 0) & (x < math.inf)),
    "temperature": ("positive", lambda x: (x > 0) & (x < math.inf)),
    "odds": ("positive", lambda x: (x > 0) & (x < math.inf)),
    "static_weights": ("positive", lambda x: (x > 0) & (x < math.inf)),
}


def check_coefficient(name: str, value: Coefficient, num: int, device: torch.device | str = "cpu") -> Tensor:
    """``value`` as ``[num]`` on ``device``: float64 from numbers, a tensor in its own dtype, gradient and all.

    The argument's name says its sign. The values of a tensor on a device are not looked at, which would wait for it.
    """
    demand, holds = _DEMANDS[name]
    kind = f"{name} must be a number, a sequence or a tensor of numbers"
    if _has_truths(value):
        raise TypeError(f"{kind}, got {value!r}")
    if isinstance(value, int | float):
        if not holds(value):
            raise ValueError(f"{name} must be finite and {demand}, got {value}")
        return torch.full((num,), value, dtype=torch.float64, device=device)
    try:
        # On the CPU whatever the default device, so that its values can be looked at.
        given = value if isinstance(value, Tensor) else torch.as_tensor(value, dtype=torch.float64, device="cpu")
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{kind}, got {value!r}") from error
    if given.numel() not in (1, num) or given.dim() > 1:
        raise ValueError(f"{name} must be a number or one per modality ({num}), got shape {tuple(given.shape)}")
    if can_look(given) and not bool(holds(given).all()):
        raise ValueError(f"{name} must be finite and {demand}, got {given.tolist()}")
    return given.to(device).expand(num)


def _has_truths(value: Coefficient) -> bool:
    """Which PyTorch takes for 0 and 1."""
    if isinstance(value, Tensor):
        return value.dtype == torch.bool
    return isinstance(value, bool) or (isinstance(value, list | tuple) and any(isinstance(x, bool) for x in value))


def own_coefficient(name: str, value: Coefficient, num: int) -> Tensor:
    """``check_coefficient`` for what outlives the call: float64 ``[num]`` of its own on the CPU, wherever it was."""
    value = value.detach().cpu() if isinstance(value, Tensor) else value
    return check_coefficient(name, value, num).double().clone()


def unless_one(temperature: Tensor) -> Tensor | None:
    """The temperature, or None where it can be seen to be 1 and has no gradient: for 1, no row need be divided."""
    if can_look(temperature) and not temperature.requires_grad and all(t == 1 for t in temperature.tolist()):
        return None
    return temperature


class Constants(NamedTuple):
    """``[M]`` each."""

    alpha: Tensor
    beta: Tensor
    temperature: Tensor


class Coefficients(KeepsPrecision):
    """alpha, beta and the temperature of M modalities, with the corrections that ``calibrate`` finds.

    Where they are learnable, they are parameters in the default dtype, whose signs hold by construction
    (``alpha = -exp(a)``, ``beta = |b|``, ``T = exp(t)``), rather than float64 buffers.
    """

    fixed_alpha: Tensor
    fixed_beta: Tensor
    fixed_temperature: Tensor
    scale: Tensor
    keep: Tensor
    shift: Tensor
    temper: Tensor

    def __init__(
        self, num_modalities: int, alpha: Coefficient, beta: Coefficient, temperature: Coefficient, learnable: bool
    ) -> None:
        super().__init__()
        self.learnable = learnable
        a, b, t = (
            own_coefficient(name, value, num_modalities)
            for name, value in (("alpha", alpha), ("beta", beta), ("temperature", temperature))
        )
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
        # What calibration multiplies alpha, beta and the temperature by, and adds to beta; as they are, without effect.
        for name in ("scale", "keep", "temper"):
            self.register_buffer(name, torch.ones_like(a))
        self.register_buffer("shift", torch.zeros_like(a))

    def calibrated(self) -> Constants:
        """The constants as calibrated."""
        if self.learnable:
            alpha, temperature = -self.log_minus_alpha.exp(), self.log_temperature.exp()
            # |b| with slope 1 at 0, so that a beta that starts at 0 can leave it.
            beta = torch.where(self.signed_beta >= 0, self.signed_beta, -self.signed_beta)
        else:
            alpha, beta, temperature = self.fixed_alpha, self.fixed_beta, self.fixed_temperature
        scale, keep, shift, temper = (x.to(alpha.dtype) for x in (self.scale, self.keep, self.shift, self.temper))
        return Constants(alpha * scale, torch.addcmul(shift, beta, keep), temperature * temper)

    def correct(self, *, scale: Tensor, shift: Tensor, temper: Tensor) -> None:
        """Set what calibration found, ``[M]`` each."""
        for buffer, value in ((self.scale, scale), (self.shift, shift), (self.temper, temper)):
            buffer.copy_(value)
        self.keep.fill_(1)

    def hold(self, held: Tensor) -> None:
        """Make constant weights of those ``held`` ``[M]`` that are not 0."""
        free = held == 0
        self.scale.mul_(free)
        self.keep.mul_(free)
        self.shift.copy_(torch.where(free, self.shift, held))

    def clear(self) -> None:
        """Back to the constants as given."""
        one = torch.ones_like(self.scale)
        self.correct(scale=one, shift=0 * one, temper=one)
