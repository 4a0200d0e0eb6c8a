"""One run: a method and a seed trained to the end, with checkpoints that a killed run goes on from."""

import contextlib
import json
import logging
import os
import reprlib
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.warnings import PossibleUserWarning
from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.utilities import rank_zero_only

from ..data.catalogue import DATA_SETS
from ..errors import CommandError
from ..files import alone_in, write_atomically
from ..models.divergence import weights_not_finite
from ..models.feature_heads import Scaled
from ..models.learners import Learner
from ..models.text_encoders import WordNumbers
from ..processes import launched, most_devices, one_thread, together
from . import feature_rows, paired_batches, text_batches
from .checkpoints import (
    BEST,
    LAST,
    AtomicCheckpoints,
    KeptCheckpoint,
    callback_state,
    check_checkpoint,
    read_checkpoint,
)
from .lightning_module import ACCURACY, Batches, TrainingModule, batches_of_epoch
from .networks import build_learner
from .settings import FILE, Settings, differences, load_run, write_settings
from .training_data import TrainingData, fingerprint

FINISHED = "finished.json"
Load = Callable[[Settings], TrainingData]


class Finished(NamedTuple):
    """What a run came to."""

    accuracy: float
    """The best on the selection samples."""
    epochs: int
    faults: int
    """Rows of training data that were skipped."""


def train_run(
    settings: Settings,
    folder: Path,
    resume: bool = False,
    say: Callable[[str], object] = lambda _: None,
    load: Load | None = None,
) -> Finished:
    """Train ``settings.method`` with ``settings.seed`` into ``folder``.

    Args:
        settings: of the run, saved with it.
        folder: for settings.yaml, best.ckpt, last.ckpt, finished.json and TensorBoard's files.
        resume: go on from what is there, to the same numbers as without a stop (on CPUs, with as many processes).
        say: told where images are kept, and why nothing is trained, where nothing is.
        load: of the data, of runs on frozen encoders, whose features it finds.

    Raises:
        CommandError: a run is there already and ``resume`` is False, or was made with other settings or data; another
            process trains it; its files cannot be used; the training diverges.
        DataError: data that cannot be used.
        ValueError: frozen encoders, and no ``load``.
    """
    if settings.frozen and load is None:
        raise ValueError("load must be given for frozen encoders, as train_frozen does")
    folder.mkdir(parents=True, exist_ok=True)
    # Of several processes that train together, the first writes, and so is the one that must be alone.
    with alone_in(folder) if is_first_process() else contextlib.nullcontext():
        return _train_alone(settings, folder, resume, say, load)


def _train_alone(
    settings: Settings, folder: Path, resume: bool, say: Callable[[str], object], load: Load | None
) -> Finished:
    last = folder / LAST
    if (folder / FILE).exists():
        # Of several processes, the first looks before it writes them, and may have by the time that the others do.
        if not resume and is_first_process():
            raise CommandError(f"{folder} holds a run: go on with it by --resume, or give another --output")
        different = differences(settings, load_run(folder)) if resume else []
        if different:
            raise CommandError(f"--resume: {folder} was made with {'; '.join(different)}")
    state = read_checkpoint(last) if resume and last.exists() else None
    over = _why_over(state, settings) if state is not None else None
    if resume and (folder / FINISHED).exists():
        finished = read_finished(folder)
        if state is None:
            over = f"it has finished after {finished.epochs} epochs, and {LAST} to go on from is gone"
        if over is not None:
            say(f"{folder}: nothing to train: {over}")
            return finished
    if state is not None:
        check_checkpoint(state, last, resume=True)
    quieten()
    L.seed_everything(settings.seed, verbose=False)
    data = loader_of(settings.data_set).load_training(settings, say) if load is None else load(settings)
    if state is not None and data.encoders and state.get("encoders") != data.encoders:
        raise CommandError(
            f"--resume: {folder} was trained on what other encoders see: the weights of {settings.image_encoder} "
            "(--weights) or those of the text encoder are no longer what they were; give another --output"
        )
    if state is not None and state["fingerprint"] != data.fingerprint:
        raise CommandError(
            f"--resume: {settings.data_root} does not hold the samples that {folder} was trained on, or not in their "
            "order, so that histories and the best accuracy would be of others; give another --output"
        )
    if is_first_process():
        write_settings(folder / FILE, settings)
        (folder / FINISHED).unlink(missing_ok=True)
    if over is None:
        state = _fit(settings, folder, data, state)
    else:
        say(f"{folder}: nothing to train: {over}")
    assert state is not None
    # The figure of the weights that are there, not of what one of the callbacks remembers.
    accuracy = read_checkpoint(folder / BEST, resume=True)["accuracy"]
    finished = Finished(accuracy, state["epoch"] + 1, data.faults)
    if is_first_process():
        text = json.dumps(finished._asdict(), indent=1) + "\n"
        write_atomically(folder / FINISHED, lambda file: file.write(text.encode()))
    return finished


