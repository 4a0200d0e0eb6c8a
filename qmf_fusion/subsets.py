"""The fused answer of every subset of modalities, from heads that ran once.

What a fusion would say if only some modalities were there needs nothing but its own ``present`` mask, so that all
``2^M - 1`` subsets cost as many fusions and not one more run of a head. ``missing``, ``importance``, ``selection`` and
``conformal`` read their answers here.

**The empty set** has an answer too, as something must be said of a sample without a modality: the class shares
``prior``, or where none are given the same share for every class, as the layer's fused logits of 0 say.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Logits, Present, check_count, check_logits, check_present, check_prior, check_target
from .fusion import Heads, QualityAwareFusion, check_fusion, parts_of
from .rows import Features

EXACT = 12
"""Up to how many modalities all subsets are gone through: 4096 of them."""
_NUMBERS_A_CALL = 2**22  # what one call of the rule may hold of logits and features, unless a single subset has more


class SubsetAnswer(NamedTuple):
    """What a fusion says of N samples by some of their modalities."""

    logits: Tensor
    """Fused ``[N, K]``, float64, on the CPU; the log shares of the classes where no modality is left."""
    present: Tensor
    """bool ``[M, N]``, on the CPU: what the answer rests on, without absent modalities and those that are broken."""


class HeldOut(NamedTuple):
    """Checked data, as the rule sees it."""

    rows: list[Tensor]  # M of ``[N, K]``
    present: Tensor  # bool ``[M, N]``
    features: Features | None
    log_prior: Tensor  # ``[K]``, float64, on the CPU

    @property
    def num_samples(self) -> int:
        return len(self.rows[0])


def all_subsets(num_modalities: int) -> Tensor:
    """Every subset, bool ``[2^M, M]``: row i has modality m where bit m of i is set, so that the first is empty.

    Raises:
        ValueError: more than ``EXACT`` modalities.

    Example:
        >>> all_subsets(2).int()
        tensor([[0, 0],
                [1, 0],
                [0, 1],
                [1, 1]], dtype=torch.int32)
    """
    num = check_count("num_modalities", num_modalities)
    if num > EXACT:
        raise ValueError(f"num_modalities must be at most {EXACT}, whose subsets are {2**EXACT}, got {num}")
    return (torch.arange(2**num).unsqueeze(1) >> torch.arange(num)) % 2 == 1


def subset_number(present: Tensor) -> Tensor:
    """Where bool ``[M, *]`` stands in ``all_subsets``, int64 ``[*]``.

    Example:
        >>> subset_number(torch.tensor([[True, False], [False, True]]))
        tensor([1, 2])
    """
    powers = 2 ** torch.arange(len(present), device=present.device)
    return torch.tensordot(powers, present.long(), 1)


def fuse_subsets(
    fusion: QualityAwareFusion,
    logits: Heads,
    subsets: Tensor,
    *,
    present: Present | None = None,
    features: Logits | None = None,
    prior: Tensor | None = None,
) -> Iterator[SubsetAnswer]:
    """The fused answer of N samples by each subset in turn, in one or few calls of the rule.

    A modality that a sample lacks is in no subset of that sample. Memory: a subset's answer ``[N, K]`` at a time, and
    up to 4 million numbers of logits and features a call where a single subset has fewer.

    Args:
        fusion: any fusion of this package.
        logits: the heads' logits, ``[N, K]`` each, as ``fusion`` takes them.
        subsets: bool ``[S, M]``, such as ``all_subsets(M)``.
        present: as ``fusion`` takes it.
        features: as ``fusion`` takes them.
        prior: positive ``[K]``, the classes' shares or counts where nothing is known of a sample; None for equal ones.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device, naming them.

    Example:
        >>> fusion = QualityAwareFusion(2, combine="probabilities")
        >>> heads = [torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 1.0]])]
        >>> [[round(p, 2) for p in each.logits.softmax(-1)[0].tolist()]
        ...  for each in fuse_subsets(fusion, heads, all_subsets(2))]
        [[0.5, 0.5], [0.88, 0.12], [0.27, 0.73], [0.65, 0.35]]
    """
    held = check_held_out(fusion, logits, present, features, prior)
    if not isinstance(subsets, Tensor) or subsets.dtype != torch.bool:
        raise TypeError(
            f"subsets must be a bool tensor [S, M], got {getattr(subsets, 'dtype', type(subsets).__name__)}"
        )
    if subsets.dim() != 2 or subsets.shape[1] != fusion.num_modalities:
        raise ValueError(f"subsets must be [S, {fusion.num_modalities}], got {tuple(subsets.shape)}")
    return subset_answers(fusion, held, subsets)


def subset_answers(fusion: QualityAwareFusion, held: HeldOut, subsets: Tensor) -> Iterator[SubsetAnswer]:
    """``fuse_subsets`` of data that is checked."""
    widths = [x.shape[-1] for x in (*held.rows, *(f for f in held.features or () if f is not None))]
    together = max(1, _NUMBERS_A_CALL // (held.num_samples * sum(widths)))
    for chunk in subsets.to(held.present.device).split(together):
        rows = [x.expand(len(chunk), *x.shape) for x in held.rows]
        there = chunk.T.unsqueeze(-1) & held.present.unsqueeze(1)  # [M, S, N]
        seen = None
        if held.features is not None:
            seen = [None if f is None else f.expand(len(chunk), *f.shape) for f in held.features]
        with torch.no_grad():
            fused, _, energy = fusion.rule.fuse(rows, there, seen)
        # An infinite energy is how the layer says that a modality is absent, or broken and so as good as absent.
        fused, counted = fused.cpu().double(), (energy != torch.inf).cpu() & there.cpu()
        fused = torch.where(counted.any(0).unsqueeze(-1), fused, held.log_prior)
        for n in range(len(chunk)):
            yield SubsetAnswer(fused[n], counted[:, n])


def check_held_out(
    fusion: QualityAwareFusion,
    logits: Heads,
    present: Present | None,
    features: Logits | None,
    prior: Tensor | None,
) -> HeldOut:
    """Check what every function over subsets takes.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device, naming them.
    """
    check_fusion(fusion)
    logits, present, features = parts_of(logits, present, features)
    rows, there = check_logits(logits, fusion.names, fusion.class_dim)
    if rows[0].dim() != 2:
        raise ValueError(f"logits must be [N, K] per modality, got {tuple(rows[0].shape)}")
    shape, device = (len(rows), len(rows[0])), rows[0].device
    mask = check_present(present, there, shape, device, fusion.names)
    seen = fusion.check_features(features, rows)
    mask = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    rows = fusion.prepare([x.detach() for x in rows])
    classes = rows[0].shape[-1]
    # Without shares, zeros, as the layer's own fused logits.
    log_prior = torch.zeros(classes, dtype=torch.float64, device="cpu") if prior is None else check_prior(prior)
    if len(log_prior) != classes:
        raise ValueError(f"prior must be [{classes}], one number a class, got {tuple(log_prior.shape)}")
    return HeldOut(rows, mask, seen, log_prior)


def check_classes(target: Tensor, held: HeldOut) -> Tensor:
    """``target`` as int64 ``[N]`` on the CPU.

    Raises:
        TypeError, ValueError, IndexError: it is no tensor of N classes.
    """
    target = check_target(target, held.rows[0].shape, held.present.device).cpu()
    classes = held.rows[0].shape[-1]
    wrong = (target < 0) | (target >= classes)
    if bool(wrong.any()):
        raise IndexError(f"target must hold classes 0 to {classes - 1}, got {int(target[wrong][0])}")
    return target
