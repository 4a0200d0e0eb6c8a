"""Published rules, an object each, that ``QualityAwareFusion`` takes by name or made with options of their own.

``QualityAwareFusion(2, combine="tmc")``, ``FusionModel(heads, "tmc", annealing_steps=1000)`` or
``QualityAwareFusion(2, combine=TMC(2, annealing_steps=1000))``: whichever, every loss, trainer and report takes it.
"""

from ..rule import Rule
from .rcml import RCML
from .tmc import TMC

__all__ = ["RCML", "RULES", "TMC"]

RULES: dict[str, type[Rule]] = {"tmc": TMC, "rcml": RCML}
"""By the name that ``combine`` takes."""
