"""The stateless forms: each equation as a function of tensors. The modules hold state and call these."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import qmf_kernels
from qmf_kernels import BACKENDS, FORMS, PAIRS, Past

from .checks import (
    Logits,
    check_choice,
    check_class_weight,
    check_logit_norm,
    check_logits,
    check_present,
    check_target,
)
from .uncertainty import UNCERTAINTIES, energy_score

__all__ = ["energy_score", "fuse", "fusion_weights", "qmf_objective", "ranking_loss"]


class WeightOptions(NamedTuple):
    """How weights come from logits: Eq. 9's constants ``[M]``, or ``weights`` ``[M, *]`` that are ready; and what they
    weigh. The fields of ``qmf_kernels.fusion.WeightRule``, then ``detach_weights``.
    """

    weights: Tensor | None
    alpha: Tensor
    beta: Tensor
    temperature: Tensor | None  # None: 1
    static: Tensor | None = None  # [M], of a mixture; NaN where a modality has no static weight
    nonnegative: bool = False
    normalize: bool = False
    uncertainty: str = "energy"
    combine: str = "logits"
    normalize_logits: float | None = None
    odds: float = 1.0  # of a mixture
    detach_weights: bool = False


class LossOptions(NamedTuple):
    """The options of Eq. 18: the cross-entropies', as in ``torch.nn.CrossEntropyLoss``, and the ranking's."""

    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    ranking_weight: float = 0.1
    form: str = "paper"
    pairs: str = "adjacent"


class ObjectiveOutput(NamedTuple):
    """What Eq. 18 is made of; every field but ``sample_losses`` can be differentiated."""

    loss: Tensor
    """Scalar: ``fused_loss + unimodal_losses.sum() + ranking_weight * ranking_loss``."""
    fused_loss: Tensor
    """Scalar: the cross-entropy of the fused logits."""
    unimodal_losses: Tensor
    """``[M]``: each modality's own cross-entropy; 0 for one that is absent throughout."""
    ranking_loss: Tensor
    """Scalar: mean over pairs, summed over modalities (Eq. 17)."""
    logits: Tensor
    """Fused logits ``[B, *, K]``; empty, ``[0]``, where they were not asked for."""
    weights: Tensor
    """``[M, B, *]``."""
    energy: Tensor
    """``[M, B, *]``."""
    sample_losses: Tensor
    """``[M, B]``: each sample's plain cross-entropy per modality, NaN where absent; what a trajectory records."""


def fusion_weights(
    uncertainty: Tensor, alpha: float | Sequence[float] | Tensor = -0.1, beta: float | Sequence[float] | Tensor = 0.0
) -> Tensor:
    """Weights ``w[m] = alpha[m] * u[m] + beta[m]`` (Eq. 9).

    Args:
        uncertainty: ``[M, *]``, floating point.
        alpha: negative; a number or ``[M]``.
        beta: not negative; a number or ``[M]``.

    Returns:
        ``[M, *]``, in the uncertainty's dtype.

    Raises:
        TypeError, ValueError: an uncertainty of the wrong kind, a coefficient of the wrong sign or size.

    Example:
        >>> fusion_weights(torch.tensor([[-2.0], [-1.0]]))
        tensor([[0.2000],
                [0.1000]])
    """
    if not isinstance(uncertainty, Tensor) or not uncertainty.dtype.is_floating_point or uncertainty.dim() == 0:
        got = uncertainty.dtype if isinstance(uncertainty, Tensor) else type(uncertainty).__name__
        raise TypeError(f"uncertainty must be a floating point tensor [M, *], got {got}")
    shape = (-1, *(1,) * (uncertainty.dim() - 1))
    a = _coefficient("alpha", alpha, len(uncertainty), uncertainty).to(uncertainty.dtype).view(shape)
    return a * uncertainty + _coefficient("beta", beta, len(uncertainty), uncertainty).to(uncertainty.dtype).view(shape)


