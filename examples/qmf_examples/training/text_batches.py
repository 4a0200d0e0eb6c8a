"""FOOD101 and MVSA: how texts and images become tensors and batches."""

from pathlib import Path
from typing import Any

import torch
from torchvision.transforms import v2

from ..data.catalogue import DATA_SETS
from ..data.class_checks import check_every_class
from ..data.text_images import TextImages, read_rows
from ..models.text_encoders import Numbering, WordNumbers, load_numbering, pad
from ..models.vocabulary import Vocabulary
from .image_preparation import resize, to_tensors, transform_of
from .settings import Settings
from .training_data import TrainingData, fingerprint

BAGS = ("bow", "concatbow")
TEXT_ALONE = ("bow", "bert")


def load_training(settings: Settings) -> TrainingData:
    """Read and check the data; the epoch is chosen on dev, as in the released code, or with ``"test"`` on test."""
    numbering = load_texts_numbering(settings)
    train = load_texts(settings, "train", numbering)
    check_every_class(train.classes, train.labels, Path(settings.data_root) / "train.jsonl")
    select = load_texts(settings, "test" if settings.selection == "test" else "dev", numbering)
    faults = len(train.faults) + len(select.faults)
    rows = fingerprint(*([(row.id, row.label, row.text, row.img) for row in split.rows] for split in (train, select)))
    return TrainingData(train, select, tuple(train.classes), len(train), faults, rows, numbering)


def load_test(settings: Settings, numbering: Numbering) -> TextImages:
    """The test split; its ``corrupt`` would act on the resized image before the crop, as in the released code."""
    return load_texts(settings, "test", numbering)


def load_classes(settings: Settings) -> list[str]:
    """The names of the classes, in the order of their numbers."""
    rows, _ = read_rows(DATA_SETS[settings.data_set], Path(settings.data_root) / "train.jsonl")
    return sorted({row.label for row in rows})


def load_texts_numbering(settings: Settings) -> Numbering:
    """How the run's texts become numbers; a vocabulary is that of the training split's words."""
    known = DATA_SETS[settings.data_set]
    rows, _ = read_rows(known, Path(settings.data_root) / "train.jsonl")
    texts = [row.text for row in rows]
    if settings.method in BAGS:
        return WordNumbers(Vocabulary(texts), settings.max_tokens)
    return load_numbering(settings.text_encoder, texts, settings.max_tokens)


def load_texts(settings: Settings, split: str, numbering: Numbering, check: bool = True) -> TextImages:
    """One split, as tensors and numbers."""
    made = transform_of(settings)
    return TextImages(
        DATA_SETS[settings.data_set],
        Path(settings.data_root),
        split,
        images=settings.method not in TEXT_ALONE,
        transform=resize(made),
        text_transform=numbering,
        finish=v2.Compose([v2.CenterCrop(settings.image_size), *to_tensors(made)]),
        resized=settings.load_size,
        skip_bad=settings.skip_bad,
        check=check,
    )


def collate(samples: list[Any]) -> dict[str, Any]:
    """A batch: ``inputs`` by modality, texts padded to the longest; ``label`` and ``index`` ``[B]``."""
    inputs: dict[str, Any] = {"text": pad([sample["text"] for sample in samples])}
    if "image" in samples[0]:
        inputs["image"] = torch.stack([sample["image"] for sample in samples])
    return {
        "inputs": inputs,
        "label": torch.tensor([sample["label"] for sample in samples]),
        "index": torch.tensor([sample["index"] for sample in samples]),
    }
