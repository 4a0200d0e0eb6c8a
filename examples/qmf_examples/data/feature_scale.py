"""How features are scaled before heads see them: by what the training part shows, feature by feature."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
FURTHEST = 50.0
"""Where scaled features are cut off, in deviations."""


def feature_scale(rows: Array) -> tuple[Array, Array]:
    """Mean and deviation of each feature of ``[N, D]``; a deviation of 1 for a feature that does not vary.

    Example:
        >>> feature_scale(np.array([[0.0, 5.0], [2.0, 5.0]]))
        (array([1., 5.]), array([1., 1.]))
    """
    deviation = rows.std(0)
    return rows.mean(0), np.where(deviation < 1e-8, 1.0, deviation)
