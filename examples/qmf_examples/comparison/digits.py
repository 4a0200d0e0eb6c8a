"""The job: train heads on the digits' views in each way, damage half of the test views, and score every method."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from qmf_fusion import FusionModel, QMFLoss
from qmf_fusion.processes import place_of_process, sum_over_processes

from ..corruption.view_copies import CORRUPTIONS, choose_views, corrupt
from ..data.digits import NUM_CLASSES, VIEWS, Scaler, Split, load_split
from ..files import load_checkpoint, save_checkpoint
from ..models.methods import TRAININGS, Evidence, Training, list_methods
from .results import Score, pearson

Report = Callable[[int, str, int], None]
"""Called with a seed, a training's name and the number of epochs that it has finished."""


@dataclass(frozen=True)
class DigitsConfig:
    """What decides the numbers (``checkpoint_every`` apart): the same ones give the same results, bit for bit."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seeds a split of the data, the heads' first weights, the order of the batches and the damage."""
    epochs: int = 40
    device: str = "cpu"
    devices: int = 1
    """Processes that train together. Each takes its share of every batch."""
    batch_size: int = 128
    """Samples of a step, of all processes together."""
    hidden: int = 64
    learning_rate: float = 3e-3
    checkpoint_every: int = 10

    def made_with(self, seed: int, training: Training) -> dict[str, str]:
        """What a checkpoint must agree on to be resumed."""
        settings = {**asdict(self), "seed": seed, "training": training.name, "options": dict(training.options)}
        del settings["seeds"], settings["checkpoint_every"]
        return {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}


class Condition(NamedTuple):
    """The test set under one kind of damage at one level."""

    name: str
    level: float
    features: dict[str, Tensor]
    """``[B, D]`` by view."""
    corrupted: Tensor
    """bool ``[V, B]``."""


class Prepared(NamedTuple):
    """A seed's data."""

    train: dict[str, Tensor]
    train_labels: Tensor
    conditions: list[Condition]
    test_labels: Tensor


def list_conditions() -> list[tuple[str, float]]:
    """``("clean", 0.0)`` and every kind of damage at each of its levels."""
    return [("clean", 0.0), *((kind, level) for kind, c in CORRUPTIONS.items() for level in c.levels)]


def prepare(seed: int, device: torch.device) -> Prepared:
    """Split, damage, look at each view's own copy, and scale by what the training set shows."""
    train, test = load_split(seed)
    raw = {view: look(train.images) for view, look in VIEWS.items()}
    scalers = {view: Scaler.fit(features) for view, features in raw.items()}
    half = choose_views(len(VIEWS), test.ids, seed)
    conditions = []
    for name, level in list_conditions():
        chosen = half & (name != "clean")
        if name == "clean":
            copies = np.repeat(test.images[None], len(VIEWS), 0)
        else:
            copies = corrupt(test.images, test.ids, chosen, name, level, seed)
        features = {
            view: torch.from_numpy(scalers[view](look(copy))).to(device)
            for (view, look), copy in zip(VIEWS.items(), copies, strict=True)
        }
        conditions.append(Condition(name, level, features, torch.from_numpy(chosen).to(device)))
    seen = {view: torch.from_numpy(scalers[view](features)).to(device) for view, features in raw.items()}
    return Prepared(seen, _labels(train, device), conditions, _labels(test, device))


def _labels(split: Split, device: torch.device) -> Tensor:
    return torch.from_numpy(split.labels).to(device)


