"""Damage to half of each sample's feature views: computed from them, or put in from copies that were damaged before."""

import zlib
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from .conditions import CLEAN, FEATURES, UNSEEN, Condition

Array = NDArray[np.float64]
Chosen = NDArray[np.bool_]
IMPULSE = 5.0
"""How far from the mean an impulse lies, above or below, in standard deviations."""


def _noise(view: Array, level: float, rng: np.random.Generator) -> Array:
    return view + level * rng.standard_normal(view.shape)


def _blank(view: Array, level: float, rng: np.random.Generator) -> Array:
    return np.zeros_like(view)


def _conflict(view: Array, level: float, rng: np.random.Generator) -> Array:
    return view[rng.permutation(len(view))]


def _scale(view: Array, level: float, rng: np.random.Generator) -> Array:
    return level * view


def _drop(view: Array, level: float, rng: np.random.Generator) -> Array:
    return np.where(rng.random(view.shape) < level, 0.0, view)


def _impulses(view: Array, level: float, rng: np.random.Generator) -> Array:
    return np.where(rng.random(view.shape) < level, rng.choice([-IMPULSE, IMPULSE], view.shape), view)


def _stuck(view: Array, level: float, rng: np.random.Generator) -> Array:
    return np.broadcast_to(view[rng.integers(len(view))], view.shape)


def _offset(view: Array, level: float, rng: np.random.Generator) -> Array:
    return view + level


def _sign(view: Array, level: float, rng: np.random.Generator) -> Array:
    return -view


DAMAGES: dict[str, Callable[[Array, float, np.random.Generator], Array]] = {
    "noise": _noise,
    "blank": _blank,
    "conflict": _conflict,
    "scale": _scale,
    "drop": _drop,
    "impulses": _impulses,
    "stuck": _stuck,
    "offset": _offset,
    "sign": _sign,
}
"""From a view ``[N, D]`` and the level to the damaged view, by kind."""


def corrupt(views: Sequence[Array], condition: Condition, seed: int) -> tuple[list[Array], Chosen]:
    """Corrupt half of each sample's views (of an odd number, the smaller half; at least one).

    Noise is Gaussian, a blank is the mean of the training data, and a conflict is another sample's view, drawn for each
    view on its own. Of the unseen damages, dropped features are at the mean of the training data, impulses lie
    ``IMPULSE`` deviations above or below it, and a stuck view is one row of the view, the same for all samples.

    Args:
        views: ``[N, D]`` each, scaled to the training data's mean 0 and deviation 1.
        condition: one of ``FEATURES`` or ``UNSEEN``.
        seed: of the damage.

    Returns:
        The views, and bool ``[V, N]``: which are corrupted.

    Raises:
        ValueError: an unknown condition.

    Example:
        >>> corrupt([np.ones((4, 2)), np.ones((4, 3))], Condition("blank"), seed=0)[1].sum(0)
        array([1, 1, 1, 1])
    """
    known = (*FEATURES, *UNSEEN)
    if condition not in known:
        raise ValueError(f"condition must be one of {[each.name for each in known]}, got {condition.name!r}")
    if condition == CLEAN:
        return list(views), np.zeros((len(views), len(views[0])), dtype=np.bool_)
    chosen, rng = choose_half(len(views), len(views[0]), condition, seed)
    damage = DAMAGES[condition.kind]
    damaged = [damage(view, condition.level, rng) for view in views]
    return [np.where(hit[:, None], d, view) for view, d, hit in zip(views, damaged, chosen, strict=True)], chosen


def replace(
    views: Sequence[Array], damaged: Sequence[Array | None], condition: Condition, seed: int
) -> tuple[list[Array], Chosen]:
    """Put in half of each sample's views, chosen as ``corrupt`` chooses, what was damaged before.

    Args:
        views: ``[N, D]`` each.
        damaged: the same, each row damaged; None for a view that does not know this damage, and stays as it is.
        condition: what the damage is called.
        seed: of the choice.

    Returns:
        As ``corrupt``.
    """
    chosen, _ = choose_half(len(views), len(views[0]), condition, seed)
    chosen &= np.array([d is not None for d in damaged])[:, None]
    pairs = zip(views, damaged, chosen, strict=True)
    return [view if d is None else np.where(hit[:, None], d, view) for view, d, hit in pairs], chosen


def choose_half(num: int, size: int, condition: Condition, seed: int) -> tuple[Chosen, np.random.Generator]:
    """Which half of ``size`` samples' ``num`` views to damage, and the generator of the condition's further draws."""
    rng = np.random.default_rng([seed, zlib.crc32(condition.name.encode())])
    return rng.random((num, size)).argsort(0) < max(num // 2, 1), rng