def _fit(settings: Settings, folder: Path, data: TrainingData, state: dict[str, Any] | None) -> dict[str, Any]:
    """Train, from the state of ``last.ckpt`` on where there is one, and give back that of the end."""
    num_classes, last = len(data.classes), folder / LAST
    stopping = EarlyStopping(ACCURACY, mode="max", patience=settings.patience, check_on_train_epoch_end=True)
    trainer = make_trainer(settings, folder, stopping)
    batches_each = batches_of_epoch(len(data.train), settings, trainer.world_size)  # type: ignore[arg-type]
    learner = build_learner(
        settings, num_classes, data.num_samples, data.numbering, widths=data.widths, epoch_batches=batches_each
    )
    if isinstance(learner, Scaled) and data.features is not None:
        learner.fit(data.features)
    digests = {"fingerprint": data.fingerprint, "names": _names(data.classes, data.numbering)}
    digests |= {"encoders": data.encoders} if data.encoders else {}
    module = TrainingModule(learner, settings, num_classes, data.num_samples, digests, data.widths)
    collate = feature_rows.collate if settings.frozen else loader_of(settings.data_set).collate
    batches = Batches(data.train, data.select, collate, settings)
    try:
        with together(trainer.world_size), one_thread() if settings.frozen else contextlib.nullcontext():
            trainer.fit(module, batches, ckpt_path=str(last) if state is not None else None)
    except SystemExit:  # what Lightning makes of an interrupt, without a word
        if not trainer.interrupted:
            raise
    except (CommandError, OSError):
        raise
    except Exception as error:
        if state is None or module.started:
            raise
        # Whatever Lightning and PyTorch make of a state that is none of theirs.
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise CommandError(f"--resume: {last}: cannot be gone on from ({reason})") from error
    if trainer.interrupted:
        raise KeyboardInterrupt
    return read_checkpoint(last, resume=True)


def _names(classes: Sequence[str], numbering: Any) -> str:
    """A digest of what each class' number stands for, and each word's, where no tokenizer of its own has them."""
    return fingerprint(classes, numbering.vocabulary.words if isinstance(numbering, WordNumbers) else ())


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
    kind, single = accelerator_of(settings)
    if single is not None and devices != "1":
        raise CommandError(f"--devices: must be 1 with the one device {settings.device}, got {devices!r}")
    if kind == "auto" and not torch.backends.mps.is_available():
        kind = "gpu" if torch.cuda.is_available() else "cpu"
    if kind not in ("cpu", "gpu", "cuda") or devices == "auto" or (kind != "cpu" and number is None):
        return  # Lightning knows of more devices, and of more ways to name them.
    most = most_devices("cpu" if kind == "cpu" else "cuda")
    if kind != "cpu" and (single or 0) >= most:
        raise CommandError(f"--device: there is no {settings.device} here, GPUs: {most}")
    if number is None or not 1 <= number <= (most if there is None else there):
        raise CommandError(f"--devices: must be from 1 to the {most} there are here ({kind}), got {devices!r}")


def accelerator_of(settings: Settings) -> tuple[str, int | None]:
    """Lightning's accelerator, and the one device of it where ``settings.device`` names one.

    Raises:
        CommandError: there is no such accelerator, or the number is none.
    """
    kind, colon, number = settings.device.partition(":")
    known = ("auto", "gpu", *AcceleratorRegistry.available_accelerators())
    if kind not in known or (colon and not number.isdecimal()):
        raise CommandError(
            f"--device: must be one of {', '.join(known)}, or one and a number, such as cuda:1, got {settings.device!r}"
        )
    return kind, int(number) if colon else None


def loader_of(data_set: str) -> Any:
    """The module that makes the set's samples and batches: ``load_training``, ``load_test`` and ``collate``."""
    return paired_batches if DATA_SETS[data_set].paired else text_batches


