"""Several processes for one job: how many can be had, how they start and find each other, and what if one is lost."""

import contextlib
import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.multiprocessing.spawn import ProcessExitedException, start_processes

from .errors import CommandError

RESUME = "run it again with --resume to go on from what was finished"


def launched() -> int | None:
    """How many processes torchrun has started, of which this is one; None where it has not."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def most_devices(device: str) -> int:
    """Up to how many devices of a kind there are here, for one process each: cores of the CPU, or GPUs."""
    if device == "cuda":
        return torch.cuda.device_count()
    # Two at least, so that it can be tried everywhere.
    return max(2, os.cpu_count() or 1)


def place() -> tuple[int, int]:
    """This process' number in its group, and how many there are; (0, 1) where there is no group."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def sum_of_all(x: Tensor) -> Tensor:
    """The sum of ``x`` over the processes of the group; ``x`` itself where there is none."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def run_in_processes(number: int, device: str, work: Callable[..., Any], *arguments: Any) -> None:
    """Call ``work(*arguments)`` in ``number`` processes that form the default group of ``torch.distributed``.

    They are those that torchrun has started, or else new ones, which end when one of them fails. The group uses NCCL
    for ``device`` ``"cuda"``, where each process has a GPU of its own, and Gloo otherwise.

    Raises:
        CommandError: one of them raised one, or was killed.
    """
    if launched() is not None:
        _join(int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"]), number, device, "env://", work, arguments)
        return
    with tempfile.TemporaryDirectory() as folder:
        meeting = (Path(folder) / "processes").as_uri()
        said = mp.get_context("spawn").SimpleQueue()
        group = start_processes(
            _work, (number, device, meeting, said, work, arguments), number, join=False, start_method="spawn"
        )
        assert group is not None
        try:
            while not group.join(grace_period=10):
                pass
        except ProcessExitedException as error:
            killed = [i for i, process in enumerate(group.processes) if process.exitcode == -signal.SIGKILL]
            if killed:
                raise CommandError(f"process {killed[0]} of {number} was killed: {RESUME}") from error
            raise CommandError(str(error) if said.empty() else said.get()) from error


def _work(
    rank: int, number: int, device: str, meeting: str, said: Any, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    try:
        _join(rank, rank, number, device, meeting, work, arguments)
    except CommandError as error:
        said.put(str(error))
        raise SystemExit(1) from error


def _join(
    rank: int, local_rank: int, number: int, device: str, meeting: str, work: Callable[..., Any], arguments: Any
) -> None:
    if device == "cuda":
        torch.cuda.set_device(local_rank)
    backend = "nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=meeting, rank=rank, world_size=number)
    try:
        with together(number):
            work(*arguments)
            dist.barrier()  # so that none leaves while others still talk
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def together(number: int) -> Iterator[None]:
    """Around work of ``number`` processes of a group, whose collectives fail where another of them has ended.

    Raises:
        CommandError: in place of such an error.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error)
        if number == 1 or not (isinstance(error, dist.DistError) or "gloo" in reason or "NCCL" in reason):
            raise
        raise CommandError(
            f"another of the {number} processes was lost ({reason.splitlines()[0]}): {RESUME}"
        ) from error
    finally:
        if number > 1:
            # A DistributedDataParallel refers to itself and so outlives its use. With it lives the group, whose
            # threads then sometimes abort the interpreter when it ends.
            gc.collect()


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Small heads are not worth sharing out, and sums come out the same whatever the number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
