"""How fast training data are loaded: from the cache, decoded anew, and by plain torchvision, of the same files.

All sides give a ``DataLoader`` of no worker processes, on one thread, the same batches in the same order with the same
random crops, equal bit for bit. They take turns, batch by batch, in one process; so a figure is that of one core.

The plain side is what one would write with torchvision alone. For pairs it is an ``ImageFolder`` of the training folder
(which opens the PNG by path and makes RGB of it) whose transform cuts the image into its halves, shrinks them as
the released code does where they are wider than 224 pixels, and then calls torchvision's transforms on both halves. For
texts, which no ``ImageFolder`` can read, it is a list of the parsed lines; a sample opens its image with the loader of
``ImageFolder``, and calls torchvision's transforms and our side's numbering of words. Without a cache, what our side
does besides is to follow links to see that a file lies in the data folder, to refuse images of other formats or too
many pixels, and to name the file of what cannot be read. No side's construction is timed, where ours reads every image
once, and fills its cache.
"""

import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as tv

from ..data.catalogue import DATA_SETS
from ..data.paired_images import LOAD_SIZE, SHRINK_ABOVE
from ..models.text_encoders import pad
from ..training import paired_batches, text_batches
from ..training.image_preparation import resize, transform_of
from ..training.lightning_module import Shuffled
from ..training.settings import Settings

BATCH = 16
SIDES = ("kept", "anew", "plain")


class Loading(NamedTuple):
    """A data set's figures: files per second on one core, medians over ``repeats``."""

    data_set: str
    samples: int
    kept: float
    """From the cache, as every epoch."""
    anew: float
    """Without a cache."""
    plain: float
    ratio: float
    """Kept over plain: above 1, ours is the faster."""
    repeats: int


class Side(NamedTuple):
    """Samples and how they make a batch; ``tensors`` finds the same things in the batches of every side."""

    samples: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    tensors: Callable[[Any], tuple[Tensor, ...]]


def measure_loading(settings: Settings, repeats: int) -> Loading:
    """Time one pass of each side over the training data per repeat, after one to warm up.

    Raises:
        DataError: data that cannot be used.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder, torch.random.fork_rng(devices=[]):
            sides = make_sides(settings, Path(folder))
            passes = [
                [sum(times) for times in zip(*take_turns(sides, seed), strict=True)] for seed in range(repeats + 1)
            ]
    finally:
        torch.set_num_threads(threads)
    count = len(cast(Sized, sides[0].samples))
    kept, anew, plain = (count / statistics.median(times) for times in zip(*passes[1:], strict=True))
    return Loading(settings.data_set, count, kept, anew, plain, kept / plain, repeats)


def take_turns(
    sides: Sequence[Side], seed: int, seen: Callable[[list[Any]], object] = lambda batches: None
) -> list[list[float]]:
    """Seconds of each batch of a pass on each side, in the order and with the crops that ``seed`` draws.

    ``seen`` is shown the batches.
    """
    torch.manual_seed(seed)
    loaders = [_load(side, seed) for side in sides]
    iterators = [iter(loader) for loader in loaders]
    seconds = []
    for number in range(len(loaders[0])):
        state = torch.get_rng_state()
        taken, batches = [0.0] * len(sides), [None] * len(sides)
        # Who comes first finds the files less fresh in the caches; so they change places.
        for place in range(len(sides)):
            side = (place + number + seed) % len(sides)
            torch.set_rng_state(state)
            start = time.perf_counter()
            batches[side] = next(iterators[side])
            taken[side] = time.perf_counter() - start
        seen(batches)
        seconds.append(taken)
    return seconds


def _load(side: Side, seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    order = Shuffled(side.samples, 1, 0, seed=seed, batch_size=BATCH)
    return DataLoader(side.samples, BATCH, sampler=order, collate_fn=side.collate, generator=generator)


def make_sides(settings: Settings, folder: Path) -> tuple[Side, ...]:
    """``SIDES``, of ``settings.data_root``'s training split; images are kept in ``folder``."""
    settings = replace(settings, cache=str(folder))
    return _pairs(settings) if DATA_SETS[settings.data_set].paired else _texts(settings)


def _to_tensors(settings: Settings) -> list[Any]:
    made = transform_of(settings)
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(made.mean), list(made.std))]


def _pairs(settings: Settings) -> tuple[Side, ...]:
    augment = [resize(transform_of(settings)), v2.RandomCrop(settings.image_size), v2.RandomHorizontalFlip()]
    transform = v2.Compose([*augment, *_to_tensors(settings)])

    def both(image: Any) -> Any:
        width, height = image.size
        halves = [tv.crop(image, 0, left, height, width // 2) for left in (0, width // 2)]
        if width // 2 > SHRINK_ABOVE:
            halves = [tv.resize(half, [LOAD_SIZE, LOAD_SIZE], v2.InterpolationMode.BICUBIC) for half in halves]
        return transform(*halves)

    samples = [paired_batches.load_images(each) for each in (settings, replace(settings, cache="off"))]
    folder = str(samples[0].root / "train")
    plain = ImageFolder(folder, both, is_valid_file=lambda name: name.lower().endswith(".png"), allow_empty=True)
    return (
        *(
            Side(one, paired_batches.collate, lambda batch: (*batch["inputs"].values(), batch["label"]))
            for one in samples
        ),
        Side(plain, default_collate, lambda batch: (*batch[0], batch[1])),
    )


class PlainTexts(Dataset[Any]):
    """A .jsonl file's rows as ``(text, image, label)``, without checks; grey where a row has no image."""

    def __init__(self, root: Path, classes: list[str], read_text: Callable[[str], Any], read_image: Any) -> None:
        lines = (root / "train.jsonl").read_text(encoding="utf-8").splitlines()
        self.rows = [json.loads(line) for line in lines if line.strip()]
        self.root, self.read_text, self.read_image = root, read_text, read_image
        self.numbers = {name: number for number, name in enumerate(classes)}

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, Any, int]:
        row = self.rows[index]
        given = row["img"]
        image = default_loader(str(self.root / given)) if given else Image.new("RGB", (256, 256), (128, 128, 128))
        return self.read_text(row["text"]), self.read_image(image), self.numbers[row["label"]]


def _texts(settings: Settings) -> tuple[Side, ...]:
    numbering = text_batches.load_texts_numbering(settings)
    samples = [text_batches.load_texts(each, "train", numbering) for each in (settings, replace(settings, cache="off"))]
    crop = [resize(transform_of(settings)), v2.CenterCrop(settings.image_size)]
    transform = v2.Compose([*crop, *_to_tensors(settings)])

    def collate(samples: list[Any]) -> Any:
        texts, images, labels = zip(*samples, strict=True)
        return pad(texts), torch.stack(images), torch.tensor(labels)

    plain = PlainTexts(samples[0].root, samples[0].classes, numbering, transform)

    def tensors(batch: Any) -> tuple[Tensor, ...]:
        return batch["inputs"]["text"]["input_ids"], batch["inputs"]["image"], batch["label"]

    return (
        *(Side(one, text_batches.collate, tensors) for one in samples),
        Side(plain, collate, lambda batch: (batch[0]["input_ids"], *batch[1:])),
    )
