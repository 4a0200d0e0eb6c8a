"""How each method is drawn: the one registry, so that a method looks the same in every picture.

Without colours, no two methods have the same marker, fill and line. Kinds share a colour: grey for single modalities,
blue for averages, green for joined features, pink for evidence, orange for QMF, purple for other uncertainties; the
recommended rule is the thick one. Dotted lines are left to what is no method of ours: the oracle and published curves.
"""

import zlib
from typing import Any, NamedTuple

from ..models.methods import ABLATION, METHODS, RECOMMENDED

GREY, BLUE, SKY, GREEN, PINK = "#808080", "#0072b2", "#3aa0e0", "#009e73", "#c45f9a"
WINE, ORANGE, OCHRE, PURPLE, RED = "#7a2048", "#d55e00", "#d99000", "#7f3c8d", "#b3001b"
LONG = (0, (9, 2))
"""Dashes longer than those of ``--``."""


class Style(NamedTuple):
    """Of a method's line."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]] = "-"
    filled: bool = True
    width: float = 1.2
    size: float = 4.5

    def options(self) -> dict[str, Any]:
        """As Matplotlib's ``plot`` and ``errorbar`` take them."""
        return {
            "color": self.color,
            "marker": self.marker,
            "linestyle": self.line,
            "linewidth": self.width,
            "markersize": self.size,
            "markerfacecolor": self.color if self.filled else "white",
            "zorder": 5 if self.width > 2 else 2,
        }

    def published(self) -> dict[str, Any]:
        """Of the paper's curve of the same method: dotted, with small hollow markers."""
        return {**self.options(), "linestyle": ":", "linewidth": 1.0, "markersize": 3.5, "markerfacecolor": "white"}


def _single(marker: str, line: str = "-") -> Style:
    return Style(GREY, marker, line, filled=False, width=1.0)


STYLES = {
    RECOMMENDED: Style(RED, "*", width=2.6, size=9),
    "oracle: clean views only": Style("black", ".", ":", filled=False),
    "rgb": _single("o"),
    "depth": _single("s"),
    "bow": _single("^"),
    "image": _single("v"),
    "bert": _single("D"),
    "pixels alone": _single("o", "--"),
    "fourier alone": _single("s", "--"),
    "gradients alone": _single("^", "--"),
    "projections alone": _single("v", "--"),
    "best single view": _single("D", "--"),
    "mean of logits": Style(BLUE, "s", "--"),
    "mean of probabilities": Style(SKY, "D", "--"),
    "mean of logits + modality dropout": Style(BLUE, "P", "--"),
    "concat": Style(GREEN, "p"),
    "align": Style(GREEN, "P", filled=False),
    "mmtm": Style(GREEN, "d", filled=False),
    "concatbow": Style(GREEN, "p", "-."),
    "concatbert": Style(GREEN, "P", "-.", filled=False),
    "mmbt": Style(GREEN, "d", "-.", filled=False),
    "tmc": Style(PINK, "<"),
    "etmc": Style(PINK, "<", "-."),
    "rcml": Style(WINE, ">", LONG),
    "pdf": Style(PINK, "X", "-."),
    "product_of_experts": Style(BLUE, "h", "--"),
    "noisy_or": Style(SKY, "X", "--"),
    "entropy_weights": Style(PURPLE, "h", "-."),
    "QMF, paper": Style(ORANGE, "^"),
    "QMF, margin": Style(OCHRE, "v"),
    "QMF, released": Style(OCHRE, "^", "-."),
    "energy": Style(ORANGE, "v", "-."),
    "ranking-only": Style(ORANGE, "d", "-."),
    "energy, logits": Style(ORANGE, "d"),
    "energy + modality dropout": Style(ORANGE, "P", "-."),
    "energy of LogitNorm": Style(PURPLE, "X"),
    "msp": Style(PURPLE, "o", "-."),
    "entropy": Style(PURPLE, "D", "-."),
    "evidence": Style(PURPLE, "s", "-."),
    "MSP, probabilities": Style(PURPLE, "o", "--"),
    "entropy, probabilities": Style(PURPLE, "d", "--"),
    "evidence, probabilities": Style(PURPLE, "p", "--"),
    "robust-logits": Style(RED, "*", "--", size=6),
    "robust, no modality dropout": Style(RED, "*", "-.", size=6),
    "without the size of logits": Style(BLUE, "o"),
    "without the distance of logits": Style(GREEN, "s"),
    "without either": Style(PINK, "D"),
    "without the evidential likelihood": Style(ORANGE, "P"),
    "without distances as evidence": Style(PURPLE, "v", "--"),
    "without bounded votes": Style(OCHRE, "^", "--"),
}
SAME = {"late": "mean of logits", "qmf": "QMF, paper"}
"""What the trainers call methods that stand under another name in the tables of features."""
_NAMES = {method.label: method.name for method in (*METHODS.values(), *ABLATION.methods)}


def style_of(method: str) -> Style:
    """The style of a method, by its name or by what tables call it; of one that has none here, always the same one.

    Example:
        >>> style_of("TMC") == style_of("tmc"), style_of("late") == style_of("mean of logits")
        (True, True)
    """
    name = _NAMES.get(method, method)
    found = STYLES.get(SAME.get(name, name))
    # Of the name's bytes, for Python's own hash is another one in each process.
    return found or _single("os^vD<>phd8PX"[zlib.crc32(method.encode()) % 13], "-.")
