"""Operators behind ``qmf_fusion``: fusion, ranking and the whole objective, in the namespace ``qmf``."""

from .expression import objective_expression
from .fusion import WeightRule
from .objective import LossRule
from .operators import NAMESPACE, Fuse, Objective, Ranking, ops
from .ranking import FORMS, PAIRS
from .trajectory import find_range, kappa, record

__all__ = [
    "FORMS",
    "NAMESPACE",
    "PAIRS",
    "Fuse",
    "LossRule",
    "Objective",
    "Ranking",
    "WeightRule",
    "find_range",
    "kappa",
    "objective_expression",
    "ops",
    "record",
]
