"""scikit-learn's handwritten digits, seen in four ways: each view has its own copy of the image to look at."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
SIDE = 8
NUM_CLASSES = 10


class Split(NamedTuple):
    """Images ``[B, 8, 8]`` in [0, 1], labels ``[B]`` and the images' numbers in the data set ``[B]``."""

    images: Array
    labels: NDArray[np.int64]
    ids: NDArray[np.int64]


def load_split(seed: int, test_share: float = 0.4) -> tuple[Split, Split]:
    """The 1,797 images, split at random into train and test with the classes' shares kept; nothing is downloaded.

    There is no validation set, since nothing is selected: a fixed number of epochs, and no choice among methods.

    Example:
        >>> train, test = load_split(seed=0)
        >>> train.images.shape, test.images.shape
        ((1078, 8, 8), (719, 8, 8))
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    data = load_digits()
    labels = data.target.astype(np.int64)
    parts = train_test_split(np.arange(len(labels)), test_size=test_share, stratify=labels, random_state=seed)
    train, test = (Split(data.images[ids] / 16.0, labels[ids], ids.astype(np.int64)) for ids in parts)
    return train, test


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


class Scaler(NamedTuple):
    """Centres each feature and divides a view by one number, so that a pixel that is always black stays harmless."""

    mean: Array
    scale: float

    @classmethod
    def fit(cls, features: Array) -> "Scaler":
        return cls(features.mean(0), float(features.std(0).mean()))

    def __call__(self, features: Array) -> NDArray[np.float32]:
        return ((features - self.mean) / self.scale).astype(np.float32)
