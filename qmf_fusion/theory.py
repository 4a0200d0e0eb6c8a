"""Theorems 1 and 2 on data: does dynamic fusion, as it is, have the guarantee that the paper proves?

Theorem 1 bounds the generalization error of ``f = sum_m w_m f_m``, with probability ``1 - delta``, by

    ``sum_m [ E(w_m) Err(f_m) + E(w_m) Rad(f_m) + Cov(w_m, loss_m) ] + M sqrt(ln(1 / delta) / 2N)``

(Term-L, Term-C, Term-Cov and confidence). Term-L and Term-Cov are the part that data can show; the Rademacher term is
the same for both rules once their mean weights agree (Eq. 5), and a static weight has no covariance. So Theorem 2:
dynamic fusion is at least as good as static fusion, in this bound, if Eq. 5 holds and no weight correlates positively
with its modality's loss (Eq. 6). ``fusion_report`` measures both conditions, ``WeightLossCorrelation`` Eq. 6 on
streams; ``QualityAwareFusion.calibrate`` makes them hold.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from .checks import Logits
from .coefficients import Coefficient, own_coefficient
from .correlation import Correlation, WeightLossCorrelation, co_moments, pearson, spearman
from .fusion import QualityAwareFusion

__all__ = ["Correlation", "FusionReport", "ModalityReport", "WeightLossCorrelation", "fusion_report", "spearman"]

MARGIN = 0.05  # a mean weight within 5 % of its static weight is as good as equal
FEWEST = 4  # samples for a verdict, as for the test of Eq. 6 in ``calibrate``: fewer resample to themselves
VERDICTS = ("holds", "undecided", "fails")
_MOST_SHOWN = 2000


@dataclass(frozen=True)
class ModalityReport:
    """One modality's side of Theorems 1 and 2."""

    name: str
    samples: int
    """How many had this modality and a target."""
    mean_weight: float
    static_weight: float
    mean_loss: float
    """The modality's own mean cross-entropy."""
    mean_interval: tuple[float, float]
    """Bootstrap interval of the mean weight."""
    pearson: float
    """Of weight and loss; 0 where either is constant."""
    interval: tuple[float, float]
    """Bootstrap interval of ``pearson``."""
    spearman: float
    covariance: float
    """Term-Cov; divided by n, so that Term-L and Term-Cov add up to the mean of weight times loss."""
    term_l: float
    """``E(w) E(loss)``."""
    term_l_static: float
    eq5: str
    """``holds``, ``undecided`` or ``fails``."""
    eq6: str
    sentence: str


