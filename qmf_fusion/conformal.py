"""Sets of classes that hold the true one with a stated probability, whichever modalities are missing.

Split conformal prediction: on held-out samples the score of a sample is minus the log-probability that the fused answer
gives its true class. The set of a new sample holds every class whose score is at most the k-th smallest of those n,
``k = ceil((n + 1) * coverage)``. If old and new samples are exchangeable, the new score is as likely to have any rank
among all ``n + 1``, so that the set holds the true class with a probability of at least ``coverage``, and of at most
``coverage + 1 / (n + 1)`` where scores do not tie: for any heads, any rule, any distribution, and finite n.
The most probable class is in every set, so that none is empty: where the fused answer is right more often than
``coverage``, so is the set.

**A threshold for each pattern.** By few modalities the answer is worse; one threshold for all would cover too much
where all are there and too little where some are missing. So every pattern of present modalities has a threshold of
its own, from samples under that same pattern: those that came so, where they are enough, else every sample that has at
least these modalities, the others hidden from the fusion.

**What is guaranteed.** Coverage given the pattern, if new samples of that pattern are like the calibration samples. For
samples that came with the pattern this is all. For a threshold of hidden modalities it needs modalities to be missing
independently of what the sample is and of its class: a camera that fails by night breaks it, as night is not day. It is
an average over samples and over draws of the calibration data, not a promise for one class or one sample. **Under
shift** (damage, other places, other class shares) nothing is guaranteed: see docs/missing.md for what was measured.

Sources: Vovk, Gammerman and Shafer, *Algorithmic Learning in a Random World*, 2005 (conditioning on a category);
Sadinle, Lei and Wasserman, *Least Ambiguous Set-Valued Classifiers with Bounded Error Levels*, JASA 2019 (the score);
Zaffran, Dieuleveut, Josse and Romano, *Conformal Prediction with Missing Values*, ICML 2023 (validity given the mask,
by hiding values of the calibration samples).
"""

import math
from typing import Self

import torch
from torch import Tensor

from .checks import Logits, Present, check_number, check_prior
from .fusion import Heads, QualityAwareFusion, check_fusion
from .precision import KeepsPrecision
from .subsets import EXACT, all_subsets, check_classes, check_held_out, subset_answers, subset_number

_ENOUGH = 10  # times 1 / (1 - coverage): from so many samples on that came with a pattern, these alone count


def check_coverage(coverage: float) -> float:
    check_number("coverage", coverage)
    if not 0 < coverage < 1:
        raise ValueError(f"coverage must be between 0 and 1, got {coverage}")
    return float(coverage)


def conformal_quantile(scores: Tensor, coverage: float) -> Tensor:
    """The k-th smallest of n scores ``[*, n]``, ``k = ceil((n + 1) * coverage)``; +inf where k is above n.

    Example:
        >>> conformal_quantile(torch.arange(1.0, 10.0), 0.8), conformal_quantile(torch.arange(1.0, 10.0), 0.95)
        (tensor(8.), tensor(inf))
    """
    num = scores.shape[-1]
    # A product that is whole but for rounding, as 0.9 * 10 might be, must not count as above.
    k = math.ceil((num + 1) * coverage - 1e-9)
    if k > num:
        return scores.new_full(scores.shape[:-1], torch.inf)
    return scores.kthvalue(max(k, 1), -1).values


class Calibrated(KeepsPrecision):
    """What is calibrated to a stated coverage for a fusion, which the model owns.

    Args:
        fusion: any fusion of this package.
        coverage: the wanted probability, between 0 and 1.
        prior: positive ``[K]``, the classes' shares; None for equal ones.

    Raises:
        TypeError, ValueError: a fusion of another kind, a coverage or prior out of range.
    """

    level: Tensor
    prior: Tensor | None

    def __init__(self, fusion: QualityAwareFusion, coverage: float, prior: Tensor | None) -> None:
        super().__init__()
        # In a tuple, where nn.Module does not take it for a part of its own.
        self._fusion = (check_fusion(fusion),)
        # In the state, so that what was calibrated is never taken for that of another coverage.
        self.register_buffer("level", torch.tensor(check_coverage(coverage), dtype=torch.float64, device="cpu"))
        self.register_buffer("prior", None if prior is None else check_prior(prior).exp())

    @property
    def fusion(self) -> QualityAwareFusion:
        """The layer, which the model owns."""
        return self._fusion[0]

    @property
    def coverage(self) -> float:
        """The wanted probability."""
        return float(self.level)


