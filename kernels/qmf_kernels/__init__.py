"""Operators behind ``qmf_fusion``: fusion, ranking and the whole objective, in the namespace ``qmf``."""

from .autograd import Fuse, Objective, Ranking
from .fusion import WeightRule
from .objective import LossRule
from .ranking import FORMS, PAIRS
from .registry import BACKENDS, NAMESPACE, ops, takes_triton
from .trajectory import Past, find_range, kappa, record

__all__ = [
    "BACKENDS",
    "FORMS",
    "NAMESPACE",
    "PAIRS",
    "Fuse",
    "LossRule",
    "Objective",
    "Past",
    "Ranking",
    "WeightRule",
    "find_range",
    "kappa",
    "ops",
    "record",
    "takes_triton",
]
