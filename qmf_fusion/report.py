"""What ``fusion_report`` found, to be printed, plotted and written down."""

from __future__ import annotations

import importlib
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .measured import CleanReliability, Difference, Measured
from .shown import plain as _plain
from .shown import table as _table
from .theorem_1 import Bound

NOT_COMPUTED = (
    "Term-L and Term-Cov are of the data given: with what is missing they limit the fused loss on that data. Not "
    "computed: the Rademacher complexities (Term-C) and the confidence term M sqrt(ln(1 / delta) / 2N), by which the "
    "paper goes from losses on training data, its Term-L, to those on new data."
)


@dataclass(frozen=True)
class ModalityReport:
    """One modality's side of Theorems 1 and 2; NaN where it never counts.

    Weights are those that the theorem is about: as they are, or their shares where only these act.
    """

    name: str
    samples: int
    """How many had this modality and a target."""
    mean_weight: float
    static_weight: float
    """Mean weight in the static rule."""
    mean_interval: tuple[float, float]
    """Bootstrap interval of ``mean_weight - static_weight``, over samples."""
    mean_loss: float
    """The modality's own mean cross-entropy."""
    pearson: float
    """Of weight and loss; 0 where either is constant. Where the static shares vary, as modalities are absent, of what
    the weight has over the static one."""
    interval: tuple[float, float]
    """Of ``pearson``, on its own (``qmf_fusion.correlation_test``)."""
    spearman: float
    uncertainty_pearson: float
    """Of the uncertainty u and the loss."""
    term_l: float
    """``E(w) E(loss)``, the modality's part of the bound."""
    term_cov: float
    """``Cov(w, loss)``, the other part; the two add up to the mean of weight times loss."""
    term_l_static: float
    eq5: str
    """The mean weight is the static one: ``holds``, ``undecided`` or ``fails``; ``none`` where no theorem applies."""
    eq6: str
    """Weight and loss do not correlate positively: the same; tested over all modalities together."""
    assumption1: str
    """Uncertainty and loss do not correlate negatively: the same."""
    clean: CleanReliability | None
    """Of a rule whose weights are P(clean)."""
    sentence: str