def fuse(logits: Logits, weights: Tensor, present: Tensor | None = None) -> Tensor:
    """Fused logits ``f = sum_m w[m] * x[m]`` (Eq. 11).

    Args:
        logits: M tensors ``[*, K]``: a sequence, a mapping or stacked ``[M, *, K]``; None for an absent modality.
        weights: ``[M, *]``.
        present: bool ``[M]``, ``[M, B]`` or ``[M, *]``; None for all.

    Returns:
        ``[*, K]``, float32, or float64 if any logits are.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape, dtype or device.

    Example:
        >>> fuse([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], torch.tensor([0.2, 0.1]))
        tensor([0.2000, 0.1000])
    """
    rows, there = check_logits(logits)
    shape = (len(rows), *rows[0].shape[:-1])
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if tuple(weights.shape) != shape:
        raise ValueError(f"weights must be {shape} for these logits, got {tuple(weights.shape)}")
    mask = check_present(present, there, shape, rows[0].device)
    unused = weights.new_zeros(len(rows))
    return fuse_with(rows, mask, WeightOptions(weights, unused, unused, None))[0]


def fuse_with(rows: Sequence[Tensor], present: Tensor | None, options: WeightOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Fused logits, weights and energies of checked inputs: M of ``[*, K]``, ``[M, *]`` or None."""
    return qmf_kernels.Fuse.apply(present, *options, None, *rows)


def ranking_loss(weights: Tensor, kappa: Tensor, *, form: str = "paper", pairs: str = "adjacent") -> Tensor:
    """The trajectory ranking loss (Eq. 15 to 17): a sample with the smaller loss history should weigh more.

    Every form is ``sum over pairs with o_i > o_j of relu(s_i - s_j)``; ties contribute 0.

    ========== ===== ========= ===================================================== ==========================
    form       o     s         zero exactly when                                     source
    ========== ===== ========= ===================================================== ==========================
    "paper"    w     w + kappa the order is right, the weight gap at most the loss's Eq. 16 as printed
    "margin"   kappa w + kappa the order is right, the weight gap at least that      Moon et al., ICML 2020
    "released" kappa w - kappa the weight gap against the order is at most the loss's the paper's released code
    ========== ===== ========= ===================================================== ==========================

    Args:
        weights: ``[M, B]`` (or ``[B]`` for one modality), floating point.
        kappa: the same shape, already scaled; NaN where a sample has no history, whose pairs contribute 0; so do those
            of a weight that is not finite.
        form: ``"paper"``, ``"margin"`` or ``"released"``.
        pairs: ``"adjacent"``: the B pairs (i, i + 1) around the batch; ``"all"``: the B (B - 1) / 2 unordered pairs,
            exactly, in O(B log B).

    Returns:
        Scalar: the mean over pairs, summed over modalities. Differentiable in the weights, once.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, shape or dtype.

    Example:
        >>> ranking_loss(torch.tensor([[0.5, 0.1]]), torch.tensor([[0.9, 0.3]]))
        tensor(1.)
    """
    check_choice("form", form, FORMS)
    check_choice("pairs", pairs, PAIRS)
    for name, x in (("weights", weights), ("kappa", kappa)):
        if not isinstance(x, Tensor) or not x.dtype.is_floating_point:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"{name} must be a floating point tensor, got {got}")
    if weights.dim() not in (1, 2) or weights.shape != kappa.shape:
        raise ValueError(f"weights and kappa must both be [M, B], got {tuple(weights.shape)} and {tuple(kappa.shape)}")
    if weights.numel() == 0:
        raise ValueError(f"weights must not be empty: the shape is {tuple(weights.shape)}")
    if weights.device != kappa.device:
        raise ValueError(f"kappa must be on the weights' device {weights.device}, got {kappa.device}")
    dtype = torch.float64 if weights.dtype == torch.float64 else torch.float32
    weights, kappa = torch.atleast_2d(weights).to(dtype), torch.atleast_2d(kappa).detach().to(dtype)
    # A weight that is not finite can't be ranked, and would take its neighbours with it.
    finite = torch.isfinite(weights)
    weights, kappa = torch.where(finite, weights, 0), torch.where(finite, kappa, torch.nan)
    return qmf_kernels.Ranking.apply(weights, kappa, form, pairs)


def qmf_objective(
    logits: Logits,
    target: Tensor,
    kappa: Tensor | None,
    *,
    ranking_weight: float = 0.1,
    form: str = "paper",
    pairs: str = "adjacent",
    alpha: float | Sequence[float] | Tensor | None = None,
    beta: float | Sequence[float] | Tensor | None = None,
    temperature: float | Sequence[float] | Tensor = 1.0,
    uncertainty: str = "energy",
    present: Tensor | None = None,
    normalize: bool = False,
    nonnegative: bool = False,
    detach_weights: bool = False,
    combine: str = "logits",
    normalize_logits: float | None = None,
    class_weight: Tensor | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    return_logits: bool = True,
    backend: str | None = None,
) -> ObjectiveOutput:
    """The whole objective, ``CE(f, y) + sum_m CE(x[m], y) + lambda * ranking`` (Eq. 18), in one operator.

    Args:
        logits: M tensors ``[B, *, K]``: a sequence, a mapping or stacked; None for an absent modality.
        target: int ``[B, *]``, classes 0 to K - 1 or ``ignore_index``.
        kappa: ``[M, B]``, already scaled, NaN where a sample has no history; None for no ranking.
        ranking_weight: lambda.
        form: see ``ranking_loss``.
        pairs: see ``ranking_loss``.
        alpha: Eq. 9; negative, a number or ``[M]``. Default: -0.1 for the energy, -1 for the other uncertainties.
        beta: Eq. 9; at least 0, a number or ``[M]``. Default: 0 for the energy, 1 for the others.
        temperature: Eq. 13; positive, a number or ``[M]``.
        uncertainty: ``"energy"``, ``"msp"``, ``"entropy"`` or ``"evidence"``.
        present: bool ``[M]``, ``[M, B]`` or ``[M, *]``; an absent modality counts in no loss.
        normalize: see ``QualityAwareFusion``.
        nonnegative: see ``QualityAwareFusion``.
        detach_weights: see ``QualityAwareFusion``.
        combine: ``"logits"`` or ``"probabilities"``; see ``QualityAwareFusion``.
        normalize_logits: see ``QualityAwareFusion``.
        class_weight: ``[K]``, finite and at least 0, as ``weight`` in ``torch.nn.CrossEntropyLoss``, for every
            cross-entropy. On a device its values are not looked at, for that would wait for it at every step.
        label_smoothing: as there.
        ignore_index: as there; but where nothing is left to average, the loss is 0 rather than NaN.
        return_logits: False leaves the fused logits out, which training needs not: on a GPU that saves writing them.
        backend: None lets the device choose: Triton's kernels on CUDA and ROCm, PyTorch elsewhere; ``"torch"`` or
            ``"triton"`` forces one. Triton takes CPU tensors only in its interpreter (``TRITON_INTERPRET=1``).

    Returns:
        ObjectiveOutput.

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, shape, dtype, device or range. A device's
            targets are looked at where they lie, and stop it with an assertion.
        RuntimeError: a backend that is not there.

    Example:
        >>> heads = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> out = qmf_objective(heads, torch.tensor([0]), None)
        >>> out.loss
        tensor(1.9971)
    """
    rows, there = check_logits(logits)
    if rows[0].dim() < 2:
        raise ValueError(f"logits must be [B, *, K], got {tuple(rows[0].shape)}")
    shape, device = (len(rows), *rows[0].shape[:-1]), rows[0].device
    unit = isinstance(temperature, int | float) and temperature == 1
    check_choice("uncertainty", uncertainty, list(UNCERTAINTIES))
    check_choice("combine", combine, ("logits", "probabilities"))
    normalize_logits = check_logit_norm(normalize_logits)
    bounded = uncertainty != "energy"
    alpha = (-1.0 if bounded else -0.1) if alpha is None else alpha
    beta = (1.0 if bounded else 0.0) if beta is None else beta
    weight_options = WeightOptions(
        None,
        _coefficient("alpha", alpha, len(rows), rows[0]),
        _coefficient("beta", beta, len(rows), rows[0]),
        None if unit else _coefficient("temperature", temperature, len(rows), rows[0]),
        None,
        *(nonnegative, normalize, uncertainty, combine, normalize_logits),
        detach_weights=detach_weights,
    )
    options = LossOptions(class_weight, label_smoothing, ignore_index, ranking_weight, form, pairs)
    check_loss_options(options, rows[0].shape[-1])
    if kappa is not None and not isinstance(kappa, Tensor):
        raise TypeError(f"kappa must be a tensor or None, got {type(kappa).__name__}")
    if kappa is not None and kappa.device != device:
        raise ValueError(f"kappa must be on the logits' device {device}, got {kappa.device}")
    if kappa is not None and tuple(kappa.shape) != shape[:2]:
        raise ValueError(f"kappa must be {shape[:2]}, one per modality and sample, got {tuple(kappa.shape)}")
    mask = check_present(present, there, shape, device)
    check_choice("backend", backend, BACKENDS)
    target = check_target(target, shape[1:], device)
    return objective_with(rows, target, kappa, mask, weight_options, options, backend, return_logits)


def objective_with(
    rows: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    weight_options: WeightOptions,
    options: LossOptions,
    backend: str | None = None,
    return_logits: bool = True,
    past: Past | None = None,
) -> ObjectiveOutput:
    """Eq. 18 of checked inputs: M of ``[B, *, K]``, ``[B, *]``, ``[M, B]`` or None, ``[M, *]`` or None. With ``past``,
    kappa comes from the history, and the batch goes into it.
    """
    *rule, detach_weights = weight_options
    flags = (detach_weights, backend, return_logits, past)
    return ObjectiveOutput(*qmf_kernels.Objective.apply(target, kappa, present, *rule, *options, *flags, *rows))


def check_loss_options(options: LossOptions, num_classes: int | None = None, once: bool = False) -> None:
    """``once`` looks at class weights on any device, which waits for it: for what is not done at every step."""
    check_choice("form", options.form, FORMS)
    check_choice("pairs", options.pairs, PAIRS)
    for name, value, most in (
        ("ranking_weight", options.ranking_weight, math.inf),
        ("label_smoothing", options.label_smoothing, 1),
    ):
        if not isinstance(value, int | float):
            raise TypeError(f"{name} must be a number, got {value!r}")
        if not 0 <= value <= most or value == math.inf:
            raise ValueError(f"{name} must be {'from 0 to 1' if most == 1 else 'finite and at least 0'}, got {value}")
    check_class_weight(options.class_weight, num_classes, once)


# Comparisons with infinity leave out what is not finite, NaN included.
_SIGNS = {
    "alpha": ("finite and negative", lambda x: (x < 0) & (x > -math.inf)),
    "beta": ("finite and at least 0", lambda x: (x >= 0) & (x < math.inf)),
    "temperature": ("finite and positive", lambda x: (x > 0) & (x < math.inf)),
}


def _coefficient(name: str, value: float | Sequence[float] | Tensor, num: int, like: Tensor) -> Tensor:
    """``value`` as ``[num]`` on ``like``'s device: float64 from numbers, a tensor as it is, gradient and all."""
    demand, holds = _SIGNS[name]
    if isinstance(value, int | float):
        if not holds(value):
            raise ValueError(f"{name} must be {demand}, got {value}")
        return torch.full((num,), value, dtype=torch.float64, device=like.device)
    try:
        given = value if isinstance(value, Tensor) else torch.tensor(list(value), dtype=torch.float64)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{name} must be a number, a sequence or a tensor, got {value!r}") from error
    if given.numel() not in (1, num) or given.dim() > 1:
        raise ValueError(f"{name} must be a number or one per modality ({num}), got shape {tuple(given.shape)}")
    if given.is_cpu and not torch.compiler.is_compiling() and not bool(holds(given).all()):
        raise ValueError(f"{name} must be {demand}, got {given.tolist()}")
    return given.to(like.device).expand(num)
