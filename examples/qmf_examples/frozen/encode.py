"""What frozen encoders see of a split, row by row, computed once: ``encode_split``."""

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy as shallow_copy
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..corruption.every_row import EVERY, TEXT_KINDS, Damage
from ..data.catalogue import DATA_SETS
from ..data.faults import DataError
from ..data.pixels import stack
from ..errors import CommandError
from ..files import held
from ..models.text_encoders import WordNumbers, pad
from ..training.image_preparation import transform_of
from ..training.settings import Settings
from .encoders import Encoder, load_encoders
from .samples import augmented, corruptions_of, damaged, digest_of_images, open_split
from .store import ROWS, Store

FORMAT = 1
"""Of the files and of how features are made: another number, and those that are there are not used."""
BATCH = 32
"""Rows that an encoder sees at a time. Always the same, for its last bits depend on it."""
SAY_AFTER = 10.0
"""Seconds between two lines of progress."""
Say = Callable[[str], object]


def encode_split(
    settings: Settings,
    split: str,
    cache: Path,
    damage: Damage | None = None,
    copies: int = 1,
    say: Say = lambda line: None,
    device: str = "cpu",
) -> dict[str, Tensor]:
    """The features of one split, from the cache, or computed into it.

    A row of the cache counts where the files of all images (by what they hold, not where they lie), the tokens of
    all texts, the encoders' weights, the transform, the pooling, the damage and this file's format are the same. The
    command may be killed at any time: what was finished stays, and the rest is computed anew to the same bits.

    Args:
        settings: of the run: its data, encoders, transform and seed. The method is not looked at.
        split: "train", "test", or of texts "dev".
        cache: a folder, which is created, and which several processes may use at once.
        damage: what the split undergoes; None for nothing.
        copies: how many to compute: the first without augmentation, the others with images cut out and flipped at
            random, drawn from the run's seed, the copy's number and the row. A copy's texts are the first one's.
        say: told of progress in lines.
        device: where the encoders run. Features of one device are taken for those of another.

    Returns:
        By modality, float32 ``[copies, N, width]``, rows in the data set's own order.

    Raises:
        ValueError: no copy, or augmented copies of a damaged split.
        DataError: data that cannot be used.
        CommandError: an encoder, a split or a level that is not there; features that are not finite.
    """
    if copies < 1 or (copies > 1 and damage is not None):
        raise ValueError(f"copies must be at least 1, and 1 of a damaged split, got {copies}")
    encoders = load_encoders(settings)
    numbering = encoders["text"].numbering if "text" in encoders else None
    # Reading images to see whether they are bad takes as long as reading them, which a full cache does without.
    samples = open_split(settings, split, numbering, check=settings.skip_bad)
    try:
        stores = _stores(settings, samples, encoders, cache, damage)
    except DataError:
        open_split(settings, split, numbering, check=True)  # which names every bad row
        raise
    if any(_missing(settings, stores, copy) for copy in range(copies)):
        if not settings.skip_bad:
            samples = open_split(settings, split, numbering, check=True)
        cache.mkdir(parents=True, exist_ok=True)
        with held(cache / "encoding.lock", f"{cache}: another command computes features there", wait=say):
            for copy in range(copies):
                # Another process may have computed them meanwhile.
                missing = _missing(settings, stores, copy)
                name = f"{split}, {damage.name if damage else f'copy {copy}' if copy else 'clean'}"
                if missing:
                    views = augmented(samples, settings, copy) if copy else samples
                    views = damaged(samples, settings, damage) if damage else views
                    in_order = damage is not None and damage.in_order
                    _Work(settings, views, encoders, stores, device, name, say).compute(copy, missing, in_order)
    return {name: _load(settings, store, name, copies) for name, store in stores.items()}


def _stores(
    settings: Settings, samples: Any, encoders: dict[str, Encoder], cache: Path, damage: Damage | None
) -> dict[str, Store]:
    """Of each modality, in a folder named by a digest of all that its features depend on."""
    made, rows = transform_of(settings), digest_of_images(samples)
    on_images = [rows, settings.transform, asdict(made), settings.regions]
    stores = {}
    for name, encoder in encoders.items():
        inputs = on_images
        if encoder.numbering is not None:
            numbers = [encoder.numbering(row.text) for row in samples.rows]
            inputs = [numbers, _vocabulary(encoder.numbering), settings.max_tokens, settings.text_pooling]
        content = [FORMAT, name, encoder.digest, inputs, *_suffered(settings, damage, name, on_images, samples)]
        digest = hashlib.blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()
        stores[name] = Store(cache / f"{name}-{digest}", len(samples), encoder.network.width)
    return stores


def _suffered(settings: Settings, damage: Damage | None, name: str, on_images: Any, samples: Any) -> list[Any]:
    """What of a damage matters to a modality; nothing where it leaves the modality as it is."""
    if damage is None:
        return []
    image, text = corruptions_of(settings, damage)
    if (text if name == "text" else image) is None:
        return []
    said: list[Any] = [damage.protocol, damage.seed, settings.data_set, [list(each) for each in damage.conditions]]
    # Texts are damaged as they are written, of which their tokens tell less: two blanks are as good as one there.
    texts = [] if DATA_SETS[settings.data_set].paired else [row.text for row in samples.rows]
    # A damage of both kinds is that of each alone; in order, the draws for texts depend on the images' sizes, and those
    # for images on the texts' words.
    if damage.protocol == EVERY:
        kept = [[c.kind, c.level] for c in damage.conditions if (c.kind in TEXT_KINDS) == (name == "text")]
        said = [damage.protocol, damage.seed, kept]
    if damage.in_order:
        return [*said, on_images, texts]
    return [*said, texts] if name == "text" else said


