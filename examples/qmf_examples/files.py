"""Files that are either there whole or not there: written beside their place, then renamed into it."""

import contextlib
import errno
import os
import secrets
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import CommandError

if TYPE_CHECKING:
    import torch


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file, and rename it to ``path`` once it is on disk.

    Every write has a temporary file of its own, so that of two processes that write the same file the last one wins
    and neither sees the other's half. A process killed at any point leaves the old file or the new one, and at worst
    a ``.part`` file, which nothing reads; a write that fails leaves none.
    """
    # Not the process id alone: machines and containers that share a folder have the same ones.
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    file = part.open("xb")
    try:
        with file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def held(path: Path, busy: str) -> Iterator[None]:
    """Hold the file ``path``, which is created and stays, against every other process that wants to hold it.

    The system lets go of it when the process ends, however it ends: a killed one leaves nothing that blocks the next.
    Where the system or the file system knows no such locks, nothing is held.

    Raises:
        CommandError: another process holds it; ``busy`` is the message.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with path.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CommandError(busy) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
        yield


def save_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """``torch.save``, atomically."""
    import torch

    write_atomically(path, lambda file: torch.save(state, file))


def load_checkpoint(path: Path, made_with: dict[str, str], device: "torch.device") -> dict[str, Any] | None:
    """The state saved at ``path``, or None where there is none; tensors and plain values alone are unpickled.

    Raises:
        CommandError: a file that cannot be read, or that was written under other settings than ``made_with``.
    """
    import torch

    if not path.exists():
        return None
    try:
        state: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        theirs: dict[str, str] = dict(state["made_with"])
    except Exception as error:  # whatever a damaged zip or pickle makes torch.load raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CommandError(f"--resume: cannot read {path} ({reason}); run without --resume to start afresh") from error
    if theirs != made_with:
        names = [name for name in {**made_with, **theirs} if made_with.get(name) != theirs.get(name)]
        was, wanted = (", ".join(f"{name} {given.get(name)}" for name in names) for given in (theirs, made_with))
        raise CommandError(
            f"--resume: {path} was made with {was}, not with {wanted}; run without --resume to start afresh"
        )
    return state
