"""Damage to images: seeded per sample, clipped to [0, 1], and done to half of the views.

The released code uses a variance as a standard deviation, lets negative values wrap round in uint8 and reseeds NumPy
at every call. Here the same (seed, kind, sample) gives the same damage wherever the sample stands in a batch, and
stronger levels are the same damage made stronger.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


class Corruption(NamedTuple):
    """One kind of damage: ``apply(copies [V, H, W], level, rng)`` to the V views' copies of one image."""

    apply: Callable[[Array, float, np.random.Generator], Array]
    levels: tuple[float, ...]
    unit: str


def gaussian(copies: Array, level: float, rng: np.random.Generator) -> Array:
    """Add noise of standard deviation ``level`` (grey values lie in [0, 1]) and clip."""
    return np.clip(copies + level * rng.standard_normal(copies.shape), 0.0, 1.0)


def salt_and_pepper(copies: Array, level: float, rng: np.random.Generator) -> Array:
    """Turn each pixel white or black, as likely as not, with probability ``level``."""
    hit = rng.random(copies.shape) < level
    return np.where(hit, rng.integers(0, 2, copies.shape), copies)


def occlusion(copies: Array, level: float, rng: np.random.Generator) -> Array:
    """Cover a square of ``level`` pixels' side with mid-grey, at a place of its own in each copy."""
    side = min(round(level), *copies.shape[1:])
    out = copies.copy()
    for copy, place in zip(out, rng.random((len(copies), 2)), strict=True):
        # floor(u * places), so that a larger square has the same u and lies about where the smaller did.
        top, left = (math.floor(u * (n - side + 1)) for u, n in zip(place, copy.shape, strict=True))
        copy[top : top + side, left : left + side] = 0.5
    return out


CORRUPTIONS: dict[str, Corruption] = {
    "gaussian": Corruption(gaussian, (0.2, 0.4, 0.8), "standard deviation (grey values in [0, 1])"),
    "salt-and-pepper": Corruption(salt_and_pepper, (0.1, 0.25, 0.5), "share of pixels"),
    "occlusion": Corruption(occlusion, (2.0, 4.0, 6.0), "side of the square in pixels (of 8)"),
}

_CHOICE = "choice of views"  # the stream that picks the views is none of the damage's


def _generators(stream: str, ids: NDArray[np.int64], seed: int) -> Iterator[np.random.Generator]:
    words = list(stream.encode())
    for sample in ids.tolist():
        yield np.random.default_rng([seed, sample, *words])


def choose_views(num_views: int, ids: NDArray[np.int64], seed: int) -> NDArray[np.bool_]:
    """Which half of each sample's views to damage, bool ``[V, B]``; of an odd number, the smaller half.

    Example:
        >>> choose_views(4, np.arange(3), seed=0).sum(0)
        array([2, 2, 2])
    """
    chosen = np.zeros((num_views, len(ids)), dtype=np.bool_)
    for b, rng in enumerate(_generators(_CHOICE, ids, seed)):
        chosen[rng.permutation(num_views)[: num_views // 2], b] = True
    return chosen


def corrupt(
    images: Array, ids: NDArray[np.int64], chosen: NDArray[np.bool_], kind: str, level: float, seed: int
) -> Array:
    """Each view's own copy of each image, damaged where chosen.

    Args:
        images: ``[B, H, W]`` in [0, 1].
        ids: ``[B]``, the images' numbers in the data set, which seed their damage.
        chosen: bool ``[V, B]``.
        kind: a name in ``CORRUPTIONS``.
        level: its strength, in the corruption's unit, not negative.
        seed: of the whole test set's damage.

    Returns:
        ``[V, B, H, W]`` in [0, 1].

    Raises:
        ValueError: an unknown kind, or a negative level.
    """
    if kind not in CORRUPTIONS:
        raise ValueError(f"kind must be one of {list(CORRUPTIONS)}, got {kind!r}")
    if not level >= 0:
        raise ValueError(f"level must be at least 0, got {level}")
    copies = np.repeat(images[None], len(chosen), 0)
    damaged = np.empty_like(copies)
    for b, rng in enumerate(_generators(kind, ids, seed)):
        damaged[:, b] = CORRUPTIONS[kind].apply(copies[:, b], level, rng)
    return np.where(chosen[..., None, None], damaged, copies)
