"""Damage to feature views: noise, a blank, or another sample's features, in half of each sample's views."""

import zlib
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from .conditions import CLEAN, FEATURES, Condition

Array = NDArray[np.float64]


def corrupt(views: Sequence[Array], condition: Condition, seed: int) -> tuple[list[Array], NDArray[np.bool_]]:
    """Corrupt half of each sample's views (of an odd number, the smaller half; at least one).

    Noise is Gaussian, a blank is the mean of the training data, and a conflict is another sample's view, drawn for each
    view on its own.

    Args:
        views: ``[N, D]`` each, scaled to the training data's mean 0 and deviation 1.
        condition: one of ``FEATURES``.
        seed: of the damage.

    Returns:
        The views, and bool ``[V, N]``: which are corrupted.

    Raises:
        ValueError: an unknown condition.

    Example:
        >>> corrupt([np.ones((4, 2)), np.ones((4, 3))], Condition("blank"), seed=0)[1].sum(0)
        array([1, 1, 1, 1])
    """
    if condition not in FEATURES:
        raise ValueError(f"condition must be one of {[each.name for each in FEATURES]}, got {condition.name!r}")
    num, size = len(views), len(views[0])
    if condition == CLEAN:
        return list(views), np.zeros((num, size), dtype=np.bool_)
    rng = np.random.default_rng([seed, zlib.crc32(condition.name.encode())])
    chosen = rng.random((num, size)).argsort(0) < max(num // 2, 1)
    out = []
    for view, hit in zip(views, chosen, strict=True):
        if condition.kind == "blank":
            damaged = np.zeros_like(view)
        elif condition.kind == "conflict":
            damaged = view[rng.permutation(size)]
        else:
            damaged = view + condition.level * rng.standard_normal(view.shape)
        out.append(np.where(hit[:, None], damaged, view))
    return out, chosen
