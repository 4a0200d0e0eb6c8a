"""One run: a method and a seed trained to the end, with checkpoints that a killed run goes on from."""

import json
import logging
import os
import sys
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from ..data.catalogue import DATA_SETS
from ..errors import CommandError
from ..files import save_checkpoint, write_atomically
from ..models.learners import Learner
from ..processes import launched, most_devices, together
from . import paired_batches, text_batches
from .lightning_module import ACCURACY, Batches, TrainingModule
from .networks import build_learner
from .settings import FILE, Settings, differences, load_run, write_settings
from .training_data import TrainingData

BEST, LAST, FINISHED = "best.ckpt", "last.ckpt", "finished.json"


class Finished(NamedTuple):
    """What a run came to."""

    accuracy: float
    """The best on the selection samples."""
    epochs: int
    faults: int
    """Rows of training data that were skipped."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, whole or not there at all, and read without running what they hold."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        return _load_plain(Path(path))


def read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's tensors and plain values; nothing in it is executed.

    Raises:
        CommandError: none is there, or it cannot be read so.
    """
    content = _load_plain(path)
    if not isinstance(content, dict) or "state_dict" not in content:
        raise CommandError(f"{path}: not a checkpoint of a training run")
    return content


def _load_plain(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CommandError(f"no checkpoint {path}") from error
    except Exception as error:  # whatever a damaged zip or pickle makes torch.load raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path}: cannot be read as a checkpoint ({reason})") from error


def train_run(settings: Settings, folder: Path, resume: bool = False) -> Finished:
    """Train ``settings.method`` with ``settings.seed`` into ``folder``.

    Args:
        settings: of the run, saved with it.
        folder: for settings.yaml, best.ckpt, last.ckpt, finished.json and TensorBoard's files.
        resume: go on from what is there, to the same numbers as without a stop (on CPUs, with as many processes).

    Raises:
        CommandError: a run is there already and ``resume`` is False, or was made with other settings.
        DataError: data that cannot be used.
    """
    if (folder / FILE).exists():
        # Of several processes, the first looks before it writes them, and may have by the time that the others do.
        if not resume and is_first_process():
            raise CommandError(f"{folder} holds a run: go on with it by --resume, or give another --output")
        different = differences(settings, load_run(folder)) if resume else []
        if different:
            raise CommandError(f"--resume: {folder} was made with {'; '.join(different)}")
        if (folder / FINISHED).exists():
            return read_finished(folder)
    quieten()
    L.seed_everything(settings.seed, verbose=False)
    loader = loader_of(settings.data_set)
    data: TrainingData = loader.load_training(settings)
    num_classes = len(data.classes)
    learner = build_learner(settings, num_classes, data.num_samples, data.numbering)
    folder.mkdir(parents=True, exist_ok=True)
    if is_first_process():
        write_settings(folder / FILE, settings)
    last = folder / LAST
    state = read_checkpoint(last) if resume and last.exists() else None
    stopping = EarlyStopping(ACCURACY, mode="max", patience=settings.patience, check_on_train_epoch_end=True)
    trainer = make_trainer(settings, folder, stopping)
    if state is None or not _is_over(state, settings):
        module = TrainingModule(learner, settings, num_classes, data.num_samples)
        batches = Batches(data.train, data.select, loader.collate, settings)
        try:
            with together(trainer.world_size):
                trainer.fit(module, batches, ckpt_path=str(last) if state is not None else None)
        except SystemExit:  # what Lightning makes of an interrupt, without a word
            if not trainer.interrupted:
                raise
        if trainer.interrupted:
            raise KeyboardInterrupt
        state = read_checkpoint(last)
    finished = Finished(float(_saved(state, "EarlyStopping")["best_score"]), int(state["epoch"]) + 1, data.faults)
    if trainer.is_global_zero:
        text = json.dumps(finished._asdict(), indent=1) + "\n"
        write_atomically(folder / FINISHED, lambda file: file.write(text.encode()))
    return finished


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the one that speaks and writes for all."""
    return int(rank_zero_only.rank) == 0  # type: ignore[attr-defined]


def check_machine(settings: Settings) -> None:
    """Whether there are the devices and the strategy that are asked for, before any data is read.

    Raises:
        CommandError: there are not.
    """
    if settings.strategy not in ("auto", *StrategyRegistry.available_strategies()):
        raise CommandError(f"--strategy: must be auto, ddp or another of Lightning's, got {settings.strategy!r}")
    devices, there = settings.devices, launched()
    number = int(devices) if devices.isdecimal() else None
    if there is not None and number != there:
        raise CommandError(f"--devices: torchrun has started {there} processes, got {devices!r}")
    kind = settings.accelerator
    if kind == "auto" and not torch.backends.mps.is_available():
        kind = "gpu" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "gpu", "cuda") or devices == "auto" or (kind != "cpu" and number is None):
        return  # Lightning knows of more devices, and of more ways to name them.
    most = most_devices("cpu" if kind == "cpu" else "cuda")
    if number is None or not 1 <= number <= (most if there is None else there):
        raise CommandError(f"--devices: must be from 1 to the {most} there are here ({kind}), got {devices!r}")


def loader_of(data_set: str) -> Any:
    """The module that makes the set's samples and batches: ``load_training``, ``load_test`` and ``collate``."""
    return paired_batches if DATA_SETS[data_set].paired else text_batches


def make_trainer(settings: Settings, folder: Path, stopping: EarlyStopping) -> L.Trainer:
    """Lightning's trainer: the best weights, the last state after every epoch, early stopping, TensorBoard."""
    options: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    best = ModelCheckpoint(filename="best", monitor=ACCURACY, mode="max", save_weights_only=True, **options)
    last = ModelCheckpoint(filename="last", save_top_k=1, **options)
    devices: Any = int(settings.devices) if settings.devices.lstrip("-").isdigit() else settings.devices
    # What is frozen at first has no gradients for the other processes to wait for.
    strategy = (
        "ddp_find_unused_parameters_true" if settings.freeze and settings.strategy == "ddp" else settings.strategy
    )
    try:
        return L.Trainer(
            accelerator=settings.accelerator,
            devices=devices,
            strategy=strategy,
            precision=settings.precision,  # type: ignore[arg-type]
            max_epochs=settings.epochs,
            accumulate_grad_batches=settings.accumulate,
            limit_train_batches=settings.limit_batches,
            limit_val_batches=settings.limit_batches,
            num_sanity_val_steps=0,
            # The loaders come with samplers that share out among processes as their epochs' seeds say.
            use_distributed_sampler=False,
            # A fresh loader for every epoch, whose order is drawn from the seed and the epoch.
            reload_dataloaders_every_n_epochs=1,
            callbacks=[stopping, best, last],
            plugins=[AtomicCheckpoints()],
            logger=TensorBoardLogger(folder, name="tensorboard", version=""),
            enable_progress_bar=sys.stderr.isatty(),
            enable_model_summary=False,
            log_every_n_steps=10,
        )
    except Exception as error:  # Lightning's errors for machines and precisions that are not there
        raise CommandError(f"cannot train so here: {' '.join(str(error).split())}") from error


def _is_over(state: dict[str, Any], settings: Settings) -> bool:
    """Whether the run behind a checkpoint was killed after its last epoch, before it said so."""
    return int(state["epoch"]) + 1 >= settings.epochs or _saved(state, "EarlyStopping")["wait_count"] >= (
        settings.patience
    )


def _saved(state: dict[str, Any], callback: str) -> dict[str, Any]:
    return next(saved for key, saved in state["callbacks"].items() if key.startswith(callback))


def read_finished(folder: Path) -> Finished:
    """What ``finished.json`` says.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        return Finished(**json.loads((folder / FINISHED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CommandError(f"{folder / FINISHED}: cannot be read ({error})") from error


def load_learner(folder: Path) -> tuple[Settings, Learner, Any]:
    """A trained run: its settings, the method with its best weights, and for texts how they become numbers.

    Raises:
        CommandError: no such run, or weights that do not fit.
    """
    settings = load_run(folder)
    state = read_checkpoint(folder / BEST)
    weights = {key.removeprefix("learner."): x for key, x in state["state_dict"].items() if key.startswith("learner.")}
    num_classes, num_samples = (int(state.get("sizes", {}).get(name, 1)) for name in ("num_classes", "num_samples"))
    numbering = None if DATA_SETS[settings.data_set].paired else text_batches.load_texts_numbering(settings)
    learner = build_learner(settings, num_classes, num_samples, numbering, pretrained=False)
    try:
        learner.load_state_dict(weights)
    except RuntimeError as error:
        raise CommandError(f"{folder / BEST}: does not fit its settings or data ({str(error)[:200]})") from error
    return settings, learner.eval(), numbering


def quieten() -> None:
    """Leave Lightning's advice and banners out: what matters is said by the command."""
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", module=r"lightning\..*")
