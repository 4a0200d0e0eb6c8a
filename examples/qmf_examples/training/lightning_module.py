"""The training loop's two halves that Lightning asks for: what a step does, and where batches come from."""

import itertools
import math
import os
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, cast

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler
from torchmetrics.classification import MulticlassAccuracy

from qmf_fusion.integrations import leave_history_out

from ..errors import CommandError
from ..models.divergence import DivergenceWatch, diverged
from ..models.learners import Learner, trajectories
from .checkpoints import unlike
from .settings import Settings

ACCURACY = "validation/accuracy"


class TrainingModule(L.LightningModule):
    """One method's training: its loss, its optimizer, warm-up, plateau and frozen epochs.

    Args:
        learner: the method.
        settings: of the run.
        num_classes: K.
        num_samples: N, saved with K, so that a run can be rebuilt without its training data.
        digests: of the data, by name; saved too.
        widths: of features that frozen encoders have made, by modality; saved too.
    """

    def __init__(
        self,
        learner: Learner,
        settings: Settings,
        num_classes: int,
        num_samples: int,
        digests: Mapping[str, str] | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        super().__init__()
        self.learner = learner
        self.settings = settings
        self.sizes: dict[str, Any] = {"num_classes": num_classes, "num_samples": num_samples}
        if widths is not None:
            self.sizes["widths"] = dict(widths)
        self.digests = dict(digests or {})
        self.watch = DivergenceWatch()
        self.resumed: dict[str, Any] | None = None
        self.started = False
        """Whether all is restored of the checkpoint that is gone on from, if any."""
        self.accuracy = MulticlassAccuracy(num_classes, average="micro")
        self.plateau: torch.optim.lr_scheduler.ReduceLROnPlateau | None = None
        leave_history_out(self)

    def on_train_epoch_start(self) -> None:
        # Dropout and crops draw from generators that depend on the seed, the epoch and the process alone, so that a
        # resumed run needs no generator's state.
        seed = _epoch_seed(self.settings.seed, self.current_epoch, self.global_rank)
        L.seed_everything(seed, verbose=False)
        for name, epochs in self.settings.freeze.items():
            # A modality that the method does not look at has nothing to freeze, and what is fixed anyway stays so.
            encoder = self.learner.encoders.get(name)
            if encoder is not None and getattr(encoder, "learned", True):
                encoder.requires_grad_(self.current_epoch >= epochs)

    def training_step(self, batch: dict[str, Any], _: int) -> torch.Tensor:
        try:
            answer = self.learner(batch["inputs"])
        except ValueError as error:
            if len(batch["label"]) != 1:
                raise
            raise CommandError(
                f"a batch of one sample cannot be trained on here ({error}): take --batch-size of 2 or more, and "
                "a training set of 2 samples or more"
            ) from error
        loss = self.learner.loss(answer, batch["label"], batch["index"])
        self.watch.add(answer, loss)
        self.log("train/loss", loss, on_step=False, on_epoch=True, batch_size=len(batch["label"]), sync_dist=True)
        return loss

    def on_validation_start(self) -> None:
        self._stop_if_diverged()
        # Each process has seen samples of its own; merged here, before the checkpoint of the epoch is written.
        if not self.trainer.sanity_checking:
            for trajectory in trajectories(self.learner).values():
                trajectory.sync()

    def validation_step(self, batch: dict[str, Any], number: int) -> None:
        answer, label = self.learner(batch["inputs"]), batch["label"]
        self.watch.add(answer)
        # Of several processes, some repeat a sample at the end, so that all take as many steps; it counts once.
        num = len(cast(DataLoader[Any], self.trainer.val_dataloaders).dataset)  # type: ignore[arg-type]
        own = len(range(self.global_rank, num, self.trainer.world_size))
        counted = max(0, min(len(label), own - number * self.settings.batch_size))
        if counted:
            self.accuracy.update(answer.scores[:counted], label[:counted])

    def on_validation_epoch_end(self) -> None:
        accuracy = self.accuracy.compute()
        self.accuracy.reset()
        self.log(ACCURACY, accuracy, prog_bar=True)
        if not self.trainer.sanity_checking and self.plateau is not None:
            # Lightning steps a plateau after it has written the epoch's checkpoint, and not at all for an epoch that a
            # resumed run has finished: stepped here, its state in the checkpoint is the epoch's.
            self.plateau.step(accuracy.item())
            self.log("train/learning_rate", self.plateau.optimizer.param_groups[0]["lr"])

    def on_train_epoch_end(self) -> None:
        self._stop_if_diverged()  # before the epoch's checkpoints are written, so that the last good ones stay

    def _stop_if_diverged(self) -> None:
        problem = self.watch.problem(self.learner, partial(self.trainer.strategy.reduce, reduce_op="sum"))
        if problem and not self.trainer.is_global_zero:
            raise CommandError  # the first process has come to the same, and says so
        if problem:
            s = self.settings
            raise diverged(f"{s.method}, seed {s.seed}", self.current_epoch + 1, problem, s.learning_rate)

    def configure_optimizers(self) -> Any:
        s = self.settings
        parameters = list(self.learner.parameters())
        # Biases and normalisations are not decayed by AdamW, as in the released text-image code.
        adamw = s.optimizer == "adamw"
        plain = [p for p in parameters if adamw and p.dim() <= 1]
        decayed = [p for p in parameters if not (adamw and p.dim() <= 1)]
        groups: list[dict[str, Any]] = [{"params": decayed}, {"params": plain, "weight_decay": 0.0}]
        make = torch.optim.AdamW if adamw else torch.optim.Adam
        optimizer = make([g for g in groups if g["params"]], lr=s.learning_rate, weight_decay=s.weight_decay)
        self.plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(
            optimizer, mode="max", factor=s.plateau_factor, patience=s.plateau_patience
        )
        if not s.warmup:
            return optimizer
        # Transformers' schedules set the rate anew at every step, and would undo the plateau's; this one multiplies.
        steps = max(1, math.ceil(s.warmup * float(self.trainer.estimated_stepping_batches)))
        rise = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1 / (steps + 1), total_iters=steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rise, "interval": "step"}}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["sizes"] = self.sizes
        checkpoint["accuracy"] = float(self.trainer.callback_metrics[ACCURACY])
        checkpoint.update(self.digests)
        if self.plateau is not None:
            checkpoint["plateau"] = self.plateau.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.resumed = checkpoint
        kept = [*self.trainer.early_stopping_callbacks, *self.trainer.checkpoint_callbacks]
        callbacks = {each.state_key: each.state_dict() for each in kept}
        self._compare({"loops": {"fit_loop": self.trainer.fit_loop.state_dict()}, "callbacks": callbacks})

    def on_fit_start(self) -> None:
        if self.resumed is None or self.plateau is None:
            return
        # Optimizers and schedulers are there now, and Lightning restores them next.
        optimizers = [optimizer.state_dict() for optimizer in self.trainer.optimizers]
        schedulers = [each.scheduler.state_dict() for each in self.trainer.lr_scheduler_configs]
        plateau = self.plateau.state_dict()
        self._compare({"optimizer_states": optimizers, "lr_schedulers": schedulers, "plateau": plateau})
        parameters = [p for group in self.trainer.optimizers[0].param_groups for p in group["params"]]
        for number, moments in self.resumed["optimizer_states"][0]["state"].items():
            like = {"step": torch.tensor(0.0), "exp_avg": parameters[number], "exp_avg_sq": parameters[number]}
            self._check(unlike(moments, {name: x.detach() for name, x in like.items()}, "an optimizer's state"))
        self.plateau.load_state_dict(self.resumed["plateau"])

    def on_train_start(self) -> None:
        self.resumed, self.started = None, True

    def _compare(self, fresh: dict[str, Any]) -> None:
        """Whether what is gone on from is of the same make as what it would replace."""
        for name, value in fresh.items():
            assert self.resumed is not None
            self._check(unlike(self.resumed.get(name), value, name))

    def _check(self, different: str | None) -> None:
        if different:
            raise ValueError(different)