@dataclass(frozen=True)
class FusionReport:
    """What ``fusion_report`` found: a table by ``print``, ``to_dict()``, ``plot()``."""

    modalities: list[ModalityReport]
    confidence: float
    term_l: float
    term_cov: float
    bound: float
    """Term-L plus Term-Cov of the dynamic rule: the bound's part that depends on data."""
    bound_static: float
    """Term-L of the static rule, which has no Term-Cov."""
    eq5: str
    eq6: str
    verdict: str
    """The worse of the two."""
    sentence: str
    _points: list[tuple[Tensor, Tensor]] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists: fit for JSON."""
        shown = asdict(self)
        del shown["_points"]
        for row in shown["modalities"]:
            row["interval"], row["mean_interval"] = list(row["interval"]), list(row["mean_interval"])
        return shown

    def __str__(self) -> str:
        titles = "modality|n|E(w)|static|r(w, loss)|interval|Spearman|Term-L|static|Term-Cov|Eq. 5|Eq. 6"
        table = [titles.split("|")]
        for m in self.modalities:
            interval = f"[{m.interval[0]:+.3f}, {m.interval[1]:+.3f}]"
            weights = [m.name, str(m.samples), f"{m.mean_weight:.4f}", f"{m.static_weight:.4f}"]
            correlations = [f"{m.pearson:+.3f}", interval, f"{m.spearman:+.3f}"]
            terms = [f"{m.term_l:.4f}", f"{m.term_l_static:.4f}", f"{m.covariance:+.4f}"]
            table.append([*weights, *correlations, *terms, m.eq5, m.eq6])
        terms = [f"{self.term_l:.4f}", f"{self.bound_static:.4f}", f"{self.term_cov:+.4f}"]
        table.append(["total", *[""] * 6, *terms, self.eq5, self.eq6])
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
            for row in table
        ]
        lines.insert(1, "-" * len(lines[0]))
        lines.append(f"bound (Term-L + Term-Cov): dynamic {self.bound:.4f}, static {self.bound_static:.4f}")
        return "\n".join([*lines, self.sentence, *(f"- {m.sentence}" for m in self.modalities)])

    def plot(self, path: str | None = None) -> Any:
        """Weight against loss, one panel a modality, Eq. 6's verdict in its title; a matplotlib figure.

        It is saved at ``path`` too, if one is given. An ImportError says where matplotlib is not installed.
        """
        try:
            figures = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'qmf-fusion[examples]'") from error
        num = len(self.modalities)
        figure = figures.Figure(figsize=(3.2 * num, 3.2), layout="constrained")
        colours = {"holds": "tab:green", "undecided": "tab:gray", "fails": "tab:red"}
        for i, (m, (w, loss)) in enumerate(zip(self.modalities, self._points, strict=True)):
            axes = figure.add_subplot(1, num, i + 1)
            axes.scatter(loss.tolist(), w.tolist(), s=5, alpha=0.4, linewidths=0, color=colours[m.eq6])
            axes.axhline(m.static_weight, color="black", linewidth=0.8, linestyle="--")
            axes.set_title(f"{m.name}: r = {m.pearson:+.2f}, Eq. 6 {m.eq6}", fontsize=9)
            axes.set_xlabel("loss")
            axes.set_ylabel("weight (dashed: static)" if i == 0 else "")
        if path is not None:
            figure.savefig(path, dpi=80)
        return figure


@torch.no_grad()
def fusion_report(
    fusion: QualityAwareFusion,
    logits: Logits,
    target: Tensor,
    static_weights: Coefficient | None = None,
    present: Tensor | None = None,
    *,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    ignore_index: int = -100,
) -> FusionReport:
    """Whether Theorem 2's conditions hold on held-out data, and both sides of Theorem 1's bound.

    Eq. 5 holds where the interval of the mean weight lies within 5 % of the static weight (or they are equal to 1e-6),
    and fails where it excludes the static weight otherwise. Eq. 6 holds where the interval of Pearson's r lies at or
    below 0, and fails where it lies above. Fewer than 4 samples of a modality decide neither.

    Args:
        fusion: the layer, calibrated or not.
        logits: as ``fusion`` takes them.
        target: int ``[*]``.
        static_weights: positive; a number or one per modality. Default: what the layer was calibrated to; else, for
            ``robust``, its own mean weights; else the mean of all weights, the same for all modalities.
        present: as ``fusion`` takes it.
        confidence: of the intervals.
        resamples: of the bootstrap; intervals are percentiles.
        seed: of the bootstrap.
        ignore_index: a target that does not count.

    Returns:
        FusionReport. A modality that never counts has NaN numbers and undecided verdicts.

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, shape or range.

    Example:
        >>> logits = 3 * torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
        >>> report = fusion_report(QualityAwareFusion(2), logits, logits.sum(0).argmax(-1))
        >>> report.verdict, [m.eq6 for m in report.modalities]
        ('undecided', ['holds', 'undecided'])
    """
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must be between 0 and 1, got {confidence}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    data = fusion.clean_data(logits, target, present, ignore_index)
    weights = fusion.rule.fuse(data.rows, data.counted)[1]
    flat = (rearrange(x, "m ... -> m (...)") for x in (weights, data.losses, data.counted))
    pairs = [(w[c].cpu(), v[c].cpu()) for w, v, c in zip(*flat, strict=True)]
    if static_weights is not None:
        static = own_coefficient("static_weights", static_weights, fusion.num_modalities)
    elif fusion.calibration.found():
        static = fusion.calibration.static.cpu()
    else:
        static = fusion.rule.default_static(torch.stack([w.mean() for w, _ in pairs]))
    described = [
        _describe(name, w, v, s, confidence, resamples, seed)
        for name, (w, v), s in zip(fusion.names, pairs, static.tolist(), strict=True)
    ]
    heard = [m for m in described if m.samples]
    term_l, term_cov = sum(m.term_l for m in heard), sum(m.covariance for m in heard)
    bound_static = sum(m.term_l_static for m in heard)
    eq5, eq6 = _worst([m.eq5 for m in described]), _worst([m.eq6 for m in described])
    verdict = _worst([eq5, eq6])
    better = "dynamic" if term_l + term_cov <= bound_static else "static"
    sides = f"{term_l + term_cov:.3g} dynamic, {bound_static:.3g} static"
    failing = {n: [m.name for m in described if getattr(m, f"eq{n}") == "fails"] for n in (5, 6)}
    where = "; ".join(f"Eq. {n} fails for {', '.join(names)}" for n, names in failing.items() if names)
    sentence = {
        "holds": "Theorem 2 applies: dynamic fusion is at least as good as static fusion here, in the paper's bound.",
        "fails": f"Theorem 2 does not apply ({where}). The bound favours the {better} rule: {sides}.",
        "undecided": "Undecided: this data neither confirms nor refutes Theorem 2's conditions; use more of it.",
    }[verdict]
    points = [(w[:: -(-len(w) // _MOST_SHOWN) or 1], v[:: -(-len(v) // _MOST_SHOWN) or 1]) for w, v in pairs]
    bounds = (term_l, term_cov, term_l + term_cov, bound_static)
    return FusionReport(described, confidence, *bounds, eq5, eq6, verdict, sentence, points)


def _describe(
    name: str, w: Tensor, loss: Tensor, static: float, confidence: float, resamples: int, seed: int
) -> ModalityReport:
    nan = float("nan")
    if len(w) == 0:
        undecided = ("undecided", "undecided", f"{name} never counts in this data.")
        return ModalityReport(name, 0, nan, static, nan, (nan, nan), nan, (nan, nan), nan, nan, nan, nan, *undecided)
    n, found = len(w), Correlation.of(co_moments(w.double(), loss.double()))
    _, mean, mean_loss, covariance, r = (float(x) for x in found)
    mean_interval, interval = _bootstrap(w, loss, confidence, resamples, seed)
    close = abs(mean - static) <= 1e-6
    within = all(abs(x - static) <= MARGIN * abs(static) for x in mean_interval)
    apart = not mean_interval[0] <= static <= mean_interval[1]
    eq5 = "holds" if close or within else "fails" if apart else "undecided"
    eq6 = "holds" if interval[1] <= 0 else "fails" if interval[0] > 0 else "undecided"
    if n < FEWEST:
        eq5 = eq6 = "undecided"
    percent = f"{100 * confidence:g} %"
    sentence = {
        "holds": f"{name} weighs less where it is wrong, as Eq. 6 demands (r = {r:+.2f}).",
        "fails": f"{name} weighs more where it is wrong (r = {r:+.2f}): calibrate(), or use robust().",
        "undecided": f"{name}: the {percent} interval of r holds 0 ({interval[0]:+.2f} to {interval[1]:+.2f}).",
    }[eq6]
    if n < FEWEST:
        sentence = f"{name} has {n} of the {FEWEST} samples that a verdict takes."
    elif interval == (0.0, 0.0):
        sentence = f"{name}'s weight or loss is constant here: no covariance."
    if eq5 == "fails":
        side = "above" if mean > static else "below"
        sentence += f" Its mean weight {mean:.3g} is {side} its static weight {static:.3g} (Eq. 5): calibrate()."
    numbers = (n, mean, static, mean_loss, mean_interval, r, interval, spearman(w, loss), covariance)
    return ModalityReport(name, *numbers, mean * mean_loss, static * mean_loss, eq5, eq6, sentence)


def _bootstrap(
    w: Tensor, loss: Tensor, confidence: float, resamples: int, seed: int
) -> tuple[tuple[float, float], tuple[float, float]]:
    """Percentile intervals of the mean weight and of Pearson's r, from resampled pairs."""
    generator = torch.Generator().manual_seed(seed)
    n, means, rs = len(w), [], []
    constant = bool((w == w[0]).all()) or bool((loss == loss[0]).all())
    for start in range(0, resamples, chunk := max(1, 4_000_000 // n)):
        pick = torch.randint(n, (min(chunk, resamples - start), n), generator=generator)
        a, b = w[pick], loss[pick]
        means.append(a.mean(1))
        rs.append(pearson(a, b))
    ends = torch.tensor([(1 - confidence) / 2, (1 + confidence) / 2], dtype=w.dtype)
    mean_low, mean_high = torch.cat(means).quantile(ends).tolist()
    low, high = (0.0, 0.0) if constant or n < 2 else torch.cat(rs).quantile(ends).tolist()
    return (mean_low, mean_high), (low, high)


def _worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=VERDICTS.index)
