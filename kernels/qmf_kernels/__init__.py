"""Operators behind ``qmf_fusion``: fusion, ranking and the whole objective, in the namespace ``qmf``."""

from .operators import NAMESPACE, Fuse, Objective, Ranking, ops
from .ranking import FORMS, PAIRS
from .trajectory import find_range, kappa, record

__all__ = [
    "FORMS",
    "NAMESPACE",
    "PAIRS",
    "Fuse",
    "Objective",
    "Ranking",
    "find_range",
    "kappa",
    "ops",
    "record",
]