def _vocabulary(numbering: Any) -> Any:
    """What each number stands for."""
    if isinstance(numbering, WordNumbers):
        return numbering.vocabulary.words
    return sorted(numbering.tokenizer.get_vocab().items())


def _copy_name(settings: Settings, modality: str, copy: int) -> str:
    return "clean" if copy == 0 or modality == "text" else f"copy{copy}-seed{settings.seed}"


def _missing(settings: Settings, stores: dict[str, Store], copy: int) -> dict[int, list[str]]:
    """By part, the modalities whose features are not there."""
    parts: dict[int, list[str]] = {}
    for name, store in stores.items():
        for part in store.parts:
            if store.read(_copy_name(settings, name, copy), part) is None:
                parts.setdefault(part, []).append(name)
    return parts


def _load(settings: Settings, store: Store, name: str, copies: int) -> Tensor:
    found = torch.empty(copies, store.rows, store.width)
    for copy in range(copies):
        for part in store.parts:
            features = store.read(_copy_name(settings, name, copy), part)
            if features is None:  # deleted by somebody since
                raise FileNotFoundError(f"{store.folder}: features have gone while they were read")
            rows = store.rows_of(part)
            found[copy, rows.start : rows.stop] = features
    return found


class _Work:
    """One copy of one split: reading it in threads, and encoding it meanwhile."""

    def __init__(
        self,
        settings: Settings,
        samples: Any,
        encoders: dict[str, Encoder],
        stores: dict[str, Store],
        device: str,
        name: str,
        say: Say,
    ) -> None:
        self.settings, self.samples, self.encoders, self.stores = settings, samples, encoders, stores
        self.device, self.name, self.say = torch.device(device), name, say

    def compute(self, copy: int, missing: dict[int, list[str]], in_order: bool) -> None:
        """Compute the parts that are missing; ``in_order`` reads every row before them too, in one thread."""
        wanted = {name for names in missing.values() for name in names}
        samples = shallow_copy(self.samples)
        if not in_order and "image" not in wanted and hasattr(samples, "images"):
            samples.images = False  # there is no need to read them
        for name in wanted:
            self.encoders[name].network.to(self.device)
        started = said = time.monotonic()
        with ThreadPoolExecutor(1 if in_order else min(8, os.cpu_count() or 1)) as pool:
            parts = range(max(missing) + 1) if in_order else sorted(missing)
            batches = [(part, rows) for part in parts for rows in _batches(part, len(self.samples))]
            seen: dict[str, list[Tensor]] = {}
            for part, rows, read in _read_ahead(samples, batches, pool):
                for name in missing.get(part, ()):
                    seen.setdefault(name, []).append(self._look(name, read))
                if rows.stop in (len(self.samples), (part + 1) * ROWS):
                    for name, features in seen.items():
                        self._write(name, copy, part, torch.cat(features))
                    seen = {}
                if time.monotonic() - said > SAY_AFTER:
                    said = time.monotonic()
                    self.say(f"features of {self.name}: {rows.stop} of {len(self.samples)} rows")
        self.say(f"features of {self.name}: {len(self.samples)} rows, {time.monotonic() - started:.0f} s")

    def _write(self, name: str, copy: int, part: int, features: Tensor) -> None:
        broken = int((~torch.isfinite(features).all(1)).sum())
        if broken:
            raise CommandError(
                f"features of {self.name}: {name} is not finite in {broken} of {len(features)} rows: the encoder's "
                "weights, or what they are computed in, are at fault"
            )
        self.stores[name].write(_copy_name(self.settings, name, copy), part, features)

    @torch.inference_mode()
    def _look(self, name: str, samples: Sequence[Any]) -> Tensor:
        encoder = self.encoders[name]
        if encoder.numbering is not None:
            inputs = pad([encoder.numbering(sample[name]) for sample in samples])
            return encoder.network(**{key: x.to(self.device) for key, x in inputs.items()}).float().cpu()
        images = stack([sample[name] for sample in samples])
        return encoder.network(images.to(self.device, memory_format=torch.channels_last)).float().cpu()


def _batches(part: int, num_rows: int) -> Iterator[range]:
    last = min(num_rows, (part + 1) * ROWS)
    for first in range(part * ROWS, last, BATCH):
        yield range(first, min(last, first + BATCH))


def _read_ahead(
    samples: Any, batches: Sequence[tuple[int, range]], pool: ThreadPoolExecutor
) -> Iterator[tuple[int, range, list[Any]]]:
    """Batches with their samples, of which the next one's are read while the caller works."""
    ahead: tuple[int, range, list[Future[Any]]] | None = None
    for part, rows in batches:
        following = (part, rows, [pool.submit(samples.__getitem__, row) for row in rows])
        if ahead is not None:
            yield ahead[0], ahead[1], [future.result() for future in ahead[2]]
        ahead = following
    if ahead is not None:
        yield ahead[0], ahead[1], [future.result() for future in ahead[2]]
