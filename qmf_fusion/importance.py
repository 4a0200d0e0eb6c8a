"""How much each modality brings: Shapley values over subsets of modalities, and conditional utilisation.

``v(S)`` is what the fused answer by the modalities S is worth on a sample. The Shapley value of modality m is the mean
of ``v(S with m) - v(S)`` over all orders in which modalities may come in:

    ``phi_m = sum over S without m of |S|! (M - |S| - 1)! / M! * (v(S with m) - v(S))``

It is the only share of ``v(all) - v(none)`` that adds up to it (efficiency), treats modalities alike that bring the
same (symmetry), gives nothing to one that brings nothing (null player) and is linear in v. The heads and the fusion
stay as they are; nothing is trained again on a subset, so that it says what *this* system uses.

Sources: Shapley, *A Value for n-Person Games*, 1953; Castro, Gomez and Tejada, *Polynomial Calculation of the Shapley
Value Based on Sampling*, 2009 (sampled orders); Wu, Jastrzebski, Cho and Geras, *Characterizing and Overcoming the
Greedy Nature of Learning in Multi-modal Deep Neural Networks*, ICML 2022 (conditional utilisation rate).
"""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import Logits, Present, check_confidence, check_count
from .correlation_test import student_quantile
from .fusion import Heads, QualityAwareFusion
from .shown import plain
from .subsets import EXACT, HeldOut, all_subsets, check_classes, check_held_out, subset_answers

PERMUTATIONS = 200
"""How many orders of modalities are drawn where not all subsets are gone through."""

Worth = Callable[[Tensor], Tensor]
"""From fused logits ``[N, K]`` to ``[N, K]``: what the answer is worth if class k is the true one; more is better."""


def accuracy(fused: Tensor) -> Tensor:
    """1 for the class with the largest logit, else 0; classes that share the largest share the 1: ``[N, K]``."""
    top = (fused == fused.amax(-1, keepdim=True)).to(fused)
    return top / top.sum(-1, keepdim=True)


def log_likelihood(fused: Tensor) -> Tensor:
    """``log softmax``, the log-loss less its sign, in nats: ``[N, K]``."""
    return torch.log_softmax(fused, -1)


WORTHS: dict[str, Worth] = {"accuracy": accuracy, "log_loss": log_likelihood}


@dataclass(frozen=True)
class Importance:
    """What each modality brings, in the unit of the value: shares of right answers, or nats of log-loss saved."""

    names: tuple[str, ...]
    value: str
    samples: Tensor
    """Each sample's Shapley values ``[M, N]``, float64."""
    mean: list[float]
    """Of the data set: the mean over samples, which add up to ``mean v(all) - mean v(none)``."""
    interval: list[tuple[float, float]]
    """Of each mean by itself (Student's t over samples, the error of sampled orders included)."""
    sampling_error: list[float]
    """Standard error of each mean from drawing orders of modalities; 0 where all subsets were gone through."""
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Without the samples, and None for an interval's open end: fit for JSON."""
        keys = ("name", "mean", "interval", "sampling_error")
        every = zip(self.names, self.mean, self.interval, self.sampling_error, strict=True)
        modalities = [dict(zip(keys, found, strict=True)) for found in every]
        found: dict[str, Any] = plain({"value": self.value, "confidence": self.confidence, "modalities": modalities})
        return found

    def __str__(self) -> str:
        unit, digits = (100.0, 1) if self.value == "accuracy" else (1.0, 4)
        title = {"accuracy": "points of accuracy", "log_loss": "nats of log-loss saved"}.get(self.value, self.value)
        lines = [f"Shapley values, {title}, intervals at {100 * self.confidence:g} %"]
        width = max(map(len, self.names))
        for name, mean, (low, high) in zip(self.names, self.mean, self.interval, strict=True):
            shown = f"{unit * mean:+.{digits}f} [{unit * low:+.{digits}f}, {unit * high:+.{digits}f}]"
            lines.append(f"{name.ljust(width)}  {shown}")
        return "\n".join(lines)


