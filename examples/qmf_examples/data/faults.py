"""What is wrong with a data set, told with the file and the line; and looking up a file without trusting its name."""

import os
import re
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..errors import CommandError

NAMED = 5
"""How many faults a message names; all are counted."""
_PLAIN_NAME = re.compile(r"[^\0/\\:][^\0\\:]*")


class DataError(CommandError):
    """Ends a command with its message: what is wrong with the data, or with where it was looked for.

    ``faults`` are those that the message sums up.
    """

    faults: Sequence["Fault"] = ()

    @classmethod
    def of_faults(cls, where: Path, rows: int, faults: Sequence["Fault"]) -> "DataError":
        """Of ``rows`` rows or files, these cannot be used."""
        error = cls(f"{where}: {len(faults)} of {rows} cannot be used\n{summary(faults)}")
        error.faults = faults
        return error


@dataclass(frozen=True)
class Fault:
    """One row or file that cannot be used.

    Example:
        >>> str(Fault("train.jsonl", "no such file: images/7.jpg", line=3))
        'train.jsonl, line 3: no such file: images/7.jpg'
    """

    file: str
    reason: str
    line: int | None = None

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}: {self.reason}" if self.line else f"{self.file}: {self.reason}"


def summary(faults: Sequence[Fault]) -> str:
    """The first few faults by name, a line each, and how many more there are."""
    more = [f"... and {len(faults) - NAMED} more"] if len(faults) > NAMED else []
    return "\n".join([str(fault) for fault in faults[:NAMED]] + more)


def file_inside(root: Path, name: str) -> Path:
    """The file ``name``, relative to ``root``, that lies in ``root`` whatever links lead to it.

    Raises:
        DataError: an absolute path, one that climbs out of the folder by ``..`` or by a link, or no file.
    """
    found = _plain_file(root, name)
    if found is not None:
        return found
    if not name or "\0" in name or PurePosixPath(name).is_absolute() or PureWindowsPath(name).anchor:
        raise DataError(f"the path must be relative to the data folder, got {name!r}")
    if ".." in PurePosixPath(name.replace("\\", "/")).parts:
        raise DataError(f"the path leads out of the data folder: {name!r}")
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise DataError(f"the path leads out of the data folder by a link: {name!r}")
        if not path.exists():
            raise DataError(f"no such file: {name}")
        if not path.is_file():
            raise DataError(f"not a file: {name}")
    except (OSError, RuntimeError) as error:  # a name too long, a loop of links
        raise DataError(f"cannot look up {name!r}: {getattr(error, 'strerror', None) or error}") from error
    return path


def _plain_file(root: Path, name: str) -> Path | None:
    """The file, where no question arises: no link below ``root``, no odd name. None leaves it to a closer look, which
    would take several times as long at every image of a training.
    """
    if os.name == "nt" or not _PLAIN_NAME.fullmatch(name) or ".." in name:
        return None
    step = str(root)
    mode = 0
    try:
        for part in name.split("/"):
            step = f"{step}/{part}"
            mode = os.lstat(step).st_mode
            if stat.S_ISLNK(mode):
                return None
    except OSError:
        return None
    return Path(step) if stat.S_ISREG(mode) else None
