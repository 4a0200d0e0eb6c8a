"""Time a training step of the objective (Eq. 18) on a GPU: ``python -m qmf_kernels.benchmarks.objective``.

Ours, the released formulation, the same without its trips to the host in eager PyTorch and under ``torch.compile``, and
a copy of as many bytes take turns in one process. Each is first compared with float64 at a small size. The table shows
the median and ninth decile of a step on the device with its queue full ("device", "90 %": a step is slow in which a
sample of the batch moves the history's range), the median until the host knows that it is done ("host"), and launches,
of all kernels and of ours; below it stands which targets are met. JSON and a picture go to ``--out``.

On a CPU every case shrinks to a few rows, which shows that the benchmark runs and nothing else (with
``TRITON_INTERPRET=1``, that our kernels do).
"""

import argparse
import json
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..operators import INTERPRETED
from .contenders import BATCHES, COMPILED, COPY, OURS, Case, Problem, Step, contenders, make_problem
from .measure import (
    Launches,
    Run,
    bytes_in_use,
    count_launches,
    describe,
    peak_memory,
    release,
    time_replays,
    time_steps,
)
from .plain import reference_step
from .report import Outcome, Row, as_json, judge, make_row, table, verdict_lines

# N of the large cases is ImageNet's, of the small ones their data sets'.
CASES = (
    Case("large-bfloat16", "large", 3, 65_536, 1000, 1_281_167, torch.bfloat16),
    Case("large-float32", "large", 3, 65_536, 1000, 1_281_167, torch.float32),
    Case("nyud2", "small", 2, 256, 10, 795, torch.float32),
    Case("sunrgbd", "small", 2, 128, 19, 4845, torch.float32),
    Case("food101", "small", 2, 32, 101, 60_101, torch.float32),
    Case("mvsa", "small", 2, 32, 3, 1555, torch.float32),
    *(Case(f"growth-{m}", "growth", m, 32_768, 1000, 1_281_167, torch.float32) for m in (2, 3, 4, 6, 8)),
)
KERNELS = frozenset(f"{name}_kernel" for name in ("forward", "bookkeeping", "backward", "single", "scale"))
_WARM_UP = 3
# Errors of a check, relative to the largest value: what a formulation in the logits' own dtype may have.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}

Makers = dict[str, Callable[[Problem], Step]]


def run_case(case: Case, makers: Makers, repeats: int, device: torch.device, errors: dict[str, Any]) -> Outcome:
    """Prepare each contender in turn, then let all that work take turns."""
    problem = make_problem(case, device)
    runs: dict[str, Run] = {}
    prepared: dict[str, tuple[Launches | None, int | None]] = {}
    failed: dict[str, str] = {}
    for name, make in makers.items():
        error = errors[name]
        if isinstance(error, str):
            failed[name] = error
            continue
        try:
            step = make(problem)
            before = bytes_in_use(device)
            for batch in range(_WARM_UP):
                step.run(batch)
            peak = peak_memory(step.run, device, before)
            prepared[name] = count_launches(step.run, KERNELS, device), peak
            runs[name] = step.run
        except Exception as problem_met:  # out of memory, or a compiler's: a result, and the others go on
            failed[name] = describe(problem_met)
            release(device)
    times = time_steps(runs, repeats, BATCHES, device)
    rows: dict[str, Row] = {}
    for name in makers:
        launches, peak = prepared.get(name, (None, None))
        error = errors[name]
        found = failed[name] if name in failed else times[name]
        rows[name] = make_row(name, found, launches, peak, None if isinstance(error, str) else error)
    replay = None
    if case.kind == "small" and OURS in runs and not rows[OURS].failed:
        try:
            replay = time_replays(runs[OURS], repeats, device)
        except Exception as problem_met:
            rows[OURS] = rows[OURS]._replace(failed=f"no graph: {describe(problem_met)}")
    return Outcome(case, rows, replay)


def check(case: Case, makers: Makers, device: torch.device) -> dict[str, float | str | None]:
    """Each contender's largest error in loss, gradients and history at a small size, or what went wrong."""
    small = case._replace(batch=min(case.batch, 48), classes=min(case.classes, 37), samples=96)
    errors: dict[str, float | str | None] = {}
    for name, make in makers.items():
        if name == COPY:
            errors[name] = None
            continue
        try:
            errors[name] = check_step(make, make_problem(small, device, seed=1))
            if not errors[name] <= _TOLERANCE[case.dtype]:  # type: ignore[operator]
                errors[name] = f"wrong: its error against float64 is {errors[name]:.1e}"
        except Exception as problem_met:
            errors[name] = describe(problem_met)
            release(device)
    return errors


