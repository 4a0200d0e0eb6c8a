"""What a training step's time goes to: the heads' networks, and fusion with its objective (Eq. 18).

The step is cut at the logits. The objective's part is the fusion layer, ``QMFLoss`` with the trajectory's update, and
the backward down to the logits; the rest are the heads' forward, their backward from the logits on, and the optimizer.
Images and texts are random, and so are the networks' weights, on which no time depends.
"""

import dataclasses
import itertools
import statistics
import tempfile
import time
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor

from ..data.catalogue import DATA_SETS
from ..models.learners import QualityAware, give
from ..models.text_encoders import Numbering, WordNumbers, WordPieces
from ..models.vocabulary import Vocabulary
from ..training.networks import build_learner
from ..training.settings import Settings

TRAINING_SAMPLES = {"nyud2": 795, "sunrgbd": 4845, "food101": 60_101, "mvsa": 1555}
PHASES = ("forward", "objective", "backward", "optimizer")
WARM_UP = 2


class Step(NamedTuple):
    """A data set's figures: seconds of a step's phases, medians over ``repeats``."""

    data_set: str
    networks: str
    device: str
    batch: int
    image_size: int
    tokens: int | None
    seconds: dict[str, float]
    share: float
    """The objective's, of a whole step, in [0, 1]."""
    repeats: int


def measure_step(settings: Settings, device: str, repeats: int, tokens: int) -> Step:
    """Time training steps of ``qmf`` with networks and batches as ``settings`` says.

    Args:
        settings: of which method and data are not looked at.
        device: where to run.
        repeats: steps timed, after two to warm up.
        tokens: of each text.
    """
    settings = dataclasses.replace(settings, method="qmf", weights="none", word_vectors=None)
    learner = _learner(settings).to(device).train()
    inputs, target, index = _batch(settings, learner, device, tokens)
    make = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    optimizer = make(learner.parameters(), lr=settings.learning_rate, weight_decay=settings.weight_decay)
    runs = [_step(learner, inputs, target, index, optimizer, device) for _ in range(WARM_UP + repeats)][WARM_UP:]
    paired, tiny = DATA_SETS[settings.data_set].paired, settings.text_encoder == "tiny"
    medians = [statistics.median(phases) for phases in zip(*runs, strict=True)]
    return Step(
        settings.data_set,
        f"2 x {settings.image_encoder}"
        if paired
        else f"{'tiny BERT' if tiny else 'BERT-base'} + {settings.image_encoder}",
        device,
        settings.batch_size,
        settings.image_size,
        None if paired else tokens,
        dict(zip(PHASES, medians, strict=True)),
        statistics.median(phases[1] / sum(phases) for phases in runs),
        repeats,
    )


def _learner(settings: Settings) -> QualityAware:
    known = DATA_SETS[settings.data_set]
    sizes = (len(known.classes), TRAINING_SAMPLES[settings.data_set])
    if known.paired:
        learner = build_learner(settings, *sizes, pretrained=False)
    elif settings.text_encoder == "tiny":
        numbering: Numbering = WordNumbers(Vocabulary([" ".join(map(str, range(500)))]), settings.max_tokens, True)
        learner = build_learner(settings, *sizes, numbering, pretrained=False)
    else:
        # BERT-base's sizes are the defaults of its configuration: nothing is downloaded.
        with tempfile.TemporaryDirectory() as folder:
            transformers.BertConfig().save_pretrained(folder)
            marks = SimpleNamespace(cls_token_id=101, sep_token_id=102)
            base = dataclasses.replace(settings, text_encoder=folder)
            learner = build_learner(base, *sizes, WordPieces(marks, settings.max_tokens), pretrained=False)
    assert isinstance(learner, QualityAware)
    return learner


def _batch(
    settings: Settings, learner: QualityAware, device: str, tokens: int
) -> tuple[dict[str, Any], Tensor, Tensor]:
    known, batch = DATA_SETS[settings.data_set], settings.batch_size
    generator = torch.Generator().manual_seed(0)
    inputs: dict[str, Any] = {}
    for name in learner.model.names:
        if name == "text":
            ids = torch.randint(1, 500, (batch, tokens), generator=generator).to(device)
            inputs[name] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        else:
            size = (batch, 3, settings.image_size, settings.image_size)
            inputs[name] = torch.randn(size, generator=generator).to(device)
    target = torch.randint(len(known.classes), (batch,), generator=generator).to(device)
    index = torch.randperm(TRAINING_SAMPLES[settings.data_set], generator=generator)[:batch].to(device)
    return inputs, target, index


def _step(
    learner: QualityAware,
    inputs: dict[str, Any],
    target: Tensor,
    index: Tensor,
    optimizer: torch.optim.Optimizer,
    device: str,
) -> tuple[float, ...]:
    """One step's seconds, as ``PHASES`` names them."""
    marks = [_now(device)]
    logits = [give(head, inputs[name]).logits for name, head in learner.model.heads.items()]
    marks.append(_now(device))
    leaves = [x.detach().requires_grad_() for x in logits]
    learner.model.fusion(leaves)  # what forward does with them, besides the objective
    learner.criterion(leaves, target, index).loss.backward()
    marks.append(_now(device))
    torch.autograd.backward(logits, [x.grad for x in leaves])
    marks.append(_now(device))
    optimizer.step()
    optimizer.zero_grad()
    marks.append(_now(device))
    return tuple(after - before for before, after in itertools.pairwise(marks))


def _now(device: str) -> float:
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