@dataclass(frozen=True)
class FusionReport:
    """What ``fusion_report`` found: a table by ``print``, ``to_dict()``, ``plot()``."""

    measured: Measured
    """Dynamic against static rule on the data given."""
    recommended: str
    """``dynamic``, ``static``, ``either`` or ``depends``: from what is measured alone."""
    judged_by: str
    """What else is known of a rule of this kind, and from where."""
    modalities: list[ModalityReport]
    confidence: float
    scale: float
    """What all weights are divided by in the bound, so that no sample's sum exceeds 1; 1 where none does."""
    negative: float
    """The share of rows with a negative weight, of which Theorem 1 does not hold."""
    bound: Bound | None
    """Of the dynamic rule; None where Theorem 1 does not hold or does not apply."""
    bound_static: Bound | None
    eq5: str
    eq6: str
    assumption1: str
    verdict: str
    """Of Theorem 2's premise and conditions: ``holds``, ``undecided``, ``fails``; ``none`` where it does not apply."""
    sentence: str
    """What is measured, then what the theorem says of it."""
    _points: list[tuple[Tensor, Tensor]] = field(repr=False, default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers, strings, lists, and None for what is not known: fit for JSON."""
        shown = asdict(self)
        del shown["_points"]
        plain: dict[str, Any] = _plain(shown)
        return plain

    def __str__(self) -> str:
        shown, sure = self.measured, f"intervals at {100 * self.confidence:g} % for both"
        lines = [
            f"Measured on the {shown.samples} samples given{_rows(shown)}, {sure}",
            *_table([["", "dynamic", "static", "difference"], *(_difference(*each) for each in _measures(shown))]),
            self.sentence,
            "",
            f"Judged by {self.judged_by}.",
        ]
        return "\n".join([*lines, *self._correlations(), *(f"- {m.sentence}" for m in self.modalities), *self._terms()])

    def _correlations(self) -> list[str]:
        titles = "modality|n|E(w)|static E(w)|r(w, loss)|interval|Eq. 6|Spearman|r(u, loss)|Assumption 1"
        table = [titles.split("|")]
        for m in self.modalities:
            weights = [m.name, str(m.samples), f"{m.mean_weight:.4f}", f"{m.static_weight:.4f}"]
            correlations = [f"{m.pearson:+.3f}", _interval(m.interval), m.eq6, f"{m.spearman:+.3f}"]
            table.append([*weights, *correlations, f"{m.uncertainty_pearson:+.3f}", m.assumption1])
        return _table(table)

    def _terms(self) -> list[str]:
        if self.bound is None or self.bound_static is None:
            return []
        titles = "bound|Term-L, dynamic|static|Term-Cov|Eq. 5"
        table = [titles.split("|")]
        for m in self.modalities:
            terms = [f"{m.term_l:.4f}", f"{m.term_l_static:.4f}", _signed(m.term_cov)]
            table.append([m.name, *terms, m.eq5])
        lines = _table(table)
        if self.scale > 1:
            lines.append(f"Here all weights are divided by {self.scale:.4g}, the largest sum of a sample's weights.")
        for name, bound in (("dynamic", self.bound), ("static", self.bound_static)):
            parts = f"Term-L {bound.term_l:.4f}, Term-Cov {_signed(bound.term_cov)}, missing {bound.missing:.4f}"
            lines.append(f"{name}: {bound.total:.4f} ({parts}), a limit of the loss {bound.loss:.4f}")
        return [*lines, NOT_COMPUTED]

    def plot(self, path: str | None = None, title: str | None = None) -> Any:
        """Weight against loss, one panel a modality, Eq. 6's verdict in its title; a matplotlib figure.

        As wide as a page, with ``title`` over the panels: say there which data, damaged how, these are. It is saved at
        ``path`` too, if one is given. An ImportError says where matplotlib is not installed.
        """
        try:
            figures = importlib.import_module("matplotlib.figure")
        except ImportError as error:
            raise ImportError("plot() needs matplotlib: pip install 'qmf-fusion[examples]'") from error
        num = len(self.modalities)
        columns = min(num, 2 if num == 4 else 3)
        rows = -(-num // columns)
        figure = figures.Figure(figsize=(7.2, 0.3 + 2.6 * rows), layout="constrained")
        colours = {"holds": "#0072b2", "undecided": "#5c5c5c", "fails": "#b3001b"}
        for i, (m, (w, loss)) in enumerate(zip(self.modalities, self._points, strict=True)):
            axes = figure.add_subplot(rows, columns, i + 1)
            axes.scatter(loss.tolist(), w.tolist(), s=5, alpha=0.4, linewidths=0, color=colours[m.eq6])
            axes.axhline(m.static_weight, color="black", linewidth=0.8, linestyle="--")
            axes.set_title(f"{m.name}: r = {m.pearson:+.2f}\nEq. 6 {m.eq6}", fontsize=9)
            axes.set_xlabel("loss", fontsize=9)
            axes.set_ylabel("weight (dashed: static)" if i % columns == 0 else "", fontsize=9)
            axes.tick_params(labelsize=8)
            low, high = axes.get_ylim()
            missing = 1e-3 * max(abs(low), abs(high)) - (high - low)
            if missing > 0:  # weights that hardly vary would have ticks that differ in the seventh digit
                axes.set_ylim(low - missing / 2, high + missing / 2)
            # Written out: an offset of an axis is printed over its title.
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:.6g}")
        if title is not None:
            figure.suptitle(title, fontsize=11)
        if path is not None:
            figure.savefig(path, dpi=120)
        return figure


def _rows(measured: Measured) -> str:
    return "" if measured.rows == measured.samples else f" ({measured.rows} rows)"


def _measures(measured: Measured) -> list[tuple[str, Difference, float, int]]:
    return [("fused loss", measured.loss, 1, 4), ("accuracy in %", measured.accuracy, 100, 1)]


def _difference(name: str, d: Difference, unit: float, digits: int) -> list[str]:
    plain = [f"{unit * x:.{digits}f}" for x in (d.dynamic, d.static)]
    ends = (unit * d.interval[0], unit * d.interval[1])
    return [name, *plain, f"{unit * d.difference:+.{digits}f} {_interval(ends, digits)}"]


def _signed(value: float) -> str:
    return f"{round(value, 4) + 0.0:+.4f}"  # no minus before a rounded 0


def _interval(ends: tuple[float, float], digits: int = 3) -> str:
    return f"[{ends[0]:+.{digits}f}, {ends[1]:+.{digits}f}]"
