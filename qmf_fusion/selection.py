"""The smallest set of modalities that is as good as the best one, within a tolerance, and with a stated confidence.

Let ``v(S)`` be the mean of a value between 0 and 1, such as accuracy, over all samples that might come. For each
subset S the claim "some subset is better than S by the tolerance or more" is tested on held-out data. It is wrong only
if it is wrong for every rival T, so that its p-value is the largest of those of "``v(T) - v(S) >= tolerance``",
without any correction for their number (an intersection-union test). Over the subsets S, of which several are tried,
Holm's procedure corrects. Of the subsets whose claim is rejected the smallest is selected, of several of one size the
one of the highest mean.

**What is guaranteed.** With a probability of at least ``confidence`` over the draw of the held-out data, the selected
subset falls short of the best one by less than the tolerance, for any number of samples and any distribution, as long
as samples are drawn independently from the one on which the subset will be used. Where nothing can be claimed,
``guaranteed`` is False and all modalities are selected.

The single tests bet: with ``d = v(T) - v(S)`` of one sample after the other, a capital that starts at 1 is multiplied
by ``1 + l (tolerance - d)``, where the stake l is chosen from the samples before. If the claim holds it cannot be
expected to grow, and by Ville's inequality it ever reaches c with a probability of at most ``1 / c``.

Sources: Waudby-Smith and Ramdas, *Estimating Means of Bounded Random Variables by Betting*, JRSS B 2024 (the capital
and its stakes); Holm, *A Simple Sequentially Rejective Multiple Test Procedure*, 1979; Berger, *Multiparameter
Hypothesis Testing and Acceptance Sampling*, 1982 (intersection-union). That modalities are selected with a guarantee
of being close to the best subset follows Chandy et al., 2026 (arXiv 2602.00171); theirs is conditional on the features
that were observed, this one a mean over samples.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import Logits, Present, check_confidence, check_number
from .fusion import Heads, QualityAwareFusion
from .importance import Worth, check_worth, of_target, worth_of
from .subsets import all_subsets, check_classes, check_held_out, subset_answers

MOST = 8
"""Up to how many modalities: every pair of subsets is compared."""


@dataclass(frozen=True)
class Selection:
    """What ``select_modalities`` found."""

    modalities: tuple[str, ...]
    dropped: tuple[str, ...]
    """The others."""
    guaranteed: bool
    """Whether the statement below holds; else all modalities are selected, for want of data."""
    mean: float
    """The mean value of the selected subset on the data given."""
    best: float
    """The highest mean of any subset."""
    tolerance: float
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Fit for JSON."""
        return {**self.__dict__, "modalities": list(self.modalities), "dropped": list(self.dropped)}

    def __str__(self) -> str:
        names, sure = " + ".join(self.modalities) or "no modality", f"at a confidence of {100 * self.confidence:g} %"
        if not self.dropped:
            return f"{names}: no fewer are shown to be within {self.tolerance:g} of the best subset, {sure}"
        figures = f"(measured {self.mean:.4f}, the best {self.best:.4f})"
        return f"{names}: within {self.tolerance:g} of the best subset, {sure} {figures}"