def shapley(values: Tensor) -> Tensor:
    """Exact Shapley values ``[M, *]`` of ``v`` on every subset, ``[2^M, *]``, ordered as in ``all_subsets``.

    Raises:
        ValueError: the first dimension is no power of two, from 2 to 4096.

    Example:
        >>> shapley(torch.tensor([0.0, 1.0, 2.0, 4.0]))  # none, the first, the second, both
        tensor([1.5000, 2.5000])
    """
    num = len(values).bit_length() - 1 if values.dim() else 0
    if not 1 <= num <= EXACT or len(values) != 2**num:
        raise ValueError(f"values must be [2^M, *] with M from 1 to {EXACT}, got {tuple(values.shape)}")
    return torch.tensordot(shapley_coefficients(num).to(values), values, ([0], [0]))


def shapley_coefficients(num_modalities: int) -> Tensor:
    """What ``v(S)`` counts in the Shapley value of each modality, float64 ``[2^M, M]``."""
    subsets, num = all_subsets(num_modalities), num_modalities
    sizes = subsets.sum(1, keepdim=True)
    orders = torch.tensor([1 / (num * math.comb(num - 1, size)) for size in range(num)], dtype=torch.float64)
    joined, left = orders[(sizes - 1).clamp(min=0)], orders[sizes.clamp(max=num - 1)]
    return torch.where(subsets, joined, -left)


@torch.no_grad()
def shapley_importance(
    fusion: QualityAwareFusion,
    logits: Heads,
    target: Tensor,
    value: str | Worth = "log_loss",
    *,
    present: Present | None = None,
    features: Logits | None = None,
    prior: Tensor | None = None,
    permutations: int | None = None,
    seed: int = 0,
    confidence: float = 0.95,
) -> Importance:
    """Each modality's Shapley value, of every sample and of the data set.

    Args:
        fusion: any fusion of this package.
        logits: the heads' logits on held-out data, ``[N, K]`` each, as ``fusion`` takes them.
        target: int ``[N]``, classes 0 to K - 1.
        value: ``"log_loss"`` (by how much it is lowered, in nats), ``"accuracy"`` (0 to 1), or a callable from fused
            logits ``[N, K]`` to what they are worth for each true class, ``[N, K]``, such as
            ``lambda fused: -costs[fused.argmax(-1)]``.
        present: as ``fusion`` takes it; a modality that a sample lacks brings nothing there.
        features: as ``fusion`` takes them.
        prior: positive ``[K]``: the classes' shares in the training data, which are known without any modality. None
            for equal shares; then a modality also gets credit for what they would have told.
        permutations: how many orders to draw; None for all subsets up to 12 modalities, beyond for 200 orders.
        seed: of that draw.
        confidence: of the intervals of the means.

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, count, shape, dtype, device or range; values
            that are not finite, as the log-loss is where -inf rules the target out.

    Example:
        >>> fusion = QualityAwareFusion(["sound", "silence"])
        >>> heads = torch.tensor([[[5.0, 0.0], [0.0, 5.0]], [[0.0, 0.0], [0.0, 0.0]]])
        >>> shapley_importance(fusion, heads, torch.tensor([0, 1]), "accuracy").mean
        [0.5, 0.0]
    """
    check_confidence(confidence)
    held = check_held_out(fusion, logits, present, features, prior)
    target, worth = check_classes(target, held), check_worth(value)

    def own(fused: Tensor) -> Tensor:
        return of_target(worth_of(worth, fused), target)

    samples, errors = attribute(fusion, held, own, permutations, seed)
    means, intervals = mean_intervals(samples, errors, confidence)
    name = value if isinstance(value, str) else getattr(value, "__name__", "value")
    return Importance(fusion.names, name, samples, means, intervals, errors.tolist(), confidence)