def check_step(make: Callable[[Problem], Step], problem: Problem) -> float:
    """The largest of the errors of a first step's loss, gradients and history, each relative to the largest value."""
    loss, gradients, after = reference_step(problem.logits, problem.target, problem.indices[0], problem.sums)
    step = make(problem)
    found_loss, found = step.run(0)
    pairs = [
        (found_loss, torch.tensor(loss, dtype=torch.float64)),
        (step.sums(), after),
        *zip(found, gradients, strict=True),
    ]
    errors = [(a.detach().cpu().double() - b).abs().amax() / b.abs().amax() for a, b in pairs]
    return float(torch.stack(errors).amax())  # NaN if any is


def describe_environment(device: torch.device) -> dict[str, Any]:
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = None
    versions = {"torch": torch.__version__, "triton": triton, "python": platform.python_version()}
    if device.type != "cuda":
        return {"device": "CPU", "driver": None, **versions}
    runtime = torch.version.cuda or torch.version.hip
    return {"device": torch.cuda.get_device_name(device), "driver": _driver(), "runtime": runtime, **versions}


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return None


def chosen_makers(case: Case, names: Sequence[str] | None, backend: str | None) -> Makers:
    """Growth is ours and the copy's; two ways to compile are for the large cases."""
    makers = contenders(backend)
    if case.kind == "growth":
        makers = {name: makers[name] for name in (OURS, COPY)}
    elif case.kind == "small":
        makers = {name: make for name, make in makers.items() if name == COMPILED or COMPILED not in name}
    return makers if names is None else {name: make for name, make in makers.items() if name in names}


def shrink(case: Case) -> Case:
    return case._replace(batch=min(case.batch, 8), classes=min(case.classes, 11), samples=40)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer of at least 1, got {text!r}")
    return int(text)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table; see ``--help``."""
    names, kinds = [case.name for case in CASES], list(dict.fromkeys(case.kind for case in CASES))
    parser = argparse.ArgumentParser(
        prog="python -m qmf_kernels.benchmarks.objective",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--cases", nargs="+", choices=[*kinds, *names], default=kinds, metavar="CASE", help="or kinds")
    parser.add_argument("--contenders", nargs="+", choices=list(contenders(None)), metavar="NAME", help="default: all")
    parser.add_argument("--repeats", type=_positive, default=50, help="timed steps per contender and case")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"), metavar="FOLDER")
    options = parser.parse_args(arguments)

    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.set_device(device)
    backend = None if on_gpu else "triton" if INTERPRETED else "torch"
    where = describe_environment(device)
    print(", ".join(f"{name} {value}" for name, value in where.items()))
    if not on_gpu:
        print("No GPU: every case shrunk, nothing judged. These times say nothing about a GPU's.")

    outcomes: list[Outcome] = []
    checked: dict[tuple[int, torch.dtype], dict[str, Any]] = {}
    for case in CASES:
        if case.name not in options.cases and case.kind not in options.cases:
            continue
        torch.compiler.reset()
        case = case if on_gpu else shrink(case)
        makers = chosen_makers(case, options.contenders, backend)
        errors = checked.setdefault((case.modalities, case.dtype), {})
        errors |= check(case, {name: make for name, make in makers.items() if name not in errors}, device)
        outcomes.append(run_case(case, makers, options.repeats, device, errors))
        print(table(outcomes[-1]), flush=True)
        release(device)
    verdicts = judge(outcomes) if on_gpu else []
    if verdicts:
        print("targets\n" + verdict_lines(verdicts))
    stem = "objective-" + re.sub(r"[^a-z0-9]+", "-", where["device"].lower()).strip("-")
    options.out.mkdir(parents=True, exist_ok=True)
    written = options.out / f"{stem}.json"
    written.write_text(json.dumps(as_json(where, options.repeats, outcomes, verdicts), indent=2) + "\n")
    print(f"wrote {written}")
    try:
        from .picture import draw

        title = f"{where['device']}, driver {where['driver']}, torch {where['torch']}, triton {where['triton']}"
        draw(outcomes, title, written.with_suffix(".png"))
        print(f"wrote {written.with_suffix('.png')}")
    except ImportError as error:
        print(f"no picture: {error}")


if __name__ == "__main__":
    main()
