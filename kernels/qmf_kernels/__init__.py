"""Operators behind ``qmf_fusion``: fusion, ranking and the whole objective, in the namespace ``qmf``."""

from .autograd import fuse, objective, rank
from .eager.fusion import affine_weights, clamp_weights, energy
from .eager.history import find_range, kappa
from .operators import NAMESPACE, ops, takes_triton
from .rules import BACKENDS, FORMS, PAIRS, Losses, LossRule, Past, WeightRule

__all__ = [
    "BACKENDS",
    "FORMS",
    "NAMESPACE",
    "PAIRS",
    "LossRule",
    "Losses",
    "Past",
    "WeightRule",
    "affine_weights",
    "clamp_weights",
    "energy",
    "find_range",
    "fuse",
    "kappa",
    "objective",
    "ops",
    "rank",
    "record",
    "takes_triton",
]

record = ops.record.default