def make_trainer(settings: Settings, folder: Path, stopping: EarlyStopping) -> L.Trainer:
    """Lightning's trainer: the best weights, the last state after every epoch, early stopping, TensorBoard."""
    options: dict[str, Any] = {"dirpath": folder, "enable_version_counter": False, "save_on_train_epoch_end": True}
    best = KeptCheckpoint(filename="best", monitor=ACCURACY, mode="max", save_weights_only=True, **options)
    last = KeptCheckpoint(filename="last", save_top_k=1, **options)
    accelerator, single = accelerator_of(settings)
    devices: Any = int(settings.devices) if settings.devices.lstrip("-").isdigit() else settings.devices
    # What is frozen at first has no gradients for the other processes to wait for.
    strategy = (
        "ddp_find_unused_parameters_true" if settings.freeze and settings.strategy == "ddp" else settings.strategy
    )
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=devices if single is None else [single],
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


def _why_over(state: dict[str, Any], settings: Settings) -> str | None:
    """Why the run behind a checkpoint has no epoch left to train; None where it has."""
    epochs, waited = state["epoch"] + 1, callback_state(state, "EarlyStopping").get("wait_count")
    if type(waited) is int and waited >= settings.patience:
        return f"it stopped after {waited} epochs without a better one (--patience), {epochs} in all"
    if epochs >= settings.epochs:
        return f"it has trained {epochs} epochs, and --epochs is {settings.epochs}"
    return None


def read_finished(folder: Path) -> Finished:
    """What ``finished.json`` says.

    Raises:
        CommandError: it cannot be read.
    """
    try:
        finished = Finished(**json.loads((folder / FINISHED).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise CommandError(f"{folder / FINISHED}: cannot be read ({error})") from error
    accuracy, *counts = finished
    if type(accuracy) not in (int, float) or not 0 <= accuracy <= 1:
        raise CommandError(f"{folder / FINISHED}: accuracy must be from 0 to 1, got {reprlib.repr(accuracy)}")
    if any(type(count) is not int or not 0 <= count < 2**31 for count in counts):
        raise CommandError(f"{folder / FINISHED}: epochs and faults must be counts, got {reprlib.repr(counts)}")
    return finished


def load_learner(folder: Path, data_root: Path | None = None) -> tuple[Settings, Learner, Any]:
    """A trained run: its settings, the method with its best weights, and for texts how they become numbers.

    Args:
        folder: of the run.
        data_root: where the data lie now, where not where they lay; the settings then say so too.

    Raises:
        CommandError: no such run, or weights that do not fit, are not finite, or are of other classes or words than the
            data's.
        DataError: data that cannot be used.
    """
    settings = load_run(folder)
    if data_root is not None:
        settings = replace(settings, data_root=str(data_root))
    state = read_checkpoint(folder / BEST)
    weights = {key.removeprefix("learner."): x for key, x in state["state_dict"].items() if key.startswith("learner.")}
    with_words = not DATA_SETS[settings.data_set].paired and not settings.frozen
    numbering = text_batches.load_texts_numbering(settings) if with_words else None
    names = _names(loader_of(settings.data_set).load_classes(settings), numbering)
    if state.get("names", names) != names:
        raise CommandError(
            f"{folder} was trained on other classes, or other words, than {settings.data_root} has: numbers would be "
            "taken for those of others"
        )
    sizes = state["sizes"]["num_classes"], state["sizes"]["num_samples"]
    widths = _widths(state, folder / BEST) if settings.frozen else None
    try:
        learner = build_learner(settings, *sizes, numbering, pretrained=False, widths=widths)
        learner.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CommandError(
            f"{folder / BEST}: does not fit its settings or data, or is of another version ({reason})"
        ) from error
    broken = weights_not_finite(learner)
    if broken:
        raise CommandError(
            f"{folder / BEST}: weights are not finite: {broken}; the training has diverged: train anew, with a smaller "
            "learning rate say"
        )
    return settings, learner.eval(), numbering


def _widths(state: dict[str, Any], path: Path) -> dict[str, int]:
    """How many features each modality has, as a run on frozen encoders has saved it."""
    widths = state["sizes"].get("widths")
    if not (isinstance(widths, dict) and widths and all(type(x) is int and 1 <= x < 2**24 for x in widths.values())):
        raise CommandError(f"{path}: widths must be those of each modality's features, got {reprlib.repr(widths)}")
    return widths


def quieten() -> None:
    """Leave Lightning's advice and banners out: what matters is said by the command. Its warnings of anything else, of
    a state that it does not restore above all, are shown.
    """
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.getLogger("lightning.fabric").setLevel(logging.WARNING)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    warnings.filterwarnings("ignore", category=PossibleUserWarning)
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"lightning\..*")
    warnings.filterwarnings("ignore", r"Checkpoint directory .* exists and is not empty")
