"""How fast training data are loaded: our data sets against plain torchvision on the same files.

Both sides give a ``DataLoader`` of no worker processes, on one thread, the same batches in the same order with the same
random crops, equal bit for bit. They take turns, batch by batch, in one process; so a figure is that of one core.

The plain side is what one would write with torchvision alone. For pairs it is an ``ImageFolder`` of the training folder
(which opens the PNG by path and makes RGB of it) whose transform cuts the image into its halves, shrinks them as
the released code does where they are wider than 224 pixels, and then calls the very transforms of our side on both
halves. For texts, which no ``ImageFolder`` can read, it is a list of the parsed lines; a sample opens its image with
the loader of ``ImageFolder``, and calls our side's transforms and numbering of words. What our side does besides: it
follows links to see that a file lies in the data folder, refuses images of other formats or too many pixels, and
names the file of what cannot be read. Neither side's construction is timed, where ours reads every image once.
"""

import json
import statistics
import time
from collections.abc import Callable, Sized
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
from ..training.lightning_module import Shuffled
from ..training.settings import Settings

BATCH = 16
Times = tuple[float, float]
"""Seconds of our side and of the plain one."""


class Loading(NamedTuple):
    """A data set's figures: files per second on one core, medians over ``repeats``."""

    data_set: str
    samples: int
    ours: float
    plain: float
    ratio: float
    """Ours over plain: above 1, ours is the faster."""
    repeats: int


class Sides(NamedTuple):
    """The two data sets with how each one's samples make a batch; ``tensors`` finds the same things in both batches."""

    ours: Dataset[Any]
    plain: Dataset[Any]
    collate: Callable[[list[Any]], Any]
    collate_plain: Callable[[list[Any]], Any]
    tensors: Callable[[Any], tuple[Tensor, ...]]
    tensors_plain: Callable[[Any], tuple[Tensor, ...]]


def measure_loading(settings: Settings, repeats: int) -> Loading:
    """Time one pass of both over the training data per repeat, after one to warm up.

    Raises:
        DataError: data that cannot be used.
    """
    sides = make_sides(settings)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            passes = [
                [sum(times) for times in zip(*take_turns(sides, seed), strict=True)] for seed in range(repeats + 1)
            ]
    finally:
        torch.set_num_threads(threads)
    ours, plain = (statistics.median(times) for times in zip(*passes[1:], strict=True))
    count = len(cast(Sized, sides.ours))
    return Loading(settings.data_set, count, count / ours, count / plain, plain / ours, repeats)


def take_turns(sides: Sides, seed: int, seen: Callable[[Any, Any], object] = lambda ours, plain: None) -> list[Times]:
    """Seconds of each batch of a pass on both sides, in the order and with the crops that ``seed`` draws.

    ``seen`` is shown both batches.
    """
    torch.manual_seed(seed)
    loaders = (_load(sides.ours, sides.collate, seed), _load(sides.plain, sides.collate_plain, seed))
    iterators = [iter(loader) for loader in loaders]
    seconds = []
    for number in range(len(loaders[0])):
        state = torch.get_rng_state()
        taken, batches = [0.0, 0.0], [None, None]
        # Who comes first finds the files less fresh in the caches; so they change places.
        for side in (0, 1) if number % 2 == seed % 2 else (1, 0):
            torch.set_rng_state(state)
            start = time.perf_counter()
            batches[side] = next(iterators[side])
            taken[side] = time.perf_counter() - start
        seen(*batches)
        seconds.append((taken[0], taken[1]))
    return seconds


def _load(samples: Dataset[Any], collate: Callable[[list[Any]], Any], seed: int) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    order = Shuffled(samples, 1, 0, seed=seed, batch_size=BATCH)
    return DataLoader(samples, BATCH, sampler=order, collate_fn=collate, generator=generator)


def make_sides(settings: Settings) -> Sides:
    """Both sides of ``settings.data_root``'s training split."""
    return _pairs(settings) if DATA_SETS[settings.data_set].paired else _texts(settings)


def _pairs(settings: Settings) -> Sides:
    ours = paired_batches.load_images(settings)
    crop, finish = ours.transform, ours.finish
    assert crop is not None
    assert finish is not None

    def both(image: Any) -> Any:
        width, height = image.size
        halves = [tv.crop(image, 0, left, height, width // 2) for left in (0, width // 2)]
        if width // 2 > SHRINK_ABOVE:
            halves = [tv.resize(half, [LOAD_SIZE, LOAD_SIZE], v2.InterpolationMode.BICUBIC) for half in halves]
        return finish(*crop(*halves))

    folder = str(ours.root / "train")
    plain = ImageFolder(folder, both, is_valid_file=lambda name: name.lower().endswith(".png"), allow_empty=True)
    return Sides(
        ours,
        plain,
        paired_batches.collate,
        default_collate,
        lambda batch: (batch["inputs"]["rgb"], batch["inputs"]["depth"], batch["label"]),
        lambda batch: (*batch[0], batch[1]),
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


def _texts(settings: Settings) -> Sides:
    numbering = text_batches.load_texts_numbering(settings)
    ours = text_batches.load_texts(settings, "train", numbering)
    resize, finish = ours.transform, ours.finish
    assert resize is not None
    assert finish is not None

    def collate(samples: list[Any]) -> Any:
        texts, images, labels = zip(*samples, strict=True)
        return pad(texts), torch.stack(images), torch.tensor(labels)

    plain = PlainTexts(ours.root, ours.classes, numbering, lambda image: finish(resize(image)))
    return Sides(
        ours,
        plain,
        text_batches.collate,
        collate,
        lambda batch: (batch["inputs"]["text"]["input_ids"], batch["inputs"]["image"], batch["label"]),
        lambda batch: (batch[0]["input_ids"], *batch[1:]),
    )
