"""The paper's own figures: Tables 1, 2, 3, 5 and 6 of Zhang et al., ICML 2023, held in `published_results.csv`."""

import csv
from functools import cache
from importlib.resources import files
from typing import NamedTuple

from ..corruption.conditions import CERTAIN_AT, TABLES_PROTOCOL

SOURCE = "Zhang et al., Provable Dynamic Fusion for Low-Quality Multimodal Data, ICML 2023"
NAMES = {"late": "late-fusion", "image": "img", "energy": "weights-only"}
"""What the tables call our methods, where they call them otherwise; weights by energy without the ranking loss are the
row of Table 2 with dynamic weights alone."""
TABLES = {"gaussian": ("5", "1", "2"), "salt-pepper": ("6",)}
"""Where a cell is looked up: Table 5 repeats Table 1 with deviations, and has its RGB and depth rows the right way."""


class Published(NamedTuple):
    """A cell: accuracies in percent."""

    table: str
    mean: float
    std: float | None
    worst: float | None


@cache
def _cells() -> dict[tuple[str, str, str, str, float], Published]:
    text = files(__package__).joinpath("published_results.csv").read_text(encoding="utf-8")
    cells = {}
    for row in csv.DictReader(text.splitlines()):
        key = (row["table"], row["dataset"], row["method"], row["noise"], float(row["epsilon"]))
        std, worst = (float(row[name]) if row[name] else None for name in ("std", "worst"))
        cells[key] = Published(row["table"], float(row["mean"]), std, worst)
    return cells


def published_accuracy(data_set: str, method: str, noise: str, level: float) -> Published | None:
    """The paper's figure, the worst from another table where the first has none; None where there is none.

    Example:
        >>> published_accuracy("nyud2", "qmf", "gaussian", 10)
        Published(table='5', mean=55.6, std=2.09, worst=51.07)
    """
    found = [
        cell
        for table in TABLES[noise]
        if (cell := _cells().get((table, data_set, NAMES.get(method, method), noise, level))) is not None
    ]
    if not found:
        return None
    # Table 1 has RGB's and depth's worst swapped, as their means: only a row with the same mean is the same row.
    worst = next((cell.worst for cell in found if cell.worst is not None and cell.mean == found[0].mean), None)
    return found[0]._replace(worst=worst)


def not_comparable(noise: str, level: float, protocol: str) -> str | None:
    """Why the paper's figure is none to hold ours against; None where it is one.

    Example:
        >>> not_comparable("salt-pepper", 10, "released-2025")
        'under released-2025, an image that the coin has chosen gets salt and pepper with probability 0.1 instead of 1'
        >>> not_comparable("gaussian", 10, "released-2025")
    """
    if level == 0 or protocol == TABLES_PROTOCOL:
        return None
    if protocol == "clean":
        return "the clean protocol damages otherwise than the code that made the tables"
    if noise == "gaussian":
        return None
    shares = [min(1, level / CERTAIN_AT[name]) for name in (protocol, TABLES_PROTOCOL)]
    return (
        f"under {protocol}, an image that the coin has chosen gets salt and pepper with probability {shares[0]:g} "
        f"instead of {shares[1]:g}"
    )


CORRELATED = {"tmc": "evidence", "evidence": None}
"""What Table 3 calls our methods, where otherwise: its "evidence" is TMC's own uncertainty (Dempster-Shafer theory),
and not the vacuity of heads trained with cross-entropy, which is in none of the tables."""


def published_correlation(data_set: str, method: str, level: float) -> float | None:
    """Table 3's correlation of weight and loss, as printed; None where there is none.

    Example:
        >>> published_correlation("food101", "tmc", 0), published_correlation("food101", "evidence", 0)
        (0.157, None)
    """
    name = CORRELATED.get(method, method)
    cell = None if name is None else _cells().get(("3", data_set, name, "gaussian+blank", level))
    return None if cell is None else cell.mean
