"""Where a command writes, tried before it works for hours; and what the disk refuses, in one line."""

import contextlib
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import typer

from ..errors import CommandError


def prepare_output(folder: Path, argument: str = "--output") -> None:
    """Create the folder, which was given as ``argument``, and try to write to it.

    Raises:
        typer.BadParameter: it is a file, or cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        reason = "it is not a folder" if folder.is_file() else error.strerror or str(error)
        raise typer.BadParameter(
            f"{str(folder)!r} cannot be written to: {reason}", param_hint=f"'{argument}'"
        ) from error


@contextlib.contextmanager
def disk_errors() -> Iterator[None]:
    """Errors of the system (a full disk, a folder that may only be read) as ``CommandError``."""
    # TensorBoard writes in a thread. What ends that is raised again here at the next write, and said once.
    before = threading.excepthook
    threading.excepthook = lambda args: None if issubclass(args.exc_type, OSError) else before(args)
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        time.sleep(0.1)  # for the thread to end, whose last words would come behind ours
        raise CommandError(f"{error.filename or 'output'}: {error.strerror or error}") from error
    finally:
        threading.excepthook = before
