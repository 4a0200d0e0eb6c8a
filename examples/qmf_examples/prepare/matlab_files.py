"""MATLAB files up to version 7, read or told why not."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..data.faults import DataError


def read_mat(file: Path, variables: Sequence[str], option: str) -> dict[str, Any]:
    """The ``variables`` of ``file``, cells and structures as lists and dictionaries.

    Raises:
        DataError: it is missing, cannot be read, or lacks one of them; the message starts with the ``option``.
    """
    from scipy.io import loadmat

    try:
        with file.open("rb") as opened:
            content: dict[str, Any] = loadmat(opened, simplify_cells=True)
    except FileNotFoundError as error:
        raise DataError(f"{option}: no file {file}") from error
    except Exception as error:  # whatever a damaged file makes loadmat raise
        raise DataError(f"{option}: {file} cannot be read as a MATLAB file ({error})") from error
    for name in variables:
        if name not in content:
            raise DataError(f"{option}: {file} has no variable {name!r}")
    return {name: content[name] for name in variables}