def build_model(widths: dict[str, int], hidden: int, seed: int, training: Training) -> FusionModel:
    """One small MLP per view, fused by the training's layer; the same first weights for the same seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FusionModel(
            {
                view: nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, NUM_CLASSES))
                for view, width in widths.items()
            },
            training.fusion(tuple(widths)),
        )


def train_heads(
    training: Training,
    data: Prepared,
    config: DigitsConfig,
    seed: int,
    checkpoint: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> tuple[FusionModel, QMFLoss]:
    """Train one set of heads on clean images.

    The processes of a group of ``torch.distributed`` share out every batch, so that together they take the steps of
    one; but the ranking loss compares samples of one process, by histories that are merged after each epoch. Each
    returns the same model and trajectory; the first writes.

    Args:
        training: how.
        data: the seed's data.
        config: the settings.
        seed: of the first weights and of the batches' order.
        checkpoint: a file to write every few epochs and at the end; None writes none.
        resume: go on from that file, if it is there, to the same weights and trajectory as without a stop.
        report: called after every epoch, and once for what a checkpoint had finished.

    Raises:
        CommandError: a checkpoint that cannot be read, or is another run's.
    """
    device = torch.device(config.device)
    num = len(data.train_labels)
    rank, size = place_of_process()
    model = build_model({view: x.shape[1] for view, x in data.train.items()}, config.hidden, seed, training).to(device)
    criterion = QMFLoss(model.fusion, num, **training.options).to(device)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=config.learning_rate, fused=True if device.type in ("cpu", "cuda") else None
    )
    made_with = config.made_with(seed, training)
    done, losses = 0, torch.zeros(config.epochs, dtype=torch.float64)
    state = load_checkpoint(checkpoint, made_with, device) if checkpoint is not None and resume else None
    if state is not None:
        model.load_state_dict(state["model"])
        criterion.load_state_dict(state["criterion"])
        optimizer.load_state_dict(state["optimizer"])
        done, losses = state["epoch"], state["losses"].cpu()
        if report is not None:
            report(seed, training.name, done)

    parallel = model if size == 1 else DistributedDataParallel(model)
    # The order depends on the seed and the epoch alone, so that a resumed run needs no generator's state.
    sampler = DistributedSampler[Any](data.train_labels, size, rank, seed=1_000_003 * seed)  # type: ignore[arg-type]
    for epoch in range(done, config.epochs):
        sampler.set_epoch(epoch)
        order = torch.tensor(list(sampler), device=device)
        epoch_loss = torch.zeros((), device=device)
        for index in torch.split(order, config.batch_size // size):
            optimizer.zero_grad()
            out = parallel({view: x[index] for view, x in data.train.items()})
            objective = criterion(out.unimodal_logits, data.train_labels[index], index)
            loss = objective.unimodal_losses.sum() if training.unimodal_only else objective.loss
            loss.backward()
            optimizer.step()
            epoch_loss += loss.detach() * len(index)
        criterion.ranking.sync()
        (epoch_loss,) = sum_over_processes([epoch_loss])
        losses[epoch] = epoch_loss.cpu() / (len(order) * size)
        finished = epoch + 1
        if (
            rank == 0
            and checkpoint is not None
            and (finished % config.checkpoint_every == 0 or finished == config.epochs)
        ):
            state = {
                "made_with": made_with,
                "epoch": finished,
                "model": model.state_dict(),
                "criterion": criterion.state_dict(),
                "optimizer": optimizer.state_dict(),
                "losses": losses,
            }
            save_checkpoint(checkpoint, state)
        if report is not None:
            report(seed, training.name, finished)
    return model, criterion


@torch.no_grad()
def score(model: FusionModel, training: Training, data: Prepared, seed: int) -> list[Score]:
    """Every method that uses these heads, under every condition."""
    scores = []
    model.eval()
    for condition in data.conditions:
        logits = model(condition.features).unimodal_logits
        losses = torch.stack([F.cross_entropy(x, data.test_labels, reduction="none") for x in logits])
        evidence = Evidence(logits, model.fusion, condition.corrupted)
        for method in list_methods(tuple(VIEWS)):
            if method.training != training.name:
                continue
            fused = method.fuse(evidence)
            accuracy = (fused.scores.argmax(-1) == data.test_labels).double().mean().item()
            correlation = None if fused.weights is None else pearson(fused.weights, losses)
            scores.append(Score(method.name, condition.name, condition.level, seed, accuracy, correlation))
    return scores


def checkpoint_path(folder: Path, seed: int, training: Training) -> Path:
    return folder / f"seed{seed}-{training.name}.pt"


def run_digits(
    config: DigitsConfig, checkpoints: Path | None = None, resume: bool = False, report: Report | None = None
) -> list[Score]:
    """The whole comparison: every seed, training, condition and method.

    Of several processes (see ``train_heads``) the first has the scores, and the others return none.

    Args:
        config: the settings.
        checkpoints: an existing folder for them; None writes none.
        resume: go on from the checkpoints there; else those of an earlier run are removed.
        report: see ``Report``.

    Raises:
        CommandError: a checkpoint to resume that cannot be read, or is another run's.
    """
    first = place_of_process()[0] == 0
    if first and checkpoints is not None and not resume:
        for old in checkpoints.glob("seed*-*.pt"):
            old.unlink(missing_ok=True)
    scores: list[Score] = []
    with one_thread():
        for seed in config.seeds:
            data = prepare(seed, torch.device(config.device))
            for training in TRAININGS:
                path = None if checkpoints is None else checkpoint_path(checkpoints, seed, training)
                model, _ = train_heads(training, data, config, seed, path, resume, report)
                if first:
                    scores += score(model, training, data, seed)
    methods = [method.name for method in list_methods(tuple(VIEWS))]
    conditions = list_conditions()
    return sorted(scores, key=lambda s: (methods.index(s.method), conditions.index((s.condition, s.level)), s.seed))


@contextmanager
def one_thread() -> Iterator[None]:
    """The heads are too small to share out, and sums come out the same whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def describe(config: DigitsConfig) -> dict[str, Any]:
    """The settings as ``results.json`` records them: all that the numbers depend on."""
    settings = asdict(config)
    del settings["checkpoint_every"]
    return {**settings, "seeds": list(config.seeds)}
