"""Damage to every image and every text of a split, for features of which a test then takes as many as it wants."""

import random
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageFilter

from .conditions import PROTOCOLS, Condition
from .images import ImageCorruption, gaussian_noise, salt_and_pepper
from .released_streams import ReleasedStreams
from .texts import BLANK, TextCorruption

EVERY = "every-row"
"""The protocol of this file's own damages: all rows, each with a generator of its own."""
IMAGE_KINDS = {"gaussian": (None, 255.0), "salt-pepper": (None, 100.0), "blur": (6.0, 1000.0), "black": (0.0, 0.0)}
TEXT_KINDS = {"words": (None, 1.0), "letters": (None, 1.0), "shuffle": (0.0, 0.0), "blank": (0.0, 0.0)}
"""By kind, the level where none is given (None where one must be), and the largest one (0 where there are none).

Of ``gaussian`` the noise's deviation in pixel values, of ``salt-pepper`` the percentage of pixels, of ``blur`` the
Gaussian's radius in pixels, of ``words`` and ``letters`` the share that is blanked, or replaced by other letters.
"""


@dataclass(frozen=True)
class Damage:
    """What a split's images and texts undergo.

    Args:
        conditions: of ``IMAGE_KINDS`` and ``TEXT_KINDS``, one of each at most; or one of the paper's kinds, whose level
            is that of images and texts alike.
        protocol: ``EVERY``, or one of ``PROTOCOLS``, which damage half of the images and half of the texts.
        seed: of the damage.

    Example:
        >>> Damage((Condition("gaussian", 30.0), Condition("words", 0.5))).name
        'gaussian30+words0.5'
    """

    conditions: tuple[Condition, ...]
    protocol: str = EVERY
    seed: int = 0

    def __post_init__(self) -> None:
        if self.protocol not in (EVERY, *PROTOCOLS):
            raise ValueError(f"protocol must be one of {', '.join((EVERY, *PROTOCOLS))}, got {self.protocol!r}")
        known = IMAGE_KINDS | TEXT_KINDS
        strangers = [each.kind for each in self.conditions if each.kind not in known]
        sides = [each.kind in IMAGE_KINDS for each in self.conditions]
        if not self.conditions or strangers or sides.count(True) > 1 or sides.count(False) > 1:
            raise ValueError(
                f"a damage must be one of images ({', '.join(IMAGE_KINDS)}), one of texts ({', '.join(TEXT_KINDS)}) or "
                f"one of each, got {'+'.join(each.kind for each in self.conditions) or 'none'}"
            )

    @property
    def name(self) -> str:
        """As in a feature file, where a default level is not said."""
        shown = (
            each.kind if each.level in (0, (IMAGE_KINDS | TEXT_KINDS)[each.kind][0]) else f"{each.kind}{each.level:g}"
            for each in self.conditions
        )
        return "+".join(shown)

    @property
    def in_order(self) -> bool:
        """Whether random numbers go on from sample to sample, so that all must be read, in order."""
        return self.protocol not in (EVERY, "clean")

    def corruptions(self, data_set: str, paired: bool) -> tuple[Any, Any]:
        """What is called with ``(image, index, modality)`` and with ``(text, index)``; None where nothing is damaged.

        Raises:
            ValueError: a level that a protocol's corruption does not have.
        """
        if self.protocol != EVERY:
            (condition,) = self.conditions
            streams = ReleasedStreams(self.seed) if self.in_order else None
            options: dict[str, Any] = {"protocol": self.protocol, "seed": self.seed, "streams": streams}
            on_texts = None if paired else TextCorruption(condition.level, **options)
            return ImageCorruption(condition.kind, condition.level, data_set, **options), on_texts
        of_image = next((each for each in self.conditions if each.kind in IMAGE_KINDS), None)
        of_text = next((each for each in self.conditions if each.kind in TEXT_KINDS), None)
        return (
            None if of_image is None else _EveryImage(of_image, self.seed),
            None if of_text is None or paired else _EveryText(of_text, self.seed),
        )


@dataclass(frozen=True)
class _EveryImage:
    condition: Condition
    seed: int

    def __call__(self, image: Image.Image, index: int, modality: str) -> Image.Image:
        kind, level = self.condition
        if kind == "black":
            return Image.new("RGB", image.size)
        if kind == "blur":
            return image.convert("RGB").filter(ImageFilter.GaussianBlur(level))
        rng = np.random.default_rng([self.seed, index, *modality.encode(), 1, *kind.encode()])
        pixels = np.asarray(image.convert("RGB"))
        made = gaussian_noise(pixels, level, rng) if kind == "gaussian" else salt_and_pepper(pixels, level / 100, rng)
        return Image.fromarray(made)


@dataclass(frozen=True)
class _EveryText:
    condition: Condition
    seed: int

    def __call__(self, text: str, index: int) -> str:
        kind, level = self.condition
        rng = random.Random(f"{self.seed} {index} {kind}")
        if kind == "blank":
            return ""
        words = text.split(" ")
        if kind == "words":
            return " ".join(BLANK if rng.random() < level else word for word in words)
        if kind == "shuffle":
            rng.shuffle(words)
            return " ".join(words)
        # Two draws a letter, so that a higher level replaces the same ones and more.
        draws = [(rng.random(), rng.choice(string.ascii_lowercase)) for _ in text]
        return "".join(
            other if hit < level and letter.isalpha() else letter
            for letter, (hit, other) in zip(text, draws, strict=True)
        )


def parse_damages(words: Sequence[str]) -> list[Damage]:
    """Damages as a command names them: a kind and its levels, or kinds that act together.

    Raises:
        ValueError: a word that is none, or a damage twice.

    Example:
        >>> [damage.name for damage in parse_damages(["gaussian:10,30", "blur", "black+words:0.5"])]
        ['gaussian10', 'gaussian30', 'blur', 'black+words0.5']
    """
    damages = []
    for word in words:
        parts = [_levels(part, word) for part in word.split("+")]
        if len(parts) > 1 and any(len(part) > 1 for part in parts):
            raise ValueError(f"{word!r}: kinds that act together must have one level each")
        together = [tuple(each[0] for each in parts)] if len(parts) > 1 else [(each,) for each in parts[0]]
        damages += [Damage(conditions) for conditions in together]
    names = [damage.name for damage in damages]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)} must be named once")
    return damages


def _levels(part: str, word: str) -> list[Condition]:
    kind, colon, given = part.partition(":")
    known = IMAGE_KINDS | TEXT_KINDS
    if kind not in known:
        raise ValueError(f"{word!r}: the kind must be one of {', '.join(known)}, got {kind!r}")
    usual, most = known[kind]
    if not colon and usual is not None:
        return [Condition(kind, usual)]
    if most == 0:
        raise ValueError(f"{word!r}: {kind} has no levels")
    try:
        levels = [float(each) for each in given.split(",")]
    except ValueError:
        levels = []
    if not levels or not all(0 < level <= most for level in levels):
        raise ValueError(
            f"{word!r}: levels of {kind} must be numbers above 0 and up to {most:g}, as in {kind}:{most / 2:g}"
        )
    return [Condition(kind, level) for level in levels]
