"""The stateless forms: each equation as a function of tensors. The modules hold state and call these."""

import math

import torch
from torch import Tensor

import qmf_kernels
from qmf_kernels import BACKENDS, FORMS, PAIRS, Losses, LossRule, affine_weights
from qmf_kernels.eager.fusion import accumulate_dtype, per_modality

from .affine import AffineOptions, weigh_rows
from .checks import (
    Logits,
    Present,
    check_batch,
    check_choice,
    check_class_weight,
    check_floating,
    check_logit_norm,
    check_logits,
    check_present,
    named_by,
)
from .coefficients import Coefficient, check_coefficient, unless_one
from .general_objective import general_objective
from .logit_norm import normalize_rows
from .rule import ready_rule
from .uncertainty import UNCERTAINTIES, energy_score

__all__ = ["energy_score", "fuse", "fusion_weights", "qmf_objective", "ranking_loss"]


ObjectiveOutput = Losses
"""What ``qmf_objective`` and ``QMFLoss`` return, whose ``loss`` may hold more: what a rule adds to Eq. 18."""


def fusion_weights(uncertainty: Tensor, alpha: Coefficient = -0.1, beta: Coefficient = 0.0) -> Tensor:
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
    check_floating("uncertainty", uncertainty, "tensor [M, *]")
    if uncertainty.dim() == 0:
        raise TypeError(f"uncertainty must be a floating point tensor [M, *], got {uncertainty.dtype}")
    a, b = (
        per_modality(check_coefficient(name, value, len(uncertainty), uncertainty.device), uncertainty)
        for name, value in (("alpha", alpha), ("beta", beta))
    )
    return affine_weights(uncertainty, a, b)


def fuse(logits: Logits, weights: Tensor, present: Present | None = None) -> Tensor:
    """Fused logits ``f = sum_m w[m] * x[m]`` (Eq. 11).

    Args:
        logits: M tensors ``[*, K]``: a sequence, a mapping or stacked ``[M, *, K]``; None for an absent modality.
        weights: ``[M, *]``.
        present: bool ``[M]``, ``[M, B]`` or ``[M, *]``, or masks by name; None for all.

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
    mask = check_present(present, there, shape, rows[0].device, named_by(logits))
    return qmf_kernels.fuse(rows, mask, ready_rule(weights))[0]


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
            of a kappa or a weight that is infinite.
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
        check_floating(name, x)
    if weights.dim() not in (1, 2) or weights.shape != kappa.shape:
        raise ValueError(f"weights and kappa must both be [M, B], got {tuple(weights.shape)} and {tuple(kappa.shape)}")
    if weights.numel() == 0:
        raise ValueError(f"weights must not be empty: the shape is {tuple(weights.shape)}")
    if weights.device != kappa.device:
        raise ValueError(f"kappa must be on the weights' device {weights.device}, got {kappa.device}")
    dtype = accumulate_dtype([weights])
    weights, kappa = torch.atleast_2d(weights).to(dtype), torch.atleast_2d(kappa).detach().to(dtype)
    # A weight that is not finite can't be ranked, and would take its neighbours with it.
    finite = torch.isfinite(weights)
    weights, kappa = torch.where(finite, weights, 0), torch.where(finite, kappa, torch.nan)
    return qmf_kernels.rank(weights, kappa, form, pairs)


def qmf_objective(
    logits: Logits,
    target: Tensor,
    kappa: Tensor | None,
    *,
    ranking_weight: float = 0.1,
    form: str = "paper",
    pairs: str = "adjacent",
    alpha: Coefficient | None = None,
    beta: Coefficient | None = None,
    temperature: Coefficient = 1.0,
    uncertainty: str = "energy",
    present: Present | None = None,
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
    """The whole objective, ``CE(f, y) + sum_m CE(x[m], y) + lambda * ranking`` (Eq. 18).

    Options have the names, the meaning and the defaults that they have in ``QualityAwareFusion`` and ``QMFLoss``.

    Args:
        logits: M tensors ``[B, *, K]``: a sequence, a mapping or stacked; None for an absent modality.
        target: int ``[B, *]``, classes 0 to K - 1 or ``ignore_index``; or probabilities ``[B, *, K]``, see ``QMFLoss``.
        kappa: ``[M, B]``, already scaled, NaN where a sample has no history; None for no ranking.
        ranking_weight: lambda.
        form: see ``ranking_loss``.
        pairs: see ``ranking_loss``.
        alpha: Eq. 9; a number or ``[M]``, which may have a gradient.
        beta: Eq. 9; the same.
        temperature: Eq. 13; the same.
        uncertainty: a name in ``qmf_fusion.uncertainty.UNCERTAINTIES``.
        present: bool ``[M]``, ``[M, B]`` or ``[M, *]``, or masks by name; an absent modality counts in no loss.
        normalize: see ``QualityAwareFusion``, as for the next four.
        nonnegative: clamps weights at 0.
        detach_weights: stops the fused logits' gradient at the weights.
        combine: ``"logits"`` or ``"probabilities"``.
        normalize_logits: LogitNorm's temperature.
        class_weight: ``QMFLoss``'s ``weight``. On a device its values are not looked at, for that would wait for it.
        label_smoothing: see ``QMFLoss``, as for the next two.
        ignore_index: a target that does not count.
        return_logits: False leaves the fused logits out.
        backend: None lets the device choose: Triton's kernels on CUDA and ROCm, PyTorch elsewhere; ``"torch"`` or
            ``"triton"`` forces one. Triton takes CPU tensors only in its interpreter (``TRITON_INTERPRET=1``).

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, shape, dtype, device or range. A device's
            targets are looked at where they lie, and stop it with an assertion.
        RuntimeError: a backend that is not there.

    Example:
        >>> heads = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> qmf_objective(heads, torch.tensor([0]), None).loss
        tensor(1.9971)
    """
    check_choice("uncertainty", uncertainty, list(UNCERTAINTIES))
    options = AffineOptions(uncertainty, combine, nonnegative, normalize, detach_weights)
    losses = LossRule(class_weight, label_smoothing, ignore_index, ranking_weight, form, pairs)
    rows, target, mask = check_batch(logits, target, present, soft=True)
    if not (kappa is None or isinstance(kappa, Tensor)):
        raise TypeError(f"kappa must be a tensor or None, got {type(kappa).__name__}")
    if kappa is not None and kappa.device != target.device:
        raise ValueError(f"kappa must be on the logits' device {target.device}, got {kappa.device}")
    wanted = (len(rows), len(target))
    if kappa is not None and tuple(kappa.shape) != wanted:
        raise ValueError(f"kappa must be {wanted}, one per modality and sample, got {tuple(kappa.shape)}")
    check_loss_rule(losses, rows[0].shape[-1])
    options.check()
    alpha, beta = options.defaults(alpha, beta)
    constants = [
        check_coefficient(name, value, len(rows), target.device)
        for name, value in (("alpha", alpha), ("beta", beta), ("temperature", temperature))
    ]
    check_choice("backend", backend, BACKENDS)
    rows = normalize_rows(rows, check_logit_norm(normalize_logits))
    weighed = weigh_rows(rows, mask, options, constants[0], constants[1], unless_one(constants[2]))
    objective = general_objective if target.is_floating_point() else qmf_kernels.objective
    return objective(
        *(weighed.rows, target, kappa, weighed.present, weighed.weights, losses),
        backend=backend,
        return_logits=return_logits,
    )


def check_loss_rule(options: LossRule, num_classes: int | None = None) -> None:
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
    check_class_weight(options.class_weight, num_classes)
