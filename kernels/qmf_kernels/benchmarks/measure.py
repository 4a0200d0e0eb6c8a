"""Measuring steps on a device: time with and without the host's part, launches, and memory.

A step takes the number of a batch and nothing else. On a CPU the two times are one, and launches and memory are None.
"""

import functools
import gc
import json
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

Run = Callable[[int], Any]
# Cycles that a device idles for before a step, some two milliseconds: long enough for the host to queue it whole.
_HEAD_START = 4_000_000
_REPLAYS = 20


class Times(NamedTuple):
    """Seconds per step, one entry per repeat: on the device, its queue full; and until the host knows it is done."""

    device: list[float]
    host: list[float]


class Launches(NamedTuple):
    """What one step put into the device's queue."""

    kernels: int
    ours: int  # of them, those of this package
    copies: int  # and fills of memory
    names: dict[str, int]


def time_steps(runs: Mapping[str, Run], repeats: int, batches: int, device: torch.device) -> dict[str, Times | str]:
    """Let them take turns. Whoever fails has a message in place of times."""
    times: dict[str, Times | str] = {name: Times([], []) for name in runs}
    for repeat in range(repeats):
        for name, run in runs.items():
            found = times[name]
            if isinstance(found, str):
                continue
            try:
                found.host.append(_host_seconds(run, repeat % batches, device))
                found.device.append(_device_seconds(run, repeat % batches) if device.type == "cuda" else found.host[-1])
            except Exception as error:  # one contender's failure is a result, not the end
                times[name] = describe(error)
                release(device)
    return times


def _host_seconds(run: Run, batch: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    run(batch)
    synchronize(device)
    return time.perf_counter() - start


def _device_seconds(run: Run, batch: int, times: int = 1) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(_HEAD_START)
    start.record()
    for _ in range(times):
        run(batch)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3 / times


def count_launches(run: Run, own: frozenset[str], device: torch.device) -> Launches | None:
    """By the profiler; names of Triton kernels are their functions'."""
    if device.type != "cuda":
        return None
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=activities) as profile:
        run(0)
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        return sort_launches(json.loads(path.read_text())["traceEvents"], own)


def sort_launches(events: list[dict[str, Any]], own: frozenset[str]) -> Launches:
    """Of a trace in Chrome's format, what ran on the device."""
    kernels = Counter(event["name"] for event in events if event.get("cat") == "kernel")
    copies = sum(event.get("cat") in ("gpu_memcpy", "gpu_memset") for event in events)
    ours = sum(count for name, count in kernels.items() if name in own)
    return Launches(kernels.total(), ours, copies, dict(kernels))


def peak_memory(run: Run, device: torch.device, before: int) -> int | None:
    """The most bytes in use at any time of a step, above the ``before`` bytes that it began with and its gradients."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    _, gradients = run(0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in gradients)


def bytes_in_use(device: torch.device) -> int:
    release(device)
    return torch.cuda.memory_allocated() if device.type == "cuda" else 0


def time_replays(run: Run, repeats: int, device: torch.device) -> tuple[float, float] | None:
    """Seconds per replay of a step's CUDA graph, and of a graph of three empty launches: medians, taken in turn."""
    if device.type != "cuda":
        return None
    graphs = [capture(lambda: run(0)), capture(_three_empty_launches)]
    seconds: list[list[float]] = [[], []]
    for _ in range(repeats):
        for (graph, _), found in zip(graphs, seconds, strict=True):
            found.append(_device_seconds(functools.partial(_replay, graph), 0, _REPLAYS))
    step, empty = (float(torch.tensor(found).median()) for found in seconds)
    return step, empty


def _replay(graph: Any, _: int) -> None:
    graph.replay()


def capture(run: Callable[[], Any]) -> tuple[Any, Any]:
    """A CUDA graph of ``run()``, warmed up on a stream of its own as PyTorch asks, and what ``run`` returned."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph: Any = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = run()
    return graph, kept


def empty_kernel(pointer):  # type: ignore[no-untyped-def]
    """What a launch costs that does nothing."""
    pass  # Triton's language has no empty body


@functools.cache
def _compiled_empty() -> Any:
    import triton

    return triton.jit(empty_kernel)


def _three_empty_launches() -> Tensor:
    something = torch.empty(1, device="cuda")
    for _ in range(3):
        _compiled_empty()[(1,)](something)
    return something


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def describe(error: BaseException) -> str:
    """One line of an exception."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
