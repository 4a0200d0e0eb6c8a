"""Splits that keep every class's share, the same for the same labels and seed."""

from collections.abc import Hashable, Sequence

import numpy as np


def stratified_split(labels: Sequence[Hashable], fractions: Sequence[float], seed: int = 0) -> list[list[int]]:
    """Positions ``0..len(labels) - 1`` dealt into parts of the given shares, class by class, each part in order.

    Of each class, part p gets the positions between the rounded running totals of ``fractions``; a class of one goes to
    the part that its rounding says, usually the largest.

    Args:
        labels: one per sample.
        fractions: positive, with the sum 1.
        seed: of the shuffling.

    Raises:
        ValueError: fractions that are not positive or do not add up to 1.

    Example:
        >>> stratified_split(["a", "a", "b", "b"], (0.5, 0.5))
        [[0, 2], [1, 3]]
    """
    if not fractions or min(fractions) <= 0 or abs(sum(fractions) - 1) > 1e-9:
        raise ValueError(f"fractions must be positive and add up to 1, got {list(fractions)}")
    rng = np.random.default_rng(seed)
    parts: list[list[int]] = [[] for _ in fractions]
    by_class: dict[Hashable, list[int]] = {}
    for position, label in enumerate(labels):
        by_class.setdefault(label, []).append(position)
    for positions in by_class.values():
        shuffled = rng.permutation(positions)
        edges = np.rint(np.cumsum(fractions) * len(positions)).astype(int)
        for part, chosen in zip(parts, np.split(shuffled, edges[:-1]), strict=True):
            part.extend(chosen.tolist())
    return [sorted(part) for part in parts]