def attribute(
    fusion: QualityAwareFusion,
    held: HeldOut,
    worth: Callable[[Tensor], Tensor],
    permutations: int | None = None,
    seed: int = 0,
) -> tuple[Tensor, Tensor]:
    """Shapley values ``[M, N, *]`` of ``worth``, from fused logits ``[N, K]`` to ``[N, *]``, and their means' errors.

    The errors ``[M, *]`` are standard errors from the draw of orders, of means over the N samples.
    """
    num = fusion.num_modalities
    if permutations is None and num <= EXACT:
        answers = subset_answers(fusion, held, all_subsets(num))
        values = add_up((worth(answer.logits) for answer in answers), num)
        return values, torch.zeros_like(values[:, 0])
    orders = draw_orders(num, PERMUTATIONS if permutations is None else check_count("permutations", permutations), seed)
    # Of each order the growing subsets, from none to all: [P * (M + 1), M].
    place = orders.argsort(1)
    subsets = (place.unsqueeze(1) < torch.arange(num + 1).unsqueeze(-1)).flatten(0, 1)
    values = torch.empty(0)
    means = []
    answers = subset_answers(fusion, held, subsets)
    for number, order in enumerate(orders):
        worths = [worth(next(answers).logits) for _ in range(num + 1)]
        added = torch.empty(num, *worths[0].shape, dtype=worths[0].dtype)
        for n, m in enumerate(order.tolist()):
            added[m] = worths[n + 1] - worths[n]
        values = added if number == 0 else values.add_(added)
        means.append(added.mean(1))
    spread = torch.stack(means)
    errors = spread.std(0) / math.sqrt(len(spread)) if len(spread) > 1 else torch.full_like(spread[0], math.nan)
    return values / len(orders), errors


def add_up(worths: Iterable[Tensor], num_modalities: int) -> Tensor:
    """``shapley`` of ``v(S)`` ``[N, *]`` that come one by one in the order of ``all_subsets``: ``[M, N, *]``."""
    total = torch.empty(0)
    for number, (share, value) in enumerate(zip(shapley_coefficients(num_modalities), worths, strict=True)):
        part = torch.tensordot(share.to(value).unsqueeze(1), value.unsqueeze(0), 1)
        total = part if number == 0 else total.add_(part)
    return total


def draw_orders(num_modalities: int, permutations: int, seed: int) -> Tensor:
    """Orders of the modalities, each as probable as any other: int64 ``[P, M]``."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(permutations, num_modalities, generator=generator, dtype=torch.float64).argsort(1)


def mean_intervals(samples: Tensor, errors: Tensor, confidence: float) -> tuple[list[float], list[tuple[float, float]]]:
    """Means of ``[M, N]`` and their Student's t intervals, to whose variance squared ``errors`` ``[M]`` are added."""
    means, count = samples.mean(1), samples.shape[1]
    if count < 2:
        return means.tolist(), [(-math.inf, math.inf)] * len(means)
    deviations = (samples.var(1) / count + errors.square()).sqrt()
    half = student_quantile((1 + confidence) / 2, count - 1) * deviations
    return means.tolist(), list(zip((means - half).tolist(), (means + half).tolist(), strict=True))


def conditional_utilisation(accuracy_of_all: float, accuracy_without: Iterable[float]) -> list[float]:
    """Conditional utilisation rate of each modality: what share of the accuracy goes when it alone is taken away.

    ``u(m | the others) = (A(all) - A(all but m)) / A(all)`` (Wu et al., ICML 2022, there for two modalities of one
    network). 0 where nothing is right with all of them.

    Example:
        >>> [round(u, 2) for u in conditional_utilisation(0.8, [0.6, 0.8])]
        [0.25, 0.0]
    """
    return [(accuracy_of_all - each) / accuracy_of_all if accuracy_of_all else 0.0 for each in accuracy_without]


def check_worth(value: str | Worth) -> Worth:
    if isinstance(value, str):
        if value not in WORTHS:
            raise ValueError(f"value must be one of {list(WORTHS)} or a callable, got {value!r}")
        return WORTHS[value]
    if not callable(value):
        raise TypeError(f"value must be one of {list(WORTHS)} or a callable, got {value!r}")
    return value


def worth_of(worth: Worth, fused: Tensor) -> Tensor:
    """``worth`` of fused logits ``[N, K]``, float64 ``[N, K]``, checked."""
    found = worth(fused)
    if not isinstance(found, Tensor) or found.shape != fused.shape:
        got = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
        raise ValueError(f"value must return {tuple(fused.shape)} for fused logits of that shape, got {got}")
    return found.double()


def of_target(worths: Tensor, target: Tensor) -> Tensor:
    """Those of the true classes, ``[N]``, of ``[N, K]``; a ValueError where one is not finite."""
    own = worths.gather(-1, target.unsqueeze(-1)).squeeze(-1)
    if not bool(torch.isfinite(own).all()):
        raise ValueError(
            f"value must be finite, got {own[~torch.isfinite(own)][0].item()}: the log-loss is infinite where -inf "
            "rules the target's class out"
        )
    return own
