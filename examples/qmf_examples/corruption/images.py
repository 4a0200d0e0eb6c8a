"""The image corruptions of the paper's Tables 1, 5 and 6, on PIL images as they come out of the resizing.

``protocol="released-2023"`` and ``"released-2025"`` repeat the published code, its faults included: see
``ReleasedStreams``, ``wrapped`` and ``RELEASED_DENSITY``. They differ in salt-and-pepper alone, and the first made the
tables: see ``CERTAIN_AT``. ``"clean"`` clips, and draws from a generator of its own for every sample and modality.
Either way an image is corrupted with probability one half, each of a pair on its own.
"""

import math

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from .conditions import CERTAIN_AT, HALF, PAPER_KINDS, named_protocol
from .released_streams import ReleasedStreams

NOISE_PER_LEVEL = {"nyud2": 1.0, "sunrgbd": 1.0, "food101": 10.0, "mvsa": 10.0}
"""Standard deviation of the Gaussian noise in pixel values (0..255) at epsilon 1.

The RGB-D script passes epsilon itself as the "variance", the text-image one ten times it, and both use that as the
standard deviation. The clean protocol keeps these strengths, so that its figures stand beside the published ones.
"""
RELEASED_DENSITY = 0.1
"""The share of pixels that the released salt-and-pepper replaces at every epsilon: there epsilon decides with which
probability a chosen image gets any, ``epsilon / CERTAIN_AT``. The clean protocol replaces epsilon percent of the pixels
of every chosen image."""

Pixels = NDArray[np.uint8]


class ImageCorruption:
    """Damage half of the images: called with a PIL image, its index in the data set and its modality's name.

    Args:
        kind: "gaussian" or "salt-pepper".
        level: epsilon, not negative; 0 leaves every image as it is.
        data_set: "nyud2", "sunrgbd", "food101" or "mvsa": whose noise strength.
        protocol: "clean", "released-2023" (also called "released") or "released-2025".
        seed: of the whole test set's damage.
        streams: the released protocol's generators, to share with ``TextCorruption``; made from the seed where None.

    Raises:
        ValueError: a name or a level that is none of the above.

    Example:
        >>> corrupt = ImageCorruption("gaussian", level=10, data_set="mvsa", seed=1)
        >>> image = Image.new("RGB", (4, 4), (128, 128, 128))
        >>> corrupt(image, 3, "image").tobytes() == corrupt(image, 3, "image").tobytes()
        True
    """

    def __init__(
        self,
        kind: str,
        level: float,
        data_set: str,
        *,
        protocol: str = "clean",
        seed: int = 0,
        streams: ReleasedStreams | None = None,
    ) -> None:
        for name, value, known in (
            ("kind", kind, PAPER_KINDS),
            ("data_set", data_set, tuple(NOISE_PER_LEVEL)),
        ):
            if value not in known:
                raise ValueError(f"{name} must be one of {list(known)}, got {value!r}")
        if not (level >= 0 and math.isfinite(level)):
            raise ValueError(f"level must be a number of at least 0, got {level!r}")
        if kind == "salt-pepper" and level > 100:
            raise ValueError(f"level must be at most 100, a percentage, for salt-pepper, got {level!r}")
        self.kind, self.level, self.protocol, self.seed = kind, float(level), named_protocol(protocol), seed
        self.sigma = NOISE_PER_LEVEL[data_set] * self.level
        self.streams = streams if streams is not None else ReleasedStreams(seed)

    def __call__(self, image: Image.Image, index: int, modality: str) -> Image.Image:
        if self.level == 0:
            return image
        pixels = np.asarray(image.convert("RGB"))
        damaged = self._clean(pixels, index, modality) if self.protocol == "clean" else self._released(pixels)
        return image if damaged is None else Image.fromarray(damaged)

    def _clean(self, pixels: Pixels, index: int, modality: str) -> Pixels | None:
        # Whether an image is damaged does not depend on the level, nor on the kind: the levels damage the same half.
        if np.random.default_rng([self.seed, index, *modality.encode()]).random() >= HALF:
            return None
        rng = np.random.default_rng([self.seed, index, *modality.encode(), 0, *self.kind.encode()])
        if self.kind == "gaussian":
            return gaussian_noise(pixels, self.sigma, rng)
        return salt_and_pepper(pixels, self.level / 100, rng)

    def _released(self, pixels: Pixels) -> Pixels | None:
        if not self.streams.coin(HALF):
            return None
        shape = (*pixels.shape[:2], 1)
        if self.kind == "gaussian":
            self.streams.numpy.seed(0)
            return wrapped(pixels + self.streams.numpy.normal(0.0, self.sigma, shape))
        if not self.streams.python.uniform(0, 1) < self.level / CERTAIN_AT[self.protocol]:
            return None
        half = RELEASED_DENSITY / 2
        mask = self.streams.numpy.choice((0, 1, 2), size=shape, p=[half, half, 1 - RELEASED_DENSITY])
        return np.where(mask == 0, 0, np.where(mask == 1, 255, pixels)).astype(np.uint8)


def gaussian_noise(pixels: Pixels, sigma: float, rng: np.random.Generator) -> Pixels:
    """Noise of deviation ``sigma``, in pixel values, the same on the three colours; clipped."""
    noise = sigma * rng.standard_normal((*pixels.shape[:2], 1))
    noisy: Pixels = np.clip(np.rint(pixels + noise), 0, 255).astype(np.uint8)
    return noisy


def salt_and_pepper(pixels: Pixels, share: float, rng: np.random.Generator) -> Pixels:
    """This share of the pixels black or white."""
    hit = rng.random((*pixels.shape[:2], 1)) < share
    colour = np.where(rng.random((*pixels.shape[:2], 1)) < 0.5, 0, 255)
    return np.where(hit, colour, pixels).astype(np.uint8)


def wrapped(values: NDArray[np.float64]) -> Pixels:
    """Bytes as the released code makes them: cut off at 255, and a negative value comes round from above.

    Said in integers, since what C makes of a negative float as a byte depends on the machine.

    Example:
        >>> wrapped(np.array([300.0, 3.7, -0.9, -1.0, -20.5])).tolist()
        [255, 3, 0, 255, 236]
    """
    return (np.trunc(np.minimum(values, 255)).astype(np.int64) % 256).astype(np.uint8)
