"""The text corruption of the paper's tables: in half of the texts, words become "_" with probability 0.1 * epsilon."""

import math

import numpy as np

from .conditions import HALF, named_protocol
from .released_streams import ReleasedStreams

BLANK = "_"
PER_LEVEL = 0.1


class TextCorruption:
    """Blank words of half of the texts: called with a text and its index in the data set.

    Args:
        level: epsilon, from 0 to 10.
        protocol: "clean" draws from a generator of its own for every sample; "released-2023" (also called "released")
            and "released-2025" repeat the published code, whose generator the Gaussian image noise seeds anew.
        seed: of the whole test set's damage.
        streams: the released protocol's generators, to share with ``ImageCorruption``; made from the seed where None.

    Raises:
        ValueError: a level or a protocol that is none of the above.

    Example:
        >>> blank = TextCorruption(level=10)
        >>> [blank("so good", index) for index in range(4)]
        ['_ _', '_ _', 'so good', 'so good']
    """

    def __init__(
        self, level: float, *, protocol: str = "clean", seed: int = 0, streams: ReleasedStreams | None = None
    ) -> None:
        if not (math.isfinite(level) and 0 <= level <= 10):
            raise ValueError(f"level must be from 0 to 10 (a word goes with probability 0.1 * level), got {level!r}")
        self.level, self.protocol, self.seed = float(level), named_protocol(protocol), seed
        self.streams = streams if streams is not None else ReleasedStreams(seed)

    def __call__(self, text: str, index: int) -> str:
        if self.level == 0:
            return text
        probability = PER_LEVEL * self.level
        words = text.split(" ")
        if self.protocol != "clean":
            draws = self.streams.numpy
            if not draws.choice([0, 1], p=[0.5, 0.5]):
                return text
            blank = [bool(draws.choice([0, 1], p=[1 - probability, probability])) for _ in words]
        else:
            # The same words go at every level and more at a higher one.
            rng = np.random.default_rng([self.seed, index, *b"text"])
            if rng.random() >= HALF:
                return text
            blank = (rng.random(len(words)) < probability).tolist()
        return " ".join(BLANK if gone else word for word, gone in zip(words, blank, strict=True))
