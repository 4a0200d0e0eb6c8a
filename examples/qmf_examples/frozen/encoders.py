"""The frozen encoders of a run's settings, and digests of what their features depend on."""

import hashlib
import json
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn

from ..data.catalogue import DATA_SETS
from ..models.image_encoders import ImageEncoder
from ..models.text_encoders import Numbering, load_text_encoder
from ..training import text_batches
from ..training.settings import Settings


class Encoder(NamedTuple):
    """One that several modalities may share."""

    network: Any
    """Called with images, or with ``input_ids`` and ``attention_mask``; has a ``width``."""
    digest: str
    """Of its weights."""
    numbering: Numbering | None = None
    """How texts become its numbers."""


def load_encoders(settings: Settings) -> dict[str, Encoder]:
    """By modality, in evaluation mode, without gradients; both images of a pair have the same one.

    Weights that are drawn at random are the same ones every time.

    Raises:
        CommandError: one that cannot be had.
        DataError: texts that cannot be read.
    """
    known = DATA_SETS[settings.data_set]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        seen = ImageEncoder(settings.image_encoder, settings.weights, settings.regions)
        image = Encoder(_frozen(seen).to(memory_format=torch.channels_last), _digest(seen))
        if known.paired:
            return dict.fromkeys(known.modalities, image)
        numbering = text_batches.load_texts_numbering(replace(settings, method="late"))
        read = load_text_encoder(settings.text_encoder, numbering, settings.text_pooling)
        return {"text": Encoder(_frozen(read), _digest(read), numbering), "image": image}


def encoder_widths(settings: Settings) -> dict[str, int]:
    """How many features each modality has.

    Raises:
        CommandError: an encoder that cannot be had.
        DataError: texts that cannot be read.
    """
    return {name: encoder.network.width for name, encoder in load_encoders(settings).items()}


def _frozen(network: nn.Module) -> nn.Module:
    return network.eval().requires_grad_(False)


def _digest(network: nn.Module) -> str:
    digest = hashlib.blake2b()
    for name, tensor in sorted(network.state_dict().items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()
