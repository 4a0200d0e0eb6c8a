"""Where a command writes, tried before it works for hours; and what the disk refuses, in one line."""

import contextlib
import tempfile
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
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise CommandError(f"{error.filename or 'output'}: {error.strerror or error}") from error
