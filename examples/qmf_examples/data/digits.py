"""scikit-learn's handwritten digits, seen in four ways: each view has its own copy of the image to look at."""

from collections.abc import Callable

import numpy as np

from .multiview import Array, MultiView

SIDE = 8


def pixels(images: Array) -> Array:
    """The 64 grey values."""
    return images.reshape(len(images), -1)


def fourier(images: Array) -> Array:
    """Magnitudes of the 8 x 5 independent Fourier coefficients: blind to where the digit sits (cyclically)."""
    magnitudes: Array = np.abs(np.fft.rfft2(images, norm="ortho"))
    return magnitudes.reshape(len(images), -1)


def gradients(images: Array) -> Array:
    """Histograms of the gradient's direction, weighted by its size: 8 directions in each of 2 x 2 cells."""
    down, right = np.gradient(images, axis=(1, 2))
    size = np.hypot(down, right)
    # Rounded to the nearest of 8 directions, so that an upright stroke falls into the middle of a bin.
    direction = np.round(np.arctan2(down, right) / (np.pi / 4)).astype(np.int64) % 8
    votes = size[..., None] * (direction[..., None] == np.arange(8))
    half = SIDE // 2
    cells: Array = votes.reshape(len(images), 2, half, 2, half, 8).sum((2, 4))
    return cells.reshape(len(images), -1)


def projections(images: Array) -> Array:
    """Mean grey value of the 8 rows, 8 columns, 15 diagonals and 15 antidiagonals."""
    i, j = np.indices((SIDE, SIDE))
    lines = [i == n for n in range(SIDE)] + [j == n for n in range(SIDE)]
    lines += [i - j == n for n in range(1 - SIDE, SIDE)] + [i + j == n for n in range(2 * SIDE - 1)]
    masks = np.stack(lines).reshape(len(lines), -1)
    means: Array = pixels(images) @ (masks / masks.sum(1, keepdims=True)).T
    return means


VIEWS: dict[str, Callable[[Array], Array]] = {
    "pixels": pixels,
    "fourier": fourier,
    "gradients": gradients,
    "projections": projections,
}


def load_digits() -> MultiView:
    """scikit-learn's 1,797 images in [0, 1] and their four views; nothing is downloaded.

    Example:
        >>> data = load_digits()
        >>> data.images.shape, data.views["gradients"].shape
        ((1797, 8, 8), (1797, 32))
    """
    from sklearn.datasets import load_digits as load

    data = load()
    images: Array = data.images / 16.0
    views = {name: look(images) for name, look in VIEWS.items()}
    return MultiView("digits", views, data.target.astype(np.int64), images, VIEWS)
