"""A run's test data under each condition, with what is damaged: samples, or what frozen encoders see of them."""

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..corruption import features
from ..corruption.conditions import CONFLICT, PAPER_KINDS, TABLES_PROTOCOL, Condition, paper_conditions
from ..corruption.every_row import Damage
from ..corruption.images import ImageCorruption
from ..corruption.released_streams import ReleasedStreams
from ..corruption.texts import TextCorruption
from ..data.catalogue import DATA_SETS
from ..errors import CommandError
from ..frozen.encode import encode_split
from ..frozen.heads import load_split
from ..training.run import loader_of
from ..training.settings import Settings

Say = Callable[[str], object]


class NoisePlan(NamedTuple):
    """What the test data undergo: each kind of the paper's noise at each level."""

    kinds: tuple[str, ...]
    levels: tuple[float, ...]
    protocol: str = TABLES_PROTOCOL
    seed: int = 0
    damages: tuple[Damage, ...] = ()
    """Beyond the paper, to half of each sample's modalities, for frozen encoders."""
    conflict: bool = False
    """Whether half of each sample's modalities are another sample's besides."""

    @property
    def further(self) -> list[Condition]:
        """What is beyond the paper."""
        return [*(Condition(each.name) for each in self.damages), *([CONFLICT] if self.conflict else [])]

    @property
    def conditions(self) -> list[Condition]:
        """The paper's first."""
        return [*paper_conditions(self.kinds, self.levels), *self.further]


class UnderConditions(Protocol):
    """A test split under conditions."""

    def batches(self, condition: Condition) -> Iterator[dict[str, Any]]:
        """``inputs`` by modality, ``label`` ``[B]``, and ``damaged``, bool ``[M, B]``."""


class Samples:
    """Test samples that the run's own encoders read."""

    def __init__(
        self,
        settings: Settings,
        numbering: Any,
        plan: NoisePlan,
        batch_size: int,
        workers: int,
        say: Callable[[str], object],
    ) -> None:
        self.settings, self.plan, self.batch_size = settings, plan, batch_size
        # The released protocols' random numbers go on from sample to sample.
        self.workers = workers if plan.protocol == "clean" else 0
        self.module = loader_of(settings.data_set)
        self.samples = self.module.load_test(settings, numbering, say=say)

    def batches(self, condition: Condition) -> Iterator[dict[str, Any]]:
        modalities = DATA_SETS[self.settings.data_set].modalities
        samples = Noticing(damage(self.samples, self.settings, condition, self.plan), modalities)
        yield from DataLoader(samples, self.batch_size, num_workers=self.workers, collate_fn=self._collate)

    def _collate(self, samples: list[tuple[Any, list[bool]]]) -> dict[str, Any]:
        batch: dict[str, Any] = self.module.collate([sample for sample, _ in samples])
        return {**batch, "damaged": torch.tensor([damaged for _, damaged in samples]).T}


class Noticing(Dataset[Any]):
    """Samples, each with which of its modalities the corruption has changed."""

    def __init__(self, samples: Any, modalities: tuple[str, ...]) -> None:
        self.samples, self.modalities = copy.copy(samples), modalities
        self.changed: set[str] = set()
        self.corrupt, self.corrupt_text = samples.corrupt, getattr(samples, "corrupt_text", None)
        self.samples.corrupt = self._image
        if self.corrupt_text is not None:
            self.samples.corrupt_text = self._text

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, list[bool]]:
        self.changed.clear()
        sample = self.samples[index]
        return sample, [name in self.changed for name in self.modalities]

    def _image(self, given: Any, index: int, modality: str) -> Any:
        made = self.corrupt(given, index, modality)
        if made is not given:
            self.changed.add(modality)
        return made

    def _text(self, given: str, index: int) -> str:
        assert self.corrupt_text is not None
        made: str = self.corrupt_text(given, index)
        if made != given:
            self.changed.add("text")
        return made


class Features:
    """Test samples as frozen encoders see them: each condition is encoded once, for all runs."""

    def __init__(self, settings: Settings, plan: NoisePlan, cache: Path, batch_size: int, say: Say) -> None:
        self.settings, self.plan, self.cache, self.batch_size, self.say = settings, plan, cache, batch_size, say
        self.split = load_split(settings, "test", cache, say=say)
        self.clean, self.labels = {name: x[0] for name, x in self.split.rows.items()}, self.split.labels
        self.seen: dict[Condition, tuple[dict[str, Tensor], Tensor]] = {}

    def batches(self, condition: Condition) -> Iterator[dict[str, Any]]:
        if condition not in self.seen:
            self.seen[condition] = self._under(condition)
        rows, damaged = self.seen[condition]
        for start in range(0, len(self.labels), self.batch_size):
            part = slice(start, start + self.batch_size)
            inputs = {name: x[part] for name, x in rows.items()}
            yield {"inputs": inputs, "label": self.labels[part], "damaged": damaged[:, part]}

    def _under(self, condition: Condition) -> tuple[dict[str, Tensor], Tensor]:
        if condition.kind in PAPER_KINDS:
            if not condition.level:
                return self.clean, torch.zeros(len(self.clean), len(self.labels), dtype=torch.bool)
            rows = self._encode(Damage((condition,), self.plan.protocol, self.plan.seed))
            return rows, torch.stack([changed(self.clean[name], x) for name, x in rows.items()])
        views = [x.double().numpy() for x in self.clean.values()]
        if condition == CONFLICT:
            made, chosen = features.corrupt(views, condition, self.plan.seed)
        else:
            (wanted,) = (each for each in self.plan.damages if each.name == condition.kind)
            rows = self._encode(replace(wanted, seed=self.plan.seed))
            able = {name: bool(changed(self.clean[name], x).any()) for name, x in rows.items()}
            damaged = [rows[name].double().numpy() if able[name] else None for name in self.clean]
            made, chosen = features.replace(views, damaged, condition, self.plan.seed)
        shown = {name: torch.from_numpy(x).float() for name, x in zip(self.clean, made, strict=True)}
        return shown, torch.from_numpy(chosen)

    def _encode(self, damage: Damage) -> dict[str, Tensor]:
        rows = encode_split(replace(self.settings, seed=0), "test", self.cache, damage, say=self.say)
        return {name: x[0] for name, x in rows.items()}


CHANGED = 1e-3
"""By how much of its largest feature a damaged sample differs from the whole one at least: the same sample, encoded
beside others, differs by rounding."""


def changed(clean: Tensor, given: Tensor) -> Tensor:
    """Which rows are not what they were but for rounding, bool ``[B]``, of features ``[B, width]``.

    Example:
        >>> changed(torch.ones(2, 3), torch.tensor([[1.0, 1.0, 1.0 + 1e-6], [1.0, 1.0, 1.1]])).tolist()
        [False, True]
    """
    return (given - clean).abs().amax(1) > CHANGED * clean.abs().amax(1)


def damage(samples: Any, settings: Settings, condition: Condition, plan: NoisePlan) -> Any:
    """The same samples, read and checked once, under a corruption."""
    streams = None if plan.protocol == "clean" else ReleasedStreams(plan.seed)
    options: dict[str, Any] = {"protocol": plan.protocol, "seed": plan.seed, "streams": streams}
    damaged = copy.copy(samples)
    try:
        damaged.corrupt = ImageCorruption(*condition, settings.data_set, **options)
        if not DATA_SETS[settings.data_set].paired:
            damaged.corrupt_text = TextCorruption(condition.level, **options)
    except ValueError as error:
        raise CommandError(f"--levels: {error}") from error
    return damaged
