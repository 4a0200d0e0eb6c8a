"""The one list of conditions that a test set can be under: a kind of damage at a level."""

from collections.abc import Sequence
from typing import NamedTuple

from .view_copies import CORRUPTIONS


class Condition(NamedTuple):
    """One kind of damage at one level.

    Example:
        >>> [Condition("noise", 5).name, Condition("blank").name, CLEAN.name]
        ['noise 5', 'blank', 'clean']
    """

    kind: str
    level: float = 0.0
    """In the kind's own unit; 0 where it has no levels."""

    @property
    def name(self) -> str:
        return f"{self.kind} {self.level:g}" if self.level else self.kind


CLEAN = Condition("clean")
CONFLICT = Condition("conflict")
"""Of feature files too, which bring all their other damages with them (``features.replace``)."""
NOISE_LEVELS = (1.0, 2.0, 5.0, 10.0)
FEATURES = (CLEAN, *(Condition("noise", level) for level in NOISE_LEVELS), Condition("blank"), CONFLICT)
"""What half of each sample's feature views suffer (``features.corrupt``); levels in standard deviations."""
UNSEEN = (
    Condition("scale", 0.1),
    Condition("scale", 5.0),
    Condition("drop", 0.8),
    Condition("impulses", 0.3),
    Condition("stuck"),
    Condition("offset", 2.0),
    Condition("sign"),
)
"""As ``FEATURES``: damages that no rule was designed on. The first's levels are factors, then shares, deviations."""
VIEW_COPIES = (CLEAN, *(Condition(kind, level) for kind, damage in CORRUPTIONS.items() for level in damage.levels))
"""What half of each image's copies suffer, of which each view looks at its own (``view_copies.corrupt``)."""

PAPER_KINDS = ("gaussian", "salt-pepper")
"""What half of the paper's images and texts suffer (``images``, ``texts``), at levels called epsilon."""
TABLES_PROTOCOL = "released-2023"
"""What made the paper's tables: the published code as it was until June 2025."""
CERTAIN_AT = {TABLES_PROTOCOL: 10.0, "released-2025": 100.0}
"""The released protocols, by their one difference: from which epsilon on salt-and-pepper is sure to take place in an
image that the coin has chosen. Gaussian noise and blanked words are the same numbers in every version of the code."""
PROTOCOLS = (*CERTAIN_AT, "clean")
HALF = 0.5
"""How likely an image or a text is damaged."""


def named_protocol(name: str) -> str:
    """One of ``PROTOCOLS``; ``"released"`` is the one that made the tables.

    Raises:
        ValueError: another name.

    Example:
        >>> named_protocol("released")
        'released-2023'
    """
    full = TABLES_PROTOCOL if name == "released" else name
    if full not in PROTOCOLS:
        raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {name!r}")
    return full


def paper_conditions(kinds: Sequence[str], levels: Sequence[float]) -> list[Condition]:
    """Each of these ``PAPER_KINDS`` at each level."""
    return [Condition(kind, level) for kind in kinds for level in levels]
