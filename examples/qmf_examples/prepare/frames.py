"""Converting many frames to PNGs: in parallel, restartable, each file there whole or not at all."""

import contextlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import TYPE_CHECKING

from ..data.catalogue import UNFINISHED_FILE
from ..data.decoding import too_large_resized
from ..data.faults import DataError, Fault
from ..files import held, write_atomically

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SETTINGS_FILE = "prepared.json"
LOCK_FILE = "prepared.json.lock"
_CHUNK = 4


@dataclass(frozen=True)
class Frame:
    """One frame to convert: where it comes from, in the converter's own terms, and its file under the output folder."""

    source: str
    target: str


@dataclass
class Outcome:
    """What a run did: frames written now, found finished from an earlier run, and left out with the reason."""

    written: int = 0
    finished: int = 0
    faults: list[Fault] = field(default_factory=list)


Converter = Callable[[str], "tuple[NDArray[np.uint8], NDArray[np.uint8]]"]
"""From a frame's source to its RGB and its depth image, uint8 ``[H, W, 3]``; raises ``DataError`` for a broken frame.
It goes to other processes, so it must be a function at a module's level or a ``partial`` of one."""


def prepare_frames(
    frames: Sequence[Frame],
    convert: Converter,
    out: Path,
    settings: dict[str, object],
    *,
    size: int = 256,
    workers: int | None = None,
    done: Callable[[], object] = lambda: None,
) -> Outcome:
    """Write one PNG per frame, RGB left and depth right; what an earlier run finished stays as it is.

    A broken frame is left out and told in the outcome. A file appears under its name once it is complete, so a run
    killed at any moment leaves finished frames, ``UNFINISHED_FILE``, by which readers know that the others are to come,
    and, at worst, ``.part`` files, which the next run removes. Of two runs at the same time onto the same folder, the
    second is refused.

    Args:
        frames: with distinct targets.
        convert: see ``Converter``.
        out: the folder; created.
        settings: what the frames are made with; a folder made with others is refused.
        size: of each half, in pixels to each side; 0 keeps the frame's own.
        workers: processes; as many as cores where None.
        done: called after each frame.

    Raises:
        DataError: a folder made with other settings, or that cannot be written to; a worker that was killed.
        CommandError: another run is writing to the folder.
    """
    with _write_errors(out):
        out.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with _write_errors(out):
            busy = f"{out}: another run of prepare is writing there; wait for it, or choose another --out"
            stack.enter_context(held(out / LOCK_FILE, busy))
            _claim(out, {**settings, "size": size})
            for part in out.rglob("*.part"):
                part.unlink(missing_ok=True)
            todo = [frame for frame in frames if not (out / frame.target).exists()]
            if todo:
                (out / UNFINISHED_FILE).touch()
        outcome = Outcome(finished=len(frames) - len(todo))
        for _ in range(outcome.finished):
            done()
        job = partial(_convert_and_write, convert, out, size)
        for fault in _run(job, todo, workers if workers is not None else os.cpu_count() or 1):
            if fault is None:
                outcome.written += 1
            else:
                outcome.faults.append(fault)
            done()
        with _write_errors(out):
            (out / UNFINISHED_FILE).unlink(missing_ok=True)
    outcome.faults.sort(key=lambda fault: fault.file)
    return outcome


def _claim(out: Path, settings: dict[str, object]) -> None:
    file = out / SETTINGS_FILE
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if file.exists():
        theirs = file.read_text(encoding="utf-8", errors="replace")
        if theirs != text:
            raise DataError(
                f"{out} was prepared with other settings ({' '.join(theirs.split())}); choose another --out"
            )
    elif any(not path.name.startswith(SETTINGS_FILE) for path in out.iterdir()):
        raise DataError(f"{out} holds other files; choose an empty or a new --out")
    else:
        write_atomically(file, lambda handle: handle.write(text.encode()))


def _run(job: Callable[[Frame], Fault | None], todo: Sequence[Frame], workers: int) -> Iterator[Fault | None]:
    if workers <= 1 or len(todo) <= 1:
        yield from map(job, todo)
        return
    # Fresh processes: forked ones would copy whatever threads and locks the caller's libraries hold.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(todo)), mp_context=context, initializer=_obey_parent)
    try:
        chunks = [todo[start : start + _CHUNK] for start in range(0, len(todo), _CHUNK)]
        for future in as_completed([pool.submit(_each, job, chunk) for chunk in chunks]):
            yield from future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a worker was killed, out of memory perhaps; run again to go on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _each(job: Callable[[Frame], Fault | None], chunk: Sequence[Frame]) -> list[Fault | None]:
    return [job(frame) for frame in chunk]


def _obey_parent() -> None:
    """Leave interrupts to the parent; and end with it: a worker whose parent was killed would wait for ever."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    if parent is not None:
        sentinel = parent.sentinel

        def watch() -> None:
            wait([sentinel])
            os._exit(1)

        threading.Thread(target=watch, daemon=True).start()


def _convert_and_write(convert: Converter, out: Path, size: int, frame: Frame) -> Fault | None:
    import numpy as np
    from PIL import Image

    try:
        halves = [Image.fromarray(half) for half in convert(frame.source)]
    except DataError as error:
        return Fault(frame.source, str(error))
    if halves[0].size != halves[1].size:
        return Fault(frame.source, f"RGB is {halves[0].size} and depth {halves[1].size}, width by height")
    if size:
        reason = too_large_resized(halves[0].size, (size, size))
        if reason:
            return Fault(frame.source, reason)
        halves = [half.resize((size, size), Image.Resampling.BICUBIC) for half in halves]
    pair = Image.fromarray(np.concatenate([np.asarray(half) for half in halves], axis=1))
    path = out / frame.target
    with _write_errors(out):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: pair.save(file, format="PNG"))
    return None


@contextlib.contextmanager
def _write_errors(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(f"cannot write to {out}: {error.strerror or error}") from error
