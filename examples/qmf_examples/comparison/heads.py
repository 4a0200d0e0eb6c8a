"""Training small heads on feature views: MLPs with one hidden layer, Adam, a fixed length, and checkpoints."""

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

from qmf_fusion.integrations import leave_history_out

from ..errors import CommandError
from ..files import load_checkpoint, save_checkpoint
from ..models.divergence import DivergenceWatch, diverged
from ..models.feature_heads import feature_heads
from ..models.learners import Learner, trajectories
from ..models.methods import Training
from ..processes import place, sum_of_all
from .prepared import Prepared

Report = Callable[[int, str, int], None]
"""Called with a seed, a training's name and the number of epochs that it has finished."""


@dataclass(frozen=True)
class Config:
    """What decides the numbers (``checkpoint_every`` apart): the same ones give the same results, bit for bit."""

    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    """Each seeds a split of the data, the heads' first weights, the order of the batches and the damage."""
    epochs: int | None = 40
    """Whole passes, each with its last, smaller batch."""
    steps: int | None = None
    """In place of epochs: so many batches, all full. Of one process."""
    device: str = "cpu"
    devices: int = 1
    """Processes that train together. Each takes its share of every batch."""
    batch_size: int = 128
    """Samples of a step, of all processes together."""
    hidden: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.0
    checkpoint_every: int = 10
    """Epochs."""

    @property
    def length(self) -> str:
        """Of a training, in words: a picture says so, for after a few steps it shows only that everything runs."""
        name, count = ("step", self.steps) if self.steps is not None else ("epoch", self.epochs)
        return f"{count} {name}{'' if count == 1 else 's'}"

    def describe(self) -> dict[str, Any]:
        """The settings as results record them: all that the numbers depend on."""
        settings = {name: value for name, value in asdict(self).items() if value is not None}
        del settings["checkpoint_every"]
        return {**settings, "seeds": list(self.seeds)}

    def made_with(self, seed: int, training: Training) -> dict[str, str]:
        """What a checkpoint must agree on to be resumed."""
        settings = {**self.describe(), "seed": seed, "training": training.name}
        del settings["seeds"]
        return {name: json.dumps(value, sort_keys=True) for name, value in settings.items()}

    def steps_of_epoch(self, num: int) -> int:
        return -(-num // self.batch_size) if self.steps is None else num // min(self.batch_size, num)

    def all_steps(self, num: int) -> int:
        """Of a training on ``num`` samples."""
        return self.steps if self.steps is not None else (self.epochs or 0) * self.steps_of_epoch(num)


def untrained_heads(training: Training, data: Prepared, config: Config, seed: int) -> Learner:
    """The training's learner for a seed's data; the same first weights for the same seed."""
    widths, num = {name: x.shape[1] for name, x in data.train.items()}, len(data.train_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return training.build(feature_heads(widths, data.num_classes, num, config.hidden, seed, config.all_steps(num)))


def train_heads(
    training: Training,
    data: Prepared,
    config: Config,
    seed: int,
    checkpoint: Path | None = None,
    resume: bool = False,
    report: Report | None = None,
) -> Learner:
    """Train one set of heads on clean data.

    The processes of a group of ``torch.distributed`` share out every batch, so that together they take the steps of
    one; but the ranking loss compares samples of one process, by histories that are merged after each epoch. Each
    returns the same learner, trajectory included; the first writes.

    Args:
        training: how.
        data: the seed's data.
        config: the settings.
        seed: of the first weights and of the batches' order.
        checkpoint: a file to write every few epochs and at the end; None writes none.
        resume: go on from that file, if it is there, to the same weights and trajectory as without a stop.
        report: called after every epoch, and once for what a checkpoint had finished.

    Raises:
        CommandError: a checkpoint that cannot be read, or is another run's; the training diverges.
    """
    device, labels = torch.device(config.device), data.train_labels
    rank, size = place()
    learner = untrained_heads(training, data, config, seed).to(device)
    fused = True if device.type in ("cpu", "cuda") else None
    optimizer = torch.optim.Adam(
        learner.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=fused
    )
    made_with, done = config.made_with(seed, training), 0
    state = load_checkpoint(checkpoint, made_with, device) if checkpoint is not None and resume else None
    if state is not None:
        try:
            learner.load_state_dict(state["learner"])
            optimizer.load_state_dict(state["optimizer"])
            done = range(config.all_steps(len(labels)) + 1).index(state["epoch"])
        except Exception as error:  # whatever PyTorch makes of a state that is none of its own
            reason = " ".join(str(error).split())[:200]
            raise CommandError(
                f"--resume: cannot go on from {checkpoint} ({reason}); run without --resume to start afresh"
            ) from error
        if report is not None:
            report(seed, training.name, done)

    leave_history_out(learner)
    answer = learner if size == 1 else DistributedDataParallel(learner)
    watch = DivergenceWatch()
    last, in_epoch = config.all_steps(len(labels)), config.steps_of_epoch(len(labels))
    epochs, step = -(-last // in_epoch), done * in_epoch
    for epoch, batches in itertools.islice(enumerate(_epochs(len(labels), config, seed), start=1), done, epochs):
        which = data.draw_copies(seed, epoch)
        for index in batches[: last - step]:
            copies, index = which[index].to(device), index.to(device)
            optimizer.zero_grad()
            given = answer(data.batch(index, copies))
            loss = learner.loss(given, labels[index], index)
            loss.backward()
            optimizer.step()
            step += 1
        watch.add(given, loss)  # the epoch's last batch: these inputs are whole, so that one tells
        problem = watch.problem(learner, sum_of_all)
        if problem:
            raise diverged(f"{training.name}, seed {seed}", epoch, problem, config.learning_rate)
        for trajectory in trajectories(learner).values():
            trajectory.sync()
        if rank == 0 and checkpoint is not None and (epoch % config.checkpoint_every == 0 or epoch == epochs):
            states = {"learner": learner.state_dict(), "optimizer": optimizer.state_dict()}
            save_checkpoint(checkpoint, {"made_with": made_with, "epoch": epoch, **states})
        if report is not None:
            report(seed, training.name, epoch)
    return learner.eval()


def _epochs(num: int, config: Config, seed: int) -> Iterator[tuple[Tensor, ...]]:
    """Each epoch's batches: the numbers of this process' samples."""
    if config.steps is not None:
        size, generator = min(config.batch_size, num), torch.Generator().manual_seed(seed)
        while True:
            order = torch.randperm(num, generator=generator)
            yield order[: num // size * size].split(size)
    rank, processes = place()
    sampler = DistributedSampler[Any](range(num), processes, rank, seed=1_000_003 * seed)  # type: ignore[arg-type]
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield torch.tensor(list(sampler)).split(config.batch_size // processes)
