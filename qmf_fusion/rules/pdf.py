"""PDF: weights from a predicted probability of the true class (Cao et al., ICML 2024)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmf_kernels import clamp_weights

from ..checks import check_count, check_widths
from ..general_objective import labels_of
from ..precision import without_autocast
from ..rows import Features, stack_rows
from ..rule import Weighed, ready_rule
from ..typicality import LARGEST
from .weighted_average import WeightedAverage


def collaborative_belief(scores: Tensor, counted: Tensor) -> Tensor:
    """Mono- plus holo-confidence, ``c_m + sum_(j != m) log c_j / sum_j log c_j``, ``[M, *]``.

    Args:
        scores: ``[M, *]``; the predicted probability of the true class is ``c = sigmoid(score)``.
        counted: bool ``[M, *]``; the others are in no sum.

    Example:
        >>> collaborative_belief(torch.tensor([0.8, 0.5]).logit(), torch.ones(2, dtype=torch.bool))
        tensor([1.5565, 0.7435])
    """
    doubt = torch.where(counted, -F.logsigmoid(scores), 0)
    total = doubt.sum(0)
    return torch.sigmoid(scores) + (total - doubt) / torch.where(total > 0, total, 1)


def relative_calibration(x: Tensor, counted: Tensor) -> Tensor:
    """What a belief is multiplied by, ``[M, *]``: ``min(1, D_m / D_others)``, of logits ``[M, *, K]``.

    ``D = mean_k |p_k - 1/K|`` says how far a softmax is from uniform; of the others it is the mean. With one other it
    is as published: the paper's code has two modalities.

    Example:
        >>> x = torch.tensor([[0.8, 0.2], [0.65, 0.35]]).log()
        >>> relative_calibration(x, torch.ones(2, dtype=torch.bool))
        tensor([1.0000, 0.5000])
    """
    far = torch.where(counted, (torch.softmax(x, -1) - 1 / x.shape[-1]).abs().mean(-1), 0)
    others = (far.sum(0) - far) / (counted.sum(0) - 1).clamp_min(1)
    return torch.where(far < others, far / torch.where(others > 0, others, 1), 1)


class PDF(WeightedAverage):
    """Predictive dynamic fusion: logits averaged by collaborative belief, from networks that predict confidence.

    A network per modality sees the head's features and predicts ``c``, the probability that the head gives to the true
    class. Weights are the softmax over modalities of ``collaborative_belief`` times ``relative_calibration``, without
    the latter in ``QMFLoss`` in training. As released, a network is three linear layers (of 2 D, D and 1) with nothing
    between and a sigmoid at the end, no gradient passes from it to the features or through the weights, and ``QMFLoss``
    adds its distance (L1) to the true class's probability, the mean over a modality's rows and the sum over modalities:
    give the optimizer ``fusion.parameters()`` too, and ``DistributedDataParallel`` no ``find_unused_parameters=True``.
    Eq. 18's ranking has nothing to train here: ``ranking_weight=0``.

    Args:
        num_modalities: M.
        num_classes: K.
        features: the width D of each modality's features, None for a head that hands out none, whose network sees its
            logits instead (D is K); None for no features at all.

    A row with any value that is not finite, features included, is absent, and so is a modality with a width whose
    features are None. Without relative calibration, which also goes by how sharp a softmax is, a weight never rises
    with ``uncertainties``.

    Raises:
        TypeError, ValueError: no ``num_classes``, or widths that are none; in use, other classes, or no features at all
            where a modality has a width.

    Source: Cao, Xia, Ding, Zhang and Hu, *Predictive Dynamic Fusion*, ICML 2024, and the code published with it.

    Example:
        >>> from qmf_fusion import QualityAwareFusion
        >>> fusion = QualityAwareFusion(2, combine=PDF(2, num_classes=3))
        >>> fusion([torch.zeros(4, 3), torch.eye(4, 3)]).weights.sum(0)
        tensor([1., 1., 1., 1.])
    """

    def __init__(
        self, num_modalities: int, num_classes: int | None = None, features: Sequence[int | None] | None = None
    ) -> None:
        super().__init__(num_modalities)
        if num_classes is None:
            raise TypeError(
                f"num_classes must be given for pdf, whose networks see as many logits: combine=PDF({num_modalities}, "
                "num_classes=K), or FusionModel(heads, 'pdf', num_classes=K)"
            )
        self.num_classes = check_count("num_classes", num_classes)
        self.feature_widths = check_widths(features, num_modalities)
        self.networks = nn.ModuleList()
        for width in self.feature_widths or (None,) * num_modalities:
            d = self.num_classes if width is None else width
            self.networks.append(nn.Sequential(nn.Linear(d, 2 * d), nn.Linear(2 * d, d), nn.Linear(d, 1)))

    def kind(self) -> str:
        return (
            super().kind() if self.feature_widths is None else f"{super().kind()}(features={list(self.feature_widths)})"
        )

    def stack(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Logits ``[M, *, K]``, where they count, and the networks' scores, ``[M, *]`` both."""
        if rows[0].shape[-1] != self.num_classes:
            raise ValueError(f"logits must have the {self.num_classes} classes of the rule, got {rows[0].shape[-1]}")
        if features is None and self.feature_widths is not None:
            raise ValueError(f"features must be given, of the widths {list(self.feature_widths)}")
        x, counted = stack_rows(rows, present)
        x = x.clamp(-LARGEST, LARGEST)  # of which sums and linear maps stay finite
        whole, scores = [], []
        for m, network in enumerate(self.networks):
            there, seen = counted[m], x[m].detach()
            width = None if self.feature_widths is None else self.feature_widths[m]
            if features is not None and width is not None:
                given = features[m]
                seen = x.new_full((*there.shape, width), torch.nan) if given is None else given.detach().to(x.dtype)
                there = there & torch.isfinite(seen).all(-1)
                seen = torch.where(there.unsqueeze(-1), seen, 0).clamp(-LARGEST, LARGEST)
            whole.append(there)
            scores.append(network(seen.to(next(network.parameters()).dtype)).squeeze(-1).to(x.dtype))
        counted = torch.stack(whole)
        return torch.where(counted.unsqueeze(-1), x, 0), counted, torch.stack(scores)

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        with without_autocast(rows[0].device):
            x, counted, scores = self.stack(rows, present, features)
            belief = collaborative_belief(scores.detach(), counted)
            if not plain:
                belief = belief * relative_calibration(x.detach(), counted)
            weights = clamp_weights(belief.exp(), counted, nonnegative=True, normalize=True)
            return Weighed(x.unbind(0), counted, ready_rule(weights), scores=scores)

    def penalty(self, weighed: Weighed, target: Tensor, ignore_index: int) -> Tensor:
        """``sum_m mean |c_m - p_m(y)|`` over the rows that count and have a target."""
        counted, scores = weighed.present, weighed.scores
        assert counted is not None
        assert scores is not None
        with without_autocast(target.device):
            x = torch.stack([row.detach() for row in weighed.rows])
            label, valid = labels_of(target, x.shape[-1], ignore_index)
            true = (torch.softmax(x, -1) * label).sum(-1)
            missed = (torch.sigmoid(scores) - true).abs()
            counted = counted if valid is None else counted & valid
            return (torch.where(counted, missed, 0).flatten(1).sum(1) / counted.flatten(1).sum(1).clamp_min(1)).sum()

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """``1 - c``, the predicted probability of every class but the true one."""
        with without_autocast(rows[0].device):
            _, counted, scores = self.stack(rows, None, features)
            return torch.where(counted, torch.sigmoid(-scores), torch.nan)
