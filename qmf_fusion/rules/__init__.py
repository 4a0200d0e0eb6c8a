"""Published rules, an object each, that ``QualityAwareFusion`` takes by name or made with options of their own.

``QualityAwareFusion(2, combine="tmc")``, ``FusionModel(heads, "tmc", annealing_steps=1000)`` or
``QualityAwareFusion(2, combine=TMC(2, annealing_steps=1000))``: whichever, every loss, trainer and report takes it.
"""

from ..rule import Rule
from .entropy_weights import EntropyWeights
from .noisy_or import NoisyOr
from .pdf import PDF
from .product_of_experts import ProductOfExperts
from .rcml import RCML
from .tmc import TMC

__all__ = ["PDF", "RCML", "RULES", "TMC", "EntropyWeights", "NoisyOr", "ProductOfExperts"]

RULES: dict[str, type[Rule]] = {
    "tmc": TMC,
    "rcml": RCML,
    "pdf": PDF,
    "product_of_experts": ProductOfExperts,
    "noisy_or": NoisyOr,
    "entropy_weights": EntropyWeights,
}
"""By the name that ``combine`` takes."""
