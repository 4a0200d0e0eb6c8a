"""RCML: evidence averaged over the modalities, and trained not to contradict itself (Xu et al., AAAI 2024)."""

import torch
from torch import Tensor

from ..evidential import evidential_loss
from ..general_objective import RowLoss
from ..rule import Weighed
from .tmc import TMC, vacuity


def average_evidence(rows: Tensor, counted: Tensor) -> Tensor:
    """The modalities' average evidence: ``log(1 + e)``, ``[*, K]`` of ``[M, *, K]`` and where they count, ``[M, *]``.

    As published it is taken in turn, ``e = (e + e_m) / 2``, so that of three or more modalities that are there the last
    counts half, the one before it a quarter, and so on; the first two count the same.

    Example:
        >>> evidence = torch.tensor([[4.0, 0.0], [0.0, 4.0], [8.0, 0.0]])
        >>> torch.expm1(average_evidence(torch.log1p(evidence), torch.ones(3, dtype=torch.bool)))
        tensor([5.0000, 1.0000])
    """
    some = counted.any(0)
    after = counted.flip(0).cumsum(0).flip(0) - counted.long()  # how many that count follow
    first = counted & (after == counted.sum(0) - 1)
    share = torch.where(counted, torch.exp2(first.to(rows.dtype) - 1 - after), 0)
    # The shares of those that count sum to 1, so that 1 + e is averaged as e is.
    averaged = torch.logsumexp(rows + torch.where(some, share, 1).log().unsqueeze(-1), 0)
    return torch.where(some.unsqueeze(-1), averaged, 0)


def conflict(rows: Tensor, counted: Tensor) -> Tensor:
    """The degree of conflict (definition 4 of the paper), the sum over pairs of modalities over M - 1: ``[*]``.

    Of two: the distance of their projected probabilities ``(1 + e) / S`` (half the L1 norm), times ``(1 - u)`` of each:
    how far they contradict each other where both have something to say. From 0, of one modality or of none, upwards;
    each pair counts twice, as published.

    Args:
        rows: ``log(1 + e)``, ``[M, *, K]``.
        counted: bool ``[M, *]``; the others are in no pair.
    """
    sure = torch.where(counted, 1 - vacuity(rows), 0)
    projected = torch.softmax(rows, -1)
    # One modality against all at a time: all pairs at once would take M times the memory.
    total = torch.stack(
        [((p - projected).abs().sum(-1) / 2 * sure * s).sum(0) for p, s in zip(projected, sure, strict=True)]
    )
    return total.sum(0) / (counted.sum(0) - 1).clamp_min(1)


class RCML(TMC):
    """Reliable conflictive multi-view learning: average belief, and a loss that counts conflict.

    As ``TMC``, but for the fusion (the order of the modalities matters from three on, see ``average_evidence``), and
    for the loss: the mean, not the sum, of the evidential losses, fused and unimodal, and the mean degree of conflict,
    which ``qmf_fusion.conflict`` gives sample by sample. The mean is over all M + 1 losses, as published for views that
    are always there; that of a modality which a whole batch lacks is 0 in it.

    Args: as ``TMC``'s.

    Source: Xu, Si, Guan, Zhao, Wu and Gao, *Reliable Conflictive Multi-View Learning*, AAAI 2024.

    Example:
        >>> from qmf_fusion import QualityAwareFusion
        >>> fusion = QualityAwareFusion(["rgb", "depth"], combine="rcml")
        >>> against = [torch.tensor([[9.0, -9.0]]), torch.tensor([[-9.0, 9.0]])]
        >>> fusion(against).logits.softmax(-1)
        tensor([[0.5000, 0.5000]])
    """

    def combine(self, rows: Tensor, counted: Tensor) -> Tensor:
        return average_evidence(rows, counted)

    def row_loss(self) -> RowLoss:
        annealing, terms = self.annealing(), self.num_modalities + 1
        return lambda rows, label: evidential_loss(rows, label, annealing) / terms

    def penalty(self, weighed: Weighed, target: Tensor, ignore_index: int) -> Tensor:
        """The mean degree of conflict over the samples that have a target and a modality."""
        assert weighed.present is not None
        degree = conflict(torch.stack(list(weighed.rows)), weighed.present)
        counts = weighed.present.any(0)
        if not target.is_floating_point():
            counts = counts & (target != ignore_index)
        return torch.where(counts, degree, 0).sum() / counts.sum().clamp_min(1)
