"""Reading every image once, in threads, before anything depends on it."""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from .decoding import check_image
from .faults import DataError, file_inside


def check_images(
    root: Path,
    names: Sequence[str],
    refuse: Callable[[tuple[int, int]], str | None] = lambda size: None,
    done: Callable[[], object] = lambda: None,
) -> list[tuple[int, int] | str]:
    """Of each file under ``root``, its width and height, or why it cannot be used.

    Decoding leaves Python's lock, so threads share the work over the cores.

    Args:
        root: the data folder.
        names: relative to it.
        refuse: says from the size why an image that can be read will not do.
        done: called after each, to show progress.
    """

    def check(name: str) -> tuple[int, int] | str:
        try:
            size = check_image(file_inside(root, name))
            return refuse(size) or size
        except DataError as error:
            return str(error)
        finally:
            done()

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        return list(pool.map(check, names))
