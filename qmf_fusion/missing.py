"""What if a modality is missing? Accuracy, log-loss and calibration by every subset, and what each modality adds."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from .checks import Logits, Present, check_confidence
from .fusion import Heads, QualityAwareFusion
from .importance import accuracy, add_up, attribute, conditional_utilisation, log_likelihood, mean_intervals, of_target
from .shown import plain, table
from .subsets import EXACT, all_subsets, check_classes, check_held_out, subset_answers

_MOST_SHOWN = 5  # modalities of which the table lists every subset


@dataclass(frozen=True)
class SubsetResult:
    """The fused answer where only these modalities are there; of none, the classes' shares."""

    modalities: tuple[str, ...]
    accuracy: float
    """0 to 1; classes that share the largest logit share the answer."""
    log_loss: float
    """Mean cross-entropy in nats."""
    ece: float
    """Expected calibration error, 0 to 1, in 15 bins of confidence."""


@dataclass(frozen=True)
class Gain:
    """What a modality adds, in accuracy (0 to 1) or nats of log-loss saved; intervals are each by itself."""

    alone: float
    """Over no modality at all."""
    last: float
    """Over all others: what is lost where it alone is missing."""
    last_interval: tuple[float, float]
    shapley: float
    """On average over all orders in which modalities come in (``qmf_fusion.importance``)."""
    shapley_interval: tuple[float, float]


@dataclass(frozen=True)
class ModalityGain:
    """What one modality adds."""

    name: str
    accuracy: Gain
    log_loss: Gain
    utilisation: float
    """Conditional utilisation rate: the share of the accuracy that goes with it."""


@dataclass(frozen=True)
class MissingReport:
    """What ``missing_report`` found: a table by ``print``, ``to_dict()``, ``plot()``."""

    samples: int
    subsets: list[SubsetResult]
    """Smaller ones first. All of them up to 12 modalities, beyond none, each alone, all but one and all."""
    modalities: list[ModalityGain]
    confidence: float

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings and lists, and None for an interval's open end: fit for JSON."""
        found: dict[str, Any] = plain(asdict(self))
        return found

    def __str__(self) -> str:
        rows = [["modalities", "accuracy in %", "log-loss", "ECE in %"]]
        for each in self._shown():
            figures = [f"{100 * each.accuracy:.1f}", f"{each.log_loss:.4f}", f"{100 * each.ece:.1f}"]
            rows.append([" + ".join(each.modalities) or "none", *figures])
        lines = [f"Measured on {self.samples} samples, each with the modalities that are named and no others"]
        lines += table(rows)
        if len(self._shown()) < len(self.subsets):
            lines.append(f"({len(self.subsets)} subsets in all; the others are in to_dict())")
        sure = f"[interval at {100 * self.confidence:g} %]"
        for title, name, unit, digits in (
            ("points of accuracy", "accuracy", 100.0, 1),
            ("nats of log-loss saved", "log_loss", 1.0, 3),
        ):
            rows = [[title, "alone", f"added to all others {sure}", f"Shapley {sure}"]]
            for modality in self.modalities:
                g: Gain = getattr(modality, name)
                pairs = ((g.last, g.last_interval), (g.shapley, g.shapley_interval))
                cells = [_with_interval(value, ends, unit, digits) for value, ends in pairs]
                rows.append([modality.name, f"{unit * g.alone:+.{digits}f}", *cells])
            if name == "accuracy":
                utilised = ["utilisation", *(f"{m.utilisation:.3f}" for m in self.modalities)]
                rows = [[*row, cell] for row, cell in zip(rows, utilised, strict=True)]
            lines += ["", *table(rows)]
        return "\n".join(lines)

    def _shown(self) -> list[SubsetResult]:
        num = len(self.modalities)
        few = (0, 1, num - 1, num)
        return [s for s in self.subsets if num <= _MOST_SHOWN or len(s.modalities) in few]

    def plot(self, path: str | None = None) -> Any:
        """Accuracy and log-loss by subset, smaller ones first; a matplotlib figure, saved at ``path`` if one is given.

        An ImportError says where matplotlib is not installed.
        """
        try:
            figures = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'qmf-fusion[examples]'") from error
        shown = self._shown()
        names = [" + ".join(each.modalities) or "none" for each in shown]
        figure = figures.Figure(figsize=(8, 1.2 + 0.3 * len(shown)), layout="constrained")
        left, right = figure.subplots(1, 2, sharey=True)
        left.barh(names, [100 * each.accuracy for each in shown], color="#0072b2")
        right.barh(names, [each.log_loss for each in shown], color="#d55e00")
        left.invert_yaxis()
        left.set_xlabel("accuracy (%)")
        right.set_xlabel("log-loss (nats)")
        for axes in (left, right):
            axes.grid(axis="x", alpha=0.3)
        if path is not None:
            figure.savefig(path, dpi=80)
        return figure


