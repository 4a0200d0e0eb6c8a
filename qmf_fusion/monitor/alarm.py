"""What an alarm says."""

import math
from dataclasses import asdict, dataclass
from typing import Any

SHIFT, REPETITION, ABSENCE = TESTS = ("shift", "repetition", "absence")

_WORDS = {
    SHIFT: "its rows are not like those of the reference",
    REPETITION: "it gives the same row again and again",
    ABSENCE: "it is absent or not finite more often than in the reference",
}


@dataclass(frozen=True)
class Alarm:
    """One modality fails one test; a sentence by ``print``. Told again, it is equal to itself."""

    modality: str
    test: str
    """``"shift"``, ``"repetition"`` or ``"absence"``."""
    since: int
    """The row, counted from 1, from which on the evidence speaks most of a change: an estimate."""
    raised: int
    """The row that made it sure."""
    log_e: float
    """Natural logarithm of the e-value then, which itself may be too large to write down."""
    alpha: float
    """The chance that all modalities and tests together ever raise an alarm where nothing is wrong."""

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings."""
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"{self.modality}: {_WORDS[self.test]}, since about row {self.since:,} ({self.test}, raised at row "
            f"{self.raised:,}, e-value 10^{self.log_e / math.log(10):.1f}, false alarms at most {100 * self.alpha:g} %)"
        )
