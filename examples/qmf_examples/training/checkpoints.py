"""A run's checkpoints: written whole or not at all, read without running what they hold, and wherever they lie."""

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import TorchCheckpointIO
from torch import Tensor

from ..errors import CommandError
from ..files import save_checkpoint
from ..models.divergence import shortened
from .settings import brief

BEST, LAST = "best.ckpt", "last.ckpt"
_ALWAYS = {"state_dict": Mapping, "epoch": int, "sizes": dict}
_RESUMED = {**_ALWAYS, "accuracy": float, "fingerprint": str, "names": str}
"""What there must be in a checkpoint of a run to test it, and to go on from it, of what is read here."""
MOST = 2**53
"""A whole number above that counts nothing here."""


class AtomicCheckpoints(TorchCheckpointIO):
    """Lightning's checkpoints, whole or not there at all, and read without running what they hold."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        save_checkpoint(Path(path), checkpoint)

    def load_checkpoint(self, path: Any, map_location: Any = "cpu", weights_only: Any = True) -> dict[str, Any]:
        return read_checkpoint(Path(path))


class KeptCheckpoint(ModelCheckpoint):
    """Lightning's callback for the one file ``filename`` in the run's folder, wherever that lies now.

    Lightning knows its files by absolute paths, and where the folder has another name forgets how good the best was:
    the next epoch would replace it, however bad. Here, a resumed run asks the file itself.
    """

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert self.dirpath is not None
        path = os.path.join(self.dirpath, f"{self.filename}{self.FILE_EXTENSION}")
        here: dict[str, Any] = {"dirpath": self.dirpath, "best_model_path": path, "last_model_path": ""}
        if self.monitor is not None:
            score = torch.tensor(read_checkpoint(Path(path), resume=True)["accuracy"])
            here |= {"kth_best_model_path": path, "kth_value": score, "best_k_models": {path: score}}
            here |= {"best_model_score": score}
        super().load_state_dict({**state_dict, **here})


def read_checkpoint(path: Path, resume: bool = False) -> dict[str, Any]:
    """A checkpoint's tensors and plain values; nothing in it is executed.

    Args:
        path: of the file.
        resume: see ``check_checkpoint``.

    Raises:
        CommandError: none is there, it cannot be read so, or it is none of a run's.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise CommandError(f"no checkpoint {path}") from error
    except pickle.UnpicklingError as error:  # which PyTorch advises to load with all that it may execute
        raise CommandError(
            f"{path}: cannot be read as a checkpoint (it holds more than tensors, or is damaged)"
        ) from error
    except Exception as error:  # whatever a damaged zip makes torch.load raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"{path}: cannot be read as a checkpoint ({reason})") from error
    return check_checkpoint(content, path, resume)


def check_checkpoint(content: Any, path: Path, resume: bool = False) -> dict[str, Any]:
    """What was read from ``path``, if it is a run's.

    Args:
        content: of the file.
        path: of the file.
        resume: whether to go on from it, for which there must be more in it than for testing.

    Raises:
        CommandError: it is none.
    """
    content = content if isinstance(content, dict) else {}
    wrong = [n for n, kind in (_RESUMED if resume else _ALWAYS).items() if not isinstance(content.get(n), kind)]
    if wrong:
        raise CommandError(f"{path}: not a checkpoint of a training run of this version ({shortened(wrong)})")
    if not all(isinstance(name, str) and isinstance(x, Tensor) for name, x in content["state_dict"].items()):
        raise CommandError(f"{path}: its state_dict must hold tensors by name")
    counts = {"epoch": content["epoch"] + 1, **content["sizes"]}
    for name in ("epoch", "num_classes", "num_samples"):
        if type(counts.get(name)) is not int or not 1 <= counts[name] < 2**31:
            raise CommandError(f"{path}: {name} must be a count")
    return content


def callback_state(state: Mapping[str, Any], callback: str) -> dict[str, Any]:
    """What the callback of that name has saved; empty where nothing was."""
    callbacks = state.get("callbacks")
    saved = [x for key, x in callbacks.items() if str(key).startswith(callback)] if isinstance(callbacks, dict) else []
    return saved[0] if saved and isinstance(saved[0], dict) else {}


def unlike(found: Any, expected: Any, where: str = "") -> str | None:
    """Where plain values and tensors differ from others in names, kinds or shapes, in words; None where they do not.

    What is None among the others may be anything, and a whole number will do for any number.

    Example:
        >>> unlike({"step": "three", "lr": [0.1]}, {"step": 3, "lr": [0.5]}, "optimizer")
        "optimizer.step must be of type int like 3, got 'three'"
    """
    if expected is None:
        return None
    made: list[tuple[Any, Any, str]] = []
    fits = type(found) is type(expected)
    if isinstance(expected, Mapping) and fits:
        missing = [str(name) for name in expected if name not in found]
        if missing:
            return f"{where} lacks {shortened(missing)}"
        made = [(found[name], value, f"{where}.{name}") for name, value in expected.items()]
    elif isinstance(expected, list | tuple) and fits:
        if len(found) != len(expected):
            return f"{where} must have {len(expected)} entries, got {len(found)}"
        made = [(f, x, f"{where}[{n}]") for n, (f, x) in enumerate(zip(found, expected, strict=True))]
    elif isinstance(expected, Tensor) and fits:
        if found.shape != expected.shape:
            return f"{where} must have the shape {[*expected.shape]}, got {[*found.shape]}"
    elif type(expected) is float:
        fits = fits or (type(found) is int and abs(found) < MOST)
    elif type(expected) is int and fits:
        fits = 0 <= found < MOST
    if not fits:
        return f"{where} must be of type {type(expected).__name__} like {brief(expected)}, got {brief(found)}"
    return next((reason for reason in (unlike(*each) for each in made) if reason), None)
