"""Time the objective (Eq. 18) against the released formulation: ``python -m qmf_examples.benchmarks.objective``.

A step is what a training loop pays for: ``QMFLoss`` with its checks, fusion, every cross-entropy, the ranking and the
trajectory's update, and the backward to the logits. Ours eager, ours under ``torch.compile`` (``--compile``) and the
released formulation in eager PyTorch take turns in one process; the table shows medians and how many times as long the
released one takes. It stands with the examples, as it times ``qmf_fusion``, of which ``qmf_kernels`` knows nothing.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from qmf_fusion import QMFLoss, QualityAwareFusion

from ..files import write_results_file

# M, B, K, N: MVSA, NYUD2, SUN RGB-D and FOOD101 with the released batch sizes, six views, and a large one.
SHAPES = (
    (2, 32, 3, 1555),
    (2, 256, 10, 795),
    (2, 128, 19, 4845),
    (2, 32, 101, 60101),
    (6, 200, 10, 1600),
    (3, 1024, 1000, 100_000),
)
_WARM_UP = 5

Shape = tuple[int, int, int, int]


def time_shape(shape: Shape, repeats: int, compiled: bool) -> dict[str, float]:
    """Median seconds per step of each contender, by name."""
    from qmf_kernels.benchmarks.released import LossHistory, released_objective

    num, batch, classes, samples = shape
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(batch, classes, generator=generator).requires_grad_() for _ in range(num)]
    target = torch.randint(classes, (batch,), generator=generator)
    histories = [LossHistory(samples) for _ in range(num)]

    def criterion() -> QMFLoss:
        loss = QMFLoss(QualityAwareFusion(num), samples)
        past = torch.stack([torch.from_numpy(history.sums) for history in histories])
        loss.ranking.trajectory.record(past, torch.arange(samples))
        return loss

    eager = criterion()
    steps: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "released": lambda index: released_objective(logits, target, index, histories),
        "eager": lambda index: eager(logits, target, index).loss,
    }
    if compiled:
        graph = torch.compile(criterion(), fullgraph=True)
        steps["compiled"] = lambda index: graph(logits, target, index).loss

    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(_WARM_UP + repeats):
        for name, step in steps.items():
            index = torch.randperm(samples, generator=generator)[:batch]
            start = time.perf_counter()
            torch.autograd.backward(step(index))
            elapsed = time.perf_counter() - start
            for x in logits:
                x.grad = None
            if repeat >= _WARM_UP:
                seconds[name].append(elapsed)
    return {name: statistics.median(times) for name, times in seconds.items()}


def environment() -> dict[str, Any]:
    return {"torch": torch.__version__, "threads": torch.get_num_threads(), "cpu": _cpu()}


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _shape(text: str) -> Shape:
    try:
        m, b, k, n = (int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be M,B,K,N, got {text!r}") from None
    if min(m, b, k) < 1 or n < b:
        raise argparse.ArgumentTypeError(f"must be M,B,K,N of at least 1, N at least B, got {text!r}")
    return m, b, k, n


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; see ``--help``."""
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.benchmarks.objective", description=__doc__)
    parser.add_argument("--shapes", nargs="+", type=_shape, default=SHAPES, metavar="M,B,K,N")
    parser.add_argument("--repeats", type=_positive, default=60, help="timed steps per contender and shape")
    parser.add_argument("--threads", type=_positive, help="PyTorch's threads; default: as they are")
    parser.add_argument("--compile", action="store_true", help="time ours under torch.compile too")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there as well")
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)

    where = environment()
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    columns = ["released", "eager", "ratio", *(["compiled", "ratio"] if options.compile else [])]
    print(f"{'M,B,K,N':>20}" + "".join(f"{column:>12}" for column in columns))
    rows = []
    for shape in options.shapes:
        seconds = time_shape(shape, options.repeats, options.compile)
        ratios = {name: seconds["released"] / value for name, value in seconds.items() if name != "released"}
        cells = [f"{seconds['released'] * 1e6:9.0f} us"]
        for name, ratio in ratios.items():
            cells += [f"{seconds[name] * 1e6:9.0f} us", f"x{ratio:.2f}"]
        print(f"{','.join(map(str, shape)):>20}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        rows.append({"shape": list(shape), "seconds": seconds, "ratios": ratios})
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_results_file(options.json, "objective", {"environment": where, "repeats": options.repeats, "rows": rows})


if __name__ == "__main__":
    main()
