"""A rule: how the logits of M modalities become fused logits and weights, how it is trained, and what it learns."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

import qmf_kernels
from qmf_kernels import WeightRule
from qmf_kernels.eager.fusion import per_modality

from .calibration import Calibration, CleanData
from .coefficients import Constants
from .general_objective import RowLoss
from .rows import Features, stack_rows


class Weighed(NamedTuple):
    """What the operators need to fuse a batch."""

    rows: Sequence[Tensor]  # M of ``[*, K]``
    present: Tensor | None  # ``[M, *]`` bool; None for all
    weights: WeightRule
    energy: Tensor | None = None  # ``[M, *]``; None for the rows' own. Beside ready weights and fused logits only


def ready_rule(weights: Tensor, fused: Tensor | None = None, temperature: Tensor | None = None) -> WeightRule:
    """Weights ``[M, *]`` as they are, ``1 * w + 0``, and fused logits ``[*, K]``, for the operators."""
    one = weights.new_ones(len(weights))
    return WeightRule(weights, one, torch.zeros_like(one), temperature, fused=fused)


class Rule(nn.Module):
    """What ``QualityAwareFusion`` asks; a subclass has at least ``weigh`` and ``uncertainties``.

    Rows are M tensors ``[*, K]``, checked, LogitNorm applied; ``present`` is bool ``[M, *]`` or None; ``features``, M
    of ``[*, D]`` or None, are only given to a rule that takes some.

    A parameter or buffer whose first dimension is M, or a ``ModuleList`` of M, has one entry per modality, in order;
    any other is of all modalities, and has another first dimension, such as 1: ``qmf_fusion.testing`` goes by that.
    """

    num_classes: int | None = None
    """K, for a rule that takes no other."""
    feature_widths: tuple[int | None, ...] | None = None
    """The width of each modality's features, None for one without; None for a rule that takes none."""

    takes_clean_statistics: bool = False
    """Whether ``calibrate`` measures what is typical of clean rows, for which no head may have fitted them."""

    gives_p_clean: bool = False
    """Whether its weights are P(clean)."""

    measures_untypicality: bool = False
    """Whether its uncertainties only say how untypical a row is: a high one means a fault, a low one nothing."""

    has_odds: bool = False
    """Whether it has ``odds`` of broken to clean, a buffer ``[M]``, and ``set_odds``."""

    gives_log_probabilities: bool = False
    """Whether its fused logits are log-probabilities."""

    @property
    def adaptable(self) -> tuple[str, ...]:
        """What ``TestTimeAdaptation`` multiplies by a factor for each modality; none for most rules."""
        return ()

    def adapted(self, factors: Tensor) -> dict[str, Tensor]:
        """Its buffers, by name, with factors ``[len(adaptable), M]`` on what is ``adaptable``, differentiable."""
        raise NotImplementedError

    @property
    def judged_by(self) -> str:
        """What ``fusion_report`` judges the rule by, in words."""
        return "what is measured: no theorem covers this rule, whose fused logits are no weighted average"

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        self.num_modalities = num_modalities
        self.calibration = Calibration(num_modalities)

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        """Weights or what they come from, and fused logits where they are no weighted sum.

        ``plain`` asks for the form to train with, which ignores what the rule has learned from data by itself: the
        heads would chase a target that moves with them.
        """
        raise NotImplementedError

    def kind(self) -> str:
        """What the numbers in ``state_dict`` belong to: the rule, and the options that say what they mean.

        State of another kind does not load. Numbers that are not learned and only tune the rule are not part of it.
        """
        return type(self).__name__

    def constants(self) -> Constants:
        """alpha, beta and the temperature as calibrated; an AttributeError where the rule has none."""
        raise AttributeError(f"{type(self).__name__} has no alpha, beta and temperature")

    def likelihood(self, rows: Tensor) -> Tensor:
        """What the unimodal losses take rows ``[*, K]`` for, the logits of a softmax: themselves, for most rules."""
        return rows

    def row_loss(self) -> RowLoss | None:
        """What a row costs in training instead of its cross-entropy, or None.

        A function of what ``likelihood`` makes of rows, ``[S, *, K]``, the last the fused row, and of labels ``[*, K]``
        that sum to 1, to ``[S, *]``.
        """
        return None

    def penalty(self, weighed: Weighed, target: Tensor, ignore_index: int, features: Features | None) -> Tensor | None:
        """What the rule adds to Eq. 18, a scalar, or None.

        Args:
            weighed: what ``weigh`` returned.
            target: ``[*]``, classes or ``ignore_index``, or probabilities ``[*, K]``.
            ignore_index: of targets that do not count.
            features: as given to ``weigh``.
        """
        return None

    def read(self, rows: list[Tensor], present: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows in one ``[M, *, K]``, 0 where they do not count, and where the rule counts them, bool ``[M, *]``."""
        return stack_rows(rows, present)

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """What the weights never rise with, ``[M, *]``; NaN or infinite where a row does not count."""
        raise NotImplementedError

    def calibrate(self, data: CleanData, static: Tensor | None, fit: Sequence[str], confidence: float) -> Tensor | None:
        """Make Theorem 2's conditions hold on data, starting from the uncalibrated rule.

        Returns ``[M]`` what each alpha was multiplied by so that no weight is negative, None for a rule without. A
        ValueError says which static weights ``[M]`` or constants to ``fit`` it does not have or cannot meet. Published
        rules other than Eq. 9's have none.
        """
        raise ValueError(
            f"calibrate takes a rule with constants or statistics, which {type(self).__name__} has none of"
        )

    def reset_calibration(self) -> None:
        """Undo ``calibrate``, exactly."""
        self.calibration.clear()

    def default_static(self, means: Tensor) -> Tensor:
        """The static weights ``[M]`` to compare mean weights ``[M]`` with, where none are given: their own mean."""
        return means.nanmean().expand(len(means))

    def observe(
        self,
        rows: list[Tensor],
        target: Tensor,
        present: Tensor | None,
        ignore_index: int,
        features: Features | None = None,
    ) -> None:
        """Learn from a training batch whose targets ``[*]`` have been checked; most rules do not."""

    def static_fusion(self, rows: list[Tensor], counted: Tensor, static: Tensor) -> tuple[Tensor, Tensor]:
        """Fused logits ``[*, K]`` and weights ``[M, *]`` of the static rule that this one is measured against.

        With constant weights ``[M]`` where a row counts, bool ``[M, *]``: the weighted sum of what the unimodal losses
        take for logits.
        """
        there = counted.to(rows[0].dtype)
        weights = there * per_modality(static.to(there), there)
        return (weights.unsqueeze(-1) * self.likelihood(torch.stack(rows))).sum(0), weights

    def convex_weights(self, weights: Tensor, counted: Tensor) -> Tensor | None:
        """The weights ``[M, *]`` that Theorem 1 is about, of the rule's own ``[M, *]``.

        The fused loss is at most their sum of the unimodal losses, if they are not negative and sum to 1. None for a
        rule whose fused logits are no such average, of which the theorem says nothing.
        """
        return None

    def clean_given_label(self, data: CleanData) -> Tensor | None:
        """For a rule whose weights are P(clean): what that becomes ``[M, *]`` once the class is known; else None."""
        return None

    def weights_from(self, uncertainties: Tensor) -> Tensor | None:
        """The weights ``[M, *]`` of uncertainties, where they alone decide them (Eq. 9); else None."""

    def logits_from(self, rows: list[Tensor], weights: Tensor) -> Tensor | None:
        """The fused logits ``[*, K]`` that these weights make of rows, all present (Eq. 11); None where more counts."""

    def fuse(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Fused logits ``[*, K]``, weights ``[M, *]`` and energies ``[M, *]``."""
        weighed = self.weigh(rows, present, features)
        rule = weighed.weights
        if rule.fused is not None and rule.uncertainty is not None and weighed.energy is not None:
            return rule.fused, rule.uncertainty, weighed.energy  # the operators would have nothing to add
        return qmf_kernels.fuse(weighed.rows, weighed.present, weighed.weights)
