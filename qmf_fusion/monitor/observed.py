"""What the monitor sees of a batch: a few numbers a row and modality, of all processes."""

from typing import NamedTuple

import torch
from torch import Tensor

from qmf_kernels.eager.fusion import per_modality

from ..checks import Logits, Present
from ..fusion import Heads, QualityAwareFusion
from ..precision import widened
from ..processes import gather_columns
from .ranks import grid_index

_FIRST, _SECOND = 0x9E3779B97F4A7C15 - 2**64, 0xD6E8FEB86659FD93 - 2**64  # odd, of bits at random


class Observed(NamedTuple):
    """B rows, one a sample, of M modalities; a dense prediction's positions are one row together."""

    counted: Tensor
    """bool ``[M, B]``: present, and finite, with an uncertainty that is a number."""
    score: Tensor
    """int64 ``[M, B]``: where its uncertainty, the mean over positions that count, stands on the grid; -1 for none."""
    fingerprint: Tensor
    """int64 ``[M, B]``: of its logits and features; equal for rows that are equal in float32."""
    p_clean: Tensor
    """float64 ``[M, B]``, the mean over positions that count; NaN for another rule."""
    judged: Tensor
    """bool ``[M]``: which modalities have features that the rule judges by."""
    classes: int
    """K."""

    def to(self, device: torch.device, dtype: torch.dtype) -> "Observed":
        """On another device, ``p_clean`` in its dtype."""
        counted, score, fingerprint, p_clean, judged = (x.to(device) for x in self[:-1])
        return Observed(counted, score, fingerprint, p_clean.to(dtype), judged, self.classes)


class Events(NamedTuple):
    """B rows, as the tests take them."""

    counted: Tensor  # bool ``[M, B]``
    score: Tensor  # int64 ``[M, B]``; -1 for none
    repeated: Tensor  # int64 ``[M, B]``: 1 for the second of a pair of equal rows, 0 of unequal ones, -1 for the first
    p_clean: Tensor  # ``[M, B]``; NaN for none

    def rows(self, start: int, end: int) -> "Events":
        """Some of them."""
        return Events(*(x[:, start:end] for x in self))

    def gathered(self) -> "Events":
        """Those of all processes, in the order of their ranks; a collective."""
        whole = [self.counted.long(), self.score, self.repeated, self.p_clean.contiguous().view(torch.int64)]
        counted, score, repeated, p_clean = gather_columns(torch.stack(whole)).unbind(0)
        return Events(counted.bool(), score, repeated, p_clean.contiguous().view(torch.float64))


def observe(
    fusion: QualityAwareFusion,
    given: Heads,
    present: Present | None = None,
    features: Logits | None = None,
    ratio: Tensor | None = None,
) -> Observed:
    """See a batch, fused anew: of a ``FusionOutput`` count its logits, what is present, and the features.

    Its weights may be of other odds than the rule's now, and of other features than those given beside it.

    Args:
        fusion: the layer.
        given: as the fusion takes it.
        present: as the fusion takes it.
        features: as the fusion takes them.
        ratio: what the rule's odds are of those at which P(clean) is asked for, ``[M]``; None for the rule's own.

    Raises:
        TypeError, ValueError: as the fusion raises them.
    """
    out = fusion(given, present, features)
    u = widened(fusion.uncertainties(out))
    counted = (out.energy < torch.inf) & ~u.isnan()
    if out.present is not None:
        counted = counted & out.present
    score = _mean(u, counted)
    p_clean = _mean(_at_odds(widened(out.weights), ratio), counted)
    if not fusion.rule.gives_p_clean:
        p_clean = torch.full_like(p_clean, torch.nan)
    prints = [_hash(x) for x in out.unimodal_logits]
    judged = torch.zeros(len(prints), dtype=torch.bool, device="cpu")
    for m, f in enumerate(out.features or ()):
        if f is not None:
            prints[m], judged[m] = prints[m] * _FIRST + _hash(f), True
    there = ~score.isnan()  # where no position counts, the mean is NaN
    score, classes = torch.where(there, grid_index(score), -1), out.logits.shape[fusion.class_dim]
    return Observed(there, score, torch.stack(prints), p_clean, judged, classes)


def _at_odds(p_clean: Tensor, ratio: Tensor | None) -> Tensor:
    """What P(clean) ``[M, *]`` would be at the rule's odds divided by ``ratio`` ``[M]``, each modality for itself."""
    if ratio is None:
        return p_clean
    clean = p_clean * per_modality(ratio.to(p_clean), p_clean)
    return clean / (clean + 1 - p_clean)


def _flat(x: Tensor) -> Tensor:
    """``[M, *]`` as ``[M, B, positions]``; without any batch, B is 1."""
    return x.reshape(len(x), 1 if x.dim() == 1 else x.shape[1], -1)


def _mean(x: Tensor, counted: Tensor) -> Tensor:
    """Over a sample's positions that count, ``[M, B]``; NaN where none does."""
    x, there = _flat(x), _flat(counted)
    return torch.where(there, x, 0).sum(-1) / there.sum(-1)


def _hash(x: Tensor) -> Tensor:
    """A number for each row of ``[B, ...]``, int64 ``[B]``."""
    flat = x.reshape(1 if x.dim() == 1 else len(x), -1).detach()
    place = torch.arange(flat.shape[1], device=x.device)
    # Place and value are mixed together: from a value's mixture times a place's weight, equal values at places whose
    # weights have the same sum would make equal numbers.
    bits = (flat.float().contiguous().view(torch.int32).long() + place * _SECOND) * _FIRST
    bits = (bits ^ (bits >> 29)) * _SECOND
    return (bits ^ (bits >> 32)).sum(1)


def pair_up(counted: Tensor, fingerprint: Tensor, waiting: Tensor) -> Tensor:
    """Whether the second of each two rows is the first again, as ``Events.repeated``.

    Pairs do not overlap, so that those of exchangeable rows are exchangeable too, however often rows recur.

    Args:
        counted: bool ``[M, B]``: a row that does not count is equal to none.
        fingerprint: int64 ``[M, B]``.
        waiting: int64 ``[3, M]``: whether a row of before waits for its second, whether it counts, its fingerprint. It
            is changed.
    """
    waits = int(waiting[0, 0])
    if waits:
        counted = torch.cat([waiting[1].bool().unsqueeze(1), counted], 1)
        fingerprint = torch.cat([waiting[2].unsqueeze(1), fingerprint], 1)
    num = counted.shape[1]
    repeated = torch.full_like(fingerprint, -1)
    first, second = slice(0, num - 1, 2), slice(1, num, 2)
    both = counted[:, first] & counted[:, second]
    repeated[:, second] = (both & (fingerprint[:, first] == fingerprint[:, second])).long()
    waiting[0] = num % 2
    waiting[1:] = torch.stack([counted[:, -1].long(), fingerprint[:, -1]])
    return repeated[:, waits:]
