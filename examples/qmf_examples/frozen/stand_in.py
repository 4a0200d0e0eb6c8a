# ruff: noqa
# mypy: ignore-errors
"""Stands in for the extraction library until it is merged."""

from collections.abc import Callable
from pathlib import Path
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from ..data.catalogue import DATA_SETS
from ..models.image_encoders import ImageEncoder
from ..models.text_encoders import load_text_encoder
from ..training import paired_batches, text_batches
from ..training.settings import Settings


def encode_split(
    settings: Settings, split: str, cache: Path, damage=None, copies: int = 1, say: Callable[[str], object] = print
) -> dict[str, Tensor]:
    say(f"encoding {split}")
    known = DATA_SETS[settings.data_set]
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        if known.paired:
            module, numbering = paired_batches, None
            encoders = {name: ImageEncoder("tiny", "none").eval() for name in known.modalities}
        else:
            module, numbering = text_batches, text_batches.load_texts_numbering(settings)
            encoders = {
                "text": load_text_encoder("tiny", numbering, "mean").eval(),
                "image": ImageEncoder("tiny", "none").eval(),
            }
        made = []
        for copy in range(copies):
            if known.paired:
                samples = paired_batches.load_images(settings)
                if split == "test" or copy == 0:
                    other = paired_batches.load_test(settings)
                    samples.transform = other.transform
                    if split == "test":
                        samples = other
            else:
                samples = text_batches.load_texts(settings, split, numbering)
            if damage is not None:
                samples.corrupt, on_texts = damage.corruptions(settings.data_set, known.paired)
                if not known.paired:
                    samples.corrupt_text = on_texts
            rows = {name: [] for name in known.modalities}
            for batch in DataLoader(samples, 16, collate_fn=module.collate):
                for name, encoder in encoders.items():
                    x = batch["inputs"][name]
                    rows[name].append(encoder(**x) if isinstance(x, dict) else encoder(x))
            made.append({name: torch.cat(x) for name, x in rows.items()})
    return {name: torch.stack([x[name] for x in made]) for name in known.modalities}
