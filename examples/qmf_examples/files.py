"""Files that are either there whole or not there: written beside their place, then renamed into it."""

import contextlib
import errno
import io
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from .errors import CommandError

if TYPE_CHECKING:
    import torch


class _Disk(io.FileIO):
    """A new file that remembers what the system refused: writers such as ``torch.save`` raise an error of their own."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = error
            raise


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a temporary file, and rename it to ``path`` once it is on disk.

    Every write has a temporary file of its own, so that of two processes that write the same file the last one wins
    and neither sees the other's half. A process killed at any point leaves the old file or the new one, and at worst
    a ``.part`` file, which nothing reads; a write that fails leaves none.

    Raises:
        OSError: what the system refused, a full disk say, with ``path`` as its file, whatever ``write`` made of it.
    """
    # Not the process id alone: machines and containers that share a folder have the same ones.
    part = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.part")
    disk = _Disk(part, "xb")
    try:
        with io.BufferedWriter(disk) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        refused = error if isinstance(error, OSError) else disk.refused
        if refused is None or not isinstance(error, Exception):
            raise
        raise OSError(refused.errno, refused.strerror or str(refused), str(path)) from error


SCHEMA = 1
"""Of every file of results: it grows when what stands in one moves, or changes its meaning."""
UNIT = "fraction"
"""Of accuracies and their differences, errors of calibration and areas under curves in every file of results: of 1, not
of 100, the published ones too. Tables and pictures show percent."""


def results_header(kind: str) -> dict[str, object]:
    """What every file of results begins with: which kind it is, and what made it."""
    import torch

    import qmf_fusion

    versions = {"qmf-fusion": qmf_fusion.__version__, "torch": torch.__version__}
    return {"schema": SCHEMA, "kind": kind, "unit": UNIT, "versions": versions}


def write_results_file(path: Path, kind: str, content: Mapping[str, object]) -> None:
    """Write ``content`` as JSON behind ``results_header(kind)``, atomically.

    Raises:
        ValueError: a number that is not finite.
    """
    text = json.dumps({**results_header(kind), **content}, indent=1, allow_nan=False) + "\n"
    write_atomically(path, lambda file: file.write(text.encode()))


_held: set[io.FileIO] = set()


def _let_go() -> None:
    """In a forked process, such as a loader's: it would hold on to the locks of a parent that was killed."""
    while _held:
        _held.pop().close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def held(path: Path, busy: str, wait: Callable[[str], object] | None = None) -> Iterator[None]:
    """Hold the file ``path``, which is created and stays, against every other process that wants to hold it.

    The system lets go of it when the process ends, however it ends: a killed one leaves nothing that blocks the next.
    Where the system or the file system knows no such locks, nothing is held.

    Args:
        path: of the file.
        busy: what is said, with which process that is, where another one holds it.
        wait: told so, before that process is waited for; None raises instead.

    Raises:
        CommandError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with io.FileIO(path, "a+") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = file.read(200).decode(errors="replace").strip()
            said = f"{busy} ({holder or 'by a process that has just begun'})"
            if wait is None:
                raise CommandError(said) from error
            wait(f"{said}: waiting for it")
            fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EBADF):
                raise
        _held.add(file)
        with contextlib.suppress(OSError):  # on a full disk the lock still holds, without a name
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%F %T')}\n".encode())
        try:
            yield
        finally:
            _held.discard(file)


def alone_in(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Hold an existing output folder against every other command that writes there; see ``held``."""
    busy = f"{folder}: another command is writing there; wait for it, or give another --output"
    return held(folder / "run.lock", busy)


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
            f"--resume: {path} was made with {was:.200}, not with {wanted:.200}; run without --resume to start afresh"
        )
    return state