@torch.no_grad()
def missing_report(
    fusion: QualityAwareFusion,
    logits: Heads,
    target: Tensor,
    *,
    present: Present | None = None,
    features: Logits | None = None,
    prior: Tensor | None = None,
    confidence: float = 0.95,
) -> MissingReport:
    """How good the fused answer is by each subset of modalities, and what each modality adds.

    Args:
        fusion: any fusion of this package.
        logits: the heads' logits on held-out data, ``[N, K]`` each, as ``fusion`` takes them.
        target: int ``[N]``, classes 0 to K - 1.
        present: as ``fusion`` takes it; a sample takes part in a subset with what it has of it.
        features: as ``fusion`` takes them.
        prior: positive ``[K]``: the classes' shares in the training data, the answer where no modality is there. None
            for equal shares.
        confidence: of the intervals (Student's t over samples).

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, count, shape, dtype, device or range; a log-loss
            that is infinite.

    Example:
        >>> fusion = QualityAwareFusion(["left", "right"])
        >>> heads = torch.tensor([[[5.0, 0.0], [0.0, 5.0]], [[3.0, 0.0], [3.0, 0.0]]])
        >>> report = missing_report(fusion, heads, torch.tensor([0, 1]))
        >>> [(each.modalities, each.accuracy) for each in report.subsets]
        [((), 0.5), (('left',), 1.0), (('right',), 0.5), (('left', 'right'), 1.0)]
    """
    check_confidence(confidence)
    held = check_held_out(fusion, logits, present, features, prior)
    target, num = check_classes(target, held), fusion.num_modalities
    results: list[SubsetResult] = []
    kept: dict[tuple[str, ...], Tensor] = {}  # of none, each alone, all but one and all: [N, 2]

    def measure(subsets: Tensor) -> Iterator[Tensor]:
        """Of each subset what its answers are worth, ``[N, 2]``, which is noted in passing."""
        for subset, answer in zip(subsets.tolist(), subset_answers(fusion, held, subsets), strict=True):
            names = tuple(name for name, there in zip(fusion.names, subset, strict=True) if there)
            worths = _worths(answer.logits, target)
            results.append(SubsetResult(names, *_means(worths), calibration_error(answer.logits.softmax(-1), target)))
            if len(names) in (0, 1, num - 1, num):
                kept[names] = worths
            yield worths

    if num <= EXACT:
        shares, errors = add_up(measure(all_subsets(num)), num), torch.zeros(num, 2, dtype=torch.float64)
    else:
        for _ in measure(_ends(num)):
            pass
        shares, errors = attribute(fusion, held, lambda fused: _worths(fused, target))
    gains = [_gains(fusion, kept, n, shares[..., n], errors[..., n], confidence) for n in range(2)]
    full = float(kept[fusion.names][:, 0].mean())
    without = [float(kept[_others(fusion, m)][:, 0].mean()) for m in range(num)]
    rates = conditional_utilisation(full, without)
    modalities = [ModalityGain(*each) for each in zip(fusion.names, *gains, rates, strict=True)]
    results.sort(key=lambda each: len(each.modalities))  # stable: in the order of all_subsets among equals
    return MissingReport(held.num_samples, results, modalities, confidence)


def _worths(fused: Tensor, target: Tensor) -> Tensor:
    """Accuracy and log-likelihood of each sample, ``[N, 2]``."""
    return torch.stack([of_target(worth(fused), target) for worth in (accuracy, log_likelihood)], -1)


def _means(worths: Tensor) -> tuple[float, float]:
    right, likelihood = worths.mean(0).tolist()
    return right, -likelihood


def _ends(num: int) -> Tensor:
    """None, each alone, all but one, all: bool ``[2 M + 2, M]``."""
    alone, none = torch.eye(num, dtype=torch.bool), torch.zeros(1, num, dtype=torch.bool)
    return torch.cat([none, alone, ~alone, ~none])


def _others(fusion: QualityAwareFusion, m: int) -> tuple[str, ...]:
    return fusion.names[:m] + fusion.names[m + 1 :]


def _gains(
    fusion: QualityAwareFusion,
    kept: dict[tuple[str, ...], Tensor],
    measure: int,
    shares: Tensor,
    errors: Tensor,
    confidence: float,
) -> list[Gain]:
    """Each modality's, of one measure, whose Shapley values are ``[M, N]`` with errors ``[M]``."""
    none, full = kept[()][:, measure], kept[fusion.names][:, measure]
    alone = [float((kept[(name,)][:, measure] - none).mean()) for name in fusion.names]
    last = torch.stack([full - kept[_others(fusion, m)][:, measure] for m in range(fusion.num_modalities)])
    lasts = zip(*mean_intervals(last, torch.zeros(len(last), dtype=last.dtype), confidence), strict=True)
    shapleys = zip(*mean_intervals(shares, errors, confidence), strict=True)
    return [Gain(a, *b, *c) for a, b, c in zip(alone, lasts, shapleys, strict=True)]


def calibration_error(probabilities: Tensor, target: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the mean distance of confidence and accuracy over bins of confidence, 0 to 1.

    Source: Naeini, Cooper and Hauskrecht, AAAI 2015; Guo et al., ICML 2017 (15 bins of equal width).

    Args:
        probabilities: ``[N, K]``.
        target: int ``[N]``.
        bins: how many.

    Example:
        >>> calibration_error(torch.tensor([[0.75, 0.25], [0.75, 0.25]]), torch.tensor([0, 1]))
        0.25
    """
    confidence, answer = probabilities.double().max(-1)
    which = ((confidence * bins).ceil().long() - 1).clamp(0, bins - 1)
    gaps = torch.zeros(bins, dtype=torch.float64).index_add_(0, which, (answer == target).double() - confidence)
    return float(gaps.abs().sum()) / len(target)


def _with_interval(value: float, ends: tuple[float, float], unit: float, digits: int) -> str:
    low, high = (f"{unit * end:+.{digits}f}" for end in ends)
    return f"{unit * value:+.{digits}f} [{low}, {high}]"