@torch.no_grad()
def select_modalities(
    fusion: QualityAwareFusion,
    logits: Heads,
    target: Tensor,
    tolerance: float,
    value: str | Worth = "accuracy",
    *,
    present: Present | None = None,
    features: Logits | None = None,
    prior: Tensor | None = None,
    confidence: float = 0.9,
    seed: int = 0,
) -> Selection:
    """The smallest subset of modalities that is within ``tolerance`` of the best one.

    Args:
        fusion: of up to 8 modalities.
        logits: the heads' logits on held-out data, ``[N, K]`` each, as ``fusion`` takes them.
        target: int ``[N]``, classes 0 to K - 1.
        tolerance: how much of the value may be lost, between 0 and 1; 0.02 is 2 points of accuracy.
        value: as ``shapley_importance`` takes it, from 0 to 1: the log-loss, which has no limit, is none.
        present: as ``fusion`` takes it.
        features: as ``fusion`` takes them.
        prior: positive ``[K]``: the classes' shares in the training data, the answer of the empty set.
        confidence: of the statement, between 0 and 1.
        seed: of the order in which samples are looked at, which must not be that of their classes.

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, count, shape, dtype, device or range.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> target = torch.randint(3, (2000,), generator=g)
        >>> useful = torch.randn(2000, 3, generator=g) + 3 * torch.nn.functional.one_hot(target, 3)
        >>> heads = {"useful": useful, "noise": 0.1 * torch.randn(2000, 3, generator=g)}
        >>> print(select_modalities(QualityAwareFusion(list(heads)), heads, target, tolerance=0.02))
        useful: within 0.02 of the best subset, at a confidence of 90 % (measured 0.9770, the best 0.9770)
    """
    check_confidence(confidence)
    check_number("tolerance", tolerance)
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance must be between 0 and 1, got {tolerance}")
    held = check_held_out(fusion, logits, present, features, prior)
    if fusion.num_modalities > MOST:
        raise ValueError(f"fusion must have at most {MOST} modalities, got {fusion.num_modalities}")
    target, worth, subsets = check_classes(target, held), check_worth(value), all_subsets(fusion.num_modalities)
    answers = subset_answers(fusion, held, subsets)
    values = torch.stack([of_target(worth_of(worth, answer.logits), target) for answer in answers])  # [S, N]
    if float(values.min()) < 0 or float(values.max()) > 1:
        raise ValueError(f"value must lie from 0 to 1, got {float(values.min()):g} to {float(values.max()):g}")
    order = torch.randperm(values.shape[1], generator=torch.Generator().manual_seed(seed))
    rejected = _holm(_p_values(values[:, order], tolerance), 1 - confidence)
    means = values.mean(1)
    sizes = subsets.sum(1)
    chosen = len(subsets) - 1
    if bool(rejected.any()):
        small = rejected & (sizes == sizes[rejected].min())
        chosen = int(torch.where(small, means, -1).argmax())
    there = dict(zip(fusion.names, subsets[chosen].tolist(), strict=True))
    kept, dropped = (tuple(name for name in there if there[name] == wanted) for wanted in (True, False))
    figures = float(means[chosen]), float(means.max()), tolerance, confidence
    return Selection(kept, dropped, bool(rejected.any()), *figures)


def _p_values(values: Tensor, tolerance: float) -> Tensor:
    """Of "some subset is better than S by the tolerance or more", ``[S]``, of values from 0 to 1, ``[S, N]``."""
    # Of each S, in the rows, and each rival T: what is left of the tolerance.
    gains = (tolerance - (v.unsqueeze(0) - v.unsqueeze(1)) for v in values.unbind(1))
    against = bet(gains, tolerance + 1, 1 - tolerance)
    return against.fill_diagonal_(0).amax(1)


def bet(gains: Iterable[Tensor], most: float, least: float) -> Tensor:
    """p-values ``[*]`` of "the mean is 0 or less", of gains ``[*]`` from ``-least`` to ``most`` that come one by one.

    The stake on a sample is what would have been best for mean and variance of those before, at most ``1 / (2 least)``,
    so that no capital is lost at once.

    Example:
        >>> bet([torch.tensor(0.5)] * 20, 1.0, 1.0)
        tensor(0.0150)
    """
    capital = highest = total = squares = torch.zeros(())  # the capital by its logarithm
    spread = ((most + least) / 2) ** 2  # as if one sample had been seen before, of mean 0 and the largest variance
    for n, gain in enumerate(gains):
        mean = total / (n + 1)
        variance = (spread + squares) / (n + 1) - mean.square()
        stake = (mean / (variance + mean.square())).clamp(0, 0.5 / least)
        capital = capital + torch.log1p(stake * gain)
        highest = torch.maximum(highest, capital)
        total, squares = total + gain, squares + gain.square()
    return torch.exp(-highest)


def _holm(p: Tensor, level: float) -> Tensor:
    """Which of S claims are rejected, bool ``[S]``, at a family-wise level."""
    order = p.argsort()
    held = p[order] * torch.arange(len(p), 0, -1) > level
    rejected = torch.zeros_like(p, dtype=torch.bool)
    rejected[order] = held.cumsum(0) == 0
    return rejected
