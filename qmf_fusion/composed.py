"""What ``QualityAwareFusion.robust`` does beyond the operators, in plain differentiable PyTorch.

Its statistics need more than a row's own logits: gathering them, fusion by them, and Eq. 18 of that; and LogitNorm for
whoever looks at logits as the rules see them. The same semantics as the operators': what is absent or ignored counts in
no mean, a mean over nothing is 0, and a sample's weight in the ranking is its mean over positions.
"""

from collections.abc import Sequence

import torch
from einops import rearrange
from torch import Tensor

from qmf_kernels.lognorm import normalize

from . import functional
from .functional import LossOptions, ObjectiveOutput
from .mixture import ContaminatedProduct


def normalize_logits(logits: Tensor, temperature: float) -> Tensor:
    """``x / (temperature * |x|)`` over the classes (LogitNorm, Wei et al., ICML 2022); NaN where not finite.

    Args:
        logits: ``[*, K]``, floating point; float32 at least inside.
        temperature: positive.

    Example:
        >>> normalize_logits(torch.tensor([3.0, 4.0]), 0.1)
        tensor([6., 8.])
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    finite = torch.isfinite(x).all(-1, keepdim=True)
    return torch.where(finite, normalize(torch.where(finite, x, 0), temperature)[0], torch.nan)


def stack_rows(rows: Sequence[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
    """Rows as one ``[M, *, K]`` in the accumulating dtype, 0 where they do not count, and where they do, ``[M, *]``."""
    dtype = torch.float64 if any(x.dtype == torch.float64 for x in rows) else torch.float32
    x = torch.stack([x.to(dtype) for x in rows])
    counted = torch.isfinite(x).all(-1)
    counted = counted if present is None else counted & present
    return torch.where(counted.unsqueeze(-1), x, 0), counted


def fuse(
    mixture: ContaminatedProduct, held: Tensor | None, rows: Sequence[Tensor], present: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Fused log-probabilities ``[*, K]`` (0 where nothing counts), weights and energies ``[M, *]`` of prepared rows;
    ``held`` is ``[M]``, the static weights, NaN where there is none.
    """
    with torch.autocast(rows[0].device.type, enabled=False):
        return _fuse(mixture, held, *stack_rows(rows, present))


def _fuse(
    mixture: ContaminatedProduct, held: Tensor | None, x: Tensor, counted: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    fused, weights = mixture(x, counted, held)
    energy = torch.where(counted, -torch.logsumexp(x, -1), torch.inf)
    return torch.where(counted.any(0).unsqueeze(-1), fused, 0), weights, energy


def objective(
    mixture: ContaminatedProduct,
    held: Tensor | None,
    rows: Sequence[Tensor],
    target: Tensor,
    kappa: Tensor | None,
    present: Tensor | None,
    options: LossOptions,
) -> ObjectiveOutput:
    """Eq. 18 of prepared rows, M of ``[B, *, K]``; ``[B, *]``, ``[M, B]`` or None, ``[M, *]`` or None."""
    with torch.autocast(rows[0].device.type, enabled=False):
        x, there = stack_rows(rows, present)
        fused, weights, energy = _fuse(mixture, held, x, there)
        valid = _valid(target, x.shape[-1], options.ignore_index)
        label = torch.where(valid, target, 0)
        counted = torch.cat([there, there.any(0, keepdim=True)]) & valid
        log_probs = torch.log_softmax(torch.cat([x, fused.unsqueeze(0)]), -1)
        entropies = -log_probs.gather(-1, label.expand(len(counted), *label.shape).unsqueeze(-1)).squeeze(-1)
        losses = _means(log_probs, entropies, counted, label, options)

        sample_losses = _sample_means(entropies[:-1].detach(), counted[:-1])
        ranking = losses.new_zeros(())
        if kappa is not None:
            sample_weights = torch.nan_to_num(_sample_means(weights, there))
            history = torch.where(torch.isnan(sample_losses), torch.nan, kappa.to(losses.dtype))
            ranking = functional.ranking_loss(sample_weights, history, form=options.form, pairs=options.pairs)
        loss = losses.sum() + options.ranking_weight * ranking
    return ObjectiveOutput(loss, losses[-1], losses[:-1], ranking, fused, weights, energy, sample_losses)


def observe(
    mixture: ContaminatedProduct, rows: Sequence[Tensor], target: Tensor, present: Tensor | None, ignore_index: int
) -> None:
    """Count a batch in the mixture's running statistics."""
    with torch.no_grad(), torch.autocast(rows[0].device.type, enabled=False):
        x, counted = stack_rows([row.detach() for row in rows], present)
        valid = target != ignore_index
        label, counted = torch.where(valid, target, 0), counted & valid
        mixture.running.update(
            rearrange(x, "m b ... k -> m (b ...) k"),
            rearrange(label, "b ... -> (b ...)"),
            rearrange(counted, "m b ... -> m (b ...)"),
        )


def _valid(target: Tensor, num_classes: int, ignore_index: int) -> Tensor:
    valid = target != ignore_index
    if target.is_cpu and not torch.compiler.is_compiling():
        low, high = (v.item() for v in torch.aminmax(torch.where(valid, target, 0)))
        if low < 0 or high >= num_classes:
            raise IndexError(
                f"target must hold classes 0 to {num_classes - 1} (or ignore_index={ignore_index}), "
                f"got values from {low} to {high}"
            )
    return valid


def _means(log_probs: Tensor, entropies: Tensor, counted: Tensor, label: Tensor, options: LossOptions) -> Tensor:
    """Each row set's mean cross-entropy as in ``torch.nn.CrossEntropyLoss``, ``[M + 1]``; 0 over nothing."""
    weight, smoothing, dims = options.class_weight, options.label_smoothing, tuple(range(1, counted.dim()))
    mass = counted.to(entropies.dtype)
    if weight is not None:
        mass = mass * weight.to(entropies.dtype)[label]
    total = mass.sum(dims)
    total = torch.where(total > 0, total, 1)
    losses = (1 - smoothing) * (mass * torch.where(counted, entropies, 0)).sum(dims) / total
    if smoothing:
        every = log_probs if weight is None else log_probs * weight.to(log_probs.dtype)
        smooth = torch.where(counted, -every.mean(-1), 0)
        losses = losses + smoothing * smooth.sum(dims) / total
    return losses


def _sample_means(values: Tensor, counted: Tensor) -> Tensor:
    """``[M, B, *]`` to ``[M, B]``: the mean over the positions that count; NaN where none does."""
    if values.dim() == 2:
        return torch.where(counted, values, torch.nan)
    values, counted = (rearrange(x, "m b ... -> m b (...)") for x in (values, counted))
    number = counted.sum(-1)
    total = torch.where(counted, values, 0).sum(-1)
    return torch.where(number > 0, total / number.clamp_min(1), torch.nan)