class Shuffled(DistributedSampler[Any]):
    """All samples in the order that ``seed`` draws, however often it is asked: Lightning starts the iterator of an
    epoch twice, and of one that it resumes once. Of P processes each takes every P-th sample, and some repeat one of
    the first so that all have the same number: together their batches are those of one process. A sample that would be
    a last batch of its own is left out, another one in every epoch.
    """

    def __init__(self, samples: Dataset[Any], processes: int, process: int, seed: int, batch_size: int) -> None:
        super().__init__(samples, processes, process, seed=seed)
        # Batch normalisation has no statistics of one sample.
        self.lone = batch_size < self.num_samples and self.num_samples % batch_size == 1 < batch_size

    def __iter__(self) -> Iterator[int]:
        return itertools.islice(super().__iter__(), len(self))

    def __len__(self) -> int:
        return self.num_samples - self.lone

    def set_epoch(self, epoch: int) -> None:
        """Nothing: the seed is the epoch's own."""


def batches_of_epoch(num: int, settings: Settings, processes: int) -> int:
    """How many batches an epoch of ``num`` samples has, in each of the processes.

    Example:
        >>> batches_of_epoch(23, Settings("nyud2", "", batch_size=5), 1)
        5
    """
    own = len(Shuffled(range(num), processes, 0, 0, settings.batch_size))  # type: ignore[arg-type]
    whole = -(-own // settings.batch_size)
    return whole if settings.limit_batches is None else min(whole, settings.limit_batches)


class Batches(L.LightningDataModule):
    """The loaders; the order of an epoch depends on the seed and the epoch alone."""

    def __init__(self, train: Dataset[Any], select: Dataset[Any], collate: Any, settings: Settings) -> None:
        super().__init__()
        self.train, self.select, self.collate = train, select, collate
        self.settings = settings

    def train_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        seed, epoch, processes = self.settings.seed, self.trainer.current_epoch, self.trainer.world_size
        size, process = self.settings.batch_size, self.trainer.global_rank
        order = Shuffled(self.train, processes, process, _epoch_seed(seed, epoch), size)
        own = _epoch_seed(seed, epoch, process)
        return self._load(self.train, sampler=order, worker_init_fn=partial(_seed_worker, own))

    def val_dataloader(self) -> DataLoader[Any]:
        assert self.trainer is not None
        place = self.trainer.world_size, self.trainer.global_rank
        return self._load(self.select, sampler=DistributedSampler[Any](self.select, *place, shuffle=False))

    def _load(self, samples: Dataset[Any], **options: Any) -> DataLoader[Any]:
        s = self.settings
        return DataLoader(
            samples,
            s.batch_size,
            num_workers=_workers(s),
            collate_fn=self.collate,
            pin_memory=torch.cuda.is_available(),
            # Or else every iterator that is started would draw from the generator that crops and dropout draw from.
            generator=torch.Generator().manual_seed(s.seed),
            **options,
        )


def _workers(settings: Settings) -> int:
    """More processes than cores would take turns, with the training too."""
    return min(4, os.cpu_count() or 1) if settings.workers is None else settings.workers


def _seed_worker(seed: int, worker: int) -> None:
    L.seed_everything((seed + 7919 * (worker + 1)) % 2**32, verbose=False)


def _epoch_seed(seed: int, epoch: int, process: int = 0) -> int:
    return (1_000_003 * seed + epoch + 15_485_863 * process) % 2**32