class ConformalSets(Calibrated):
    """Prediction sets for the fused answer, a threshold for each pattern of present modalities.

    It refers to the fusion, which the model owns, and has only its own state: ``thresholds`` and ``counts``, which
    ``state_dict`` keeps. A change of heads, fusion or statistics makes it worthless: calibrate it last.

    Args:
        fusion: of up to 12 modalities.
        coverage: the wanted probability that the true class is in the set, between 0 and 1.
        prior: positive ``[K]``: the classes' shares in the training data, which decide the sets of samples without
            any modality. None for equal shares.

    Raises:
        TypeError, ValueError: a fusion of another kind or of more than 12 modalities, a coverage or prior out of range.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> target = torch.randint(4, (500,), generator=g)
        >>> heads = 2 * torch.randn(2, 500, 4, generator=g) + 3 * torch.nn.functional.one_hot(target, 4)
        >>> sets = ConformalSets(QualityAwareFusion(2), coverage=0.9).calibrate(heads[:, :400], target[:400])
        >>> held = sets(heads[:, 400:])
        >>> int(held[torch.arange(100), target[400:]].sum())  # sets of 100 that hold the true class
        85
    """

    thresholds: Tensor
    """float64 ``[2^M]``, in nats, ordered as in ``all_subsets``; NaN before ``calibrate``, +inf for all classes."""
    counts: Tensor
    """int64 ``[2^M]``: the calibration samples of each pattern."""
    made: Tensor
    """bool ``[2^M]``: whether those had to be made by hiding modalities of samples that have more."""

    def __init__(self, fusion: QualityAwareFusion, coverage: float = 0.9, prior: Tensor | None = None) -> None:
        super().__init__(fusion, coverage, prior)
        if fusion.num_modalities > EXACT:
            raise ValueError(f"fusion must have at most {EXACT} modalities, got {fusion.num_modalities}")
        num = 2**fusion.num_modalities
        self.register_buffer("thresholds", torch.full((num,), math.nan, dtype=torch.float64, device="cpu"))
        self.register_buffer("counts", torch.zeros(num, dtype=torch.int64, device="cpu"))
        self.register_buffer("made", torch.zeros(num, dtype=torch.bool, device="cpu"))

    @torch.no_grad()
    def calibrate(
        self, logits: Heads, target: Tensor, *, present: Present | None = None, features: Logits | None = None
    ) -> Self:
        """Find the thresholds on data that neither the heads nor ``fusion.calibrate`` have seen.

        Args:
            logits: the heads' logits, ``[N, K]`` each, as the fusion takes them.
            target: int ``[N]``, classes 0 to K - 1.
            present: as the fusion takes it.
            features: as the fusion takes them.

        Raises:
            TypeError, ValueError, IndexError: arguments of the wrong kind, count, shape, dtype, device or range.
        """
        fusion, coverage = self.fusion, self.coverage
        held = check_held_out(fusion, logits, present, features, self.prior)
        target, subsets = check_classes(target, held), all_subsets(fusion.num_modalities)
        *_, full = subset_answers(fusion, held, subsets[-1:])
        own = subset_number(full.present)
        for number, answer in enumerate(subset_answers(fusion, held, subsets)):
            # Of what a sample has, the subset must leave exactly itself.
            usable, natural = subset_number(answer.present) == number, own == number
            made = int(natural.sum()) * (1 - coverage) < _ENOUGH
            scores = _scores(answer.logits).gather(-1, target.unsqueeze(-1)).squeeze(-1)
            scores = scores[usable if made else natural]
            self.thresholds[number] = conformal_quantile(scores, coverage) if len(scores) else math.inf
            self.counts[number], self.made[number] = len(scores), made
        return self

    @torch.no_grad()
    def forward(self, logits: Heads, present: Present | None = None, features: Logits | None = None) -> Tensor:
        """Which classes are in each sample's set, bool ``[N, K]``, on the logits' device.

        The most probable class always is, so that no set is empty. The pattern of a sample is what the fusion counts:
        a modality that is not finite is missing.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device.
            RuntimeError: not calibrated.
        """
        if bool(self.thresholds.isnan().any()):
            raise RuntimeError("calibrate() these sets first: they have no thresholds")
        held = check_held_out(self.fusion, logits, present, features, self.prior)
        everything = torch.ones(1, self.fusion.num_modalities, dtype=torch.bool)
        *_, answer = subset_answers(self.fusion, held, everything)
        scores = _scores(answer.logits)
        limit = self.thresholds.cpu().double()[subset_number(answer.present)].unsqueeze(-1)
        held_in = (scores <= limit) | (scores == scores.amin(-1, keepdim=True))
        return held_in.to(held.present.device)

    def extra_repr(self) -> str:
        return f"coverage={self.coverage}, modalities={list(self.fusion.names)}"


def _scores(fused: Tensor) -> Tensor:
    """Minus the log-probability of each class, ``[N, K]``."""
    return -torch.log_softmax(fused, -1)
