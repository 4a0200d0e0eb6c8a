"""How reports are shown: a table as text, and plain values for JSON."""

import math
from typing import Any


def table(rows: list[list[str]]) -> list[str]:
    """Lines of a table whose first row is its title and whose first column is aligned to the left.

    Example:
        >>> print("\\n".join(table([["name", "value"], ["a", "1"]])))
        name  value
        -----------
        a         1
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]


def plain(value: Any) -> Any:
    """The same of dicts, lists and numbers, None for what is not finite, which JSON does not know.

    Example:
        >>> plain({"ends": (float("-inf"), 1.0)})
        {'ends': [None, 1.0]}
    """
    if isinstance(value, dict):
        return {key: plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
