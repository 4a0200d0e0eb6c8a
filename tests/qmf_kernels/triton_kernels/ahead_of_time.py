"""Compile the kernels for a device that is not here, as the launchers launch them, and report what each took.

``python ahead_of_time.py cuda:90 SUITE`` prints a JSON list; the suite ``many``, of minutes, is for whoever changes the
tiling. It has to be a process of its own, without ``TRITON_INTERPRET``: Triton decides at its import whether kernels
are compiled.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qmf_kernels import triton_kernels
from qmf_kernels.rules import LossGrads, LossRule, ObjectiveOptions, Past, WeightRule

WARPS = {"cuda": 32, "hip": 64}


class Driver:
    """A device of the given kind, on which nothing ever runs."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0


def use(target: str) -> None:
    backend, _, arch = target.partition(":")
    driver.set_active(Driver(GPUTarget(backend, int(arch) if backend == "cuda" else arch, WARPS[backend])))


class Compiled(list[dict[str, Any]]):
    """What was compiled within its context."""

    def __enter__(self) -> "Compiled":
        self.run = JITFunction.run

        def run(function: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
            kernel = self.run(function, *arguments, grid=grid, warmup=True, **options)
            self.append(report(function.fn.__name__, grid, kernel))
            return kernel

        JITFunction.run = run
        return self

    def __exit__(self, *_: object) -> None:
        JITFunction.run = self.run


def report(name: str, grid: tuple[int, ...], kernel: Any) -> dict[str, Any]:
    out = {"kernel": name, "grid": grid[0], "warps": kernel.metadata.num_warps, "shared": kernel.metadata.shared}
    ttir = kernel.asm["ttir"]
    # Products of sizes in 32 bits, which many rows overflow.
    out["narrow"] = re.findall(r"arith\.muli .*%(?:num_rows|batch|positions|[a-z_]*(?:strides|sizes)).* : i32", ttir)
    out["barriers"] = len(re.findall(r"\b(?:gpu|ttg)\.barrier", ttir))
    if "cubin" not in kernel.asm:
        # Scratch memory without a register spilled is an array that some index reaches into.
        spills = sum(map(int, re.findall(r"\.[sv]gpr_spill_count: *(\d+)", kernel.asm["amdgcn"])))
        scratch = max(map(int, re.findall(r"\.private_segment_fixed_size: *(\d+)", kernel.asm["amdgcn"])))
        arrays = scratch if not spills else 0
        return out | {"binary": len(kernel.asm["hsaco"]), "arrays": arrays, "spilled": scratch - arrays}
    out["binary"] = len(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        done = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", done.stdout)
    assert found, done.stdout
    registers, stack, _, local = map(int, found.groups())
    # An array that some index reaches into is in the PTX already; what ptxas adds to the stack is spilled registers.
    declared = sum(map(int, re.findall(r"\.local .*\[(\d+)\]", kernel.asm["ptx"])))
    return out | {"registers": registers, "arrays": local + declared, "spilled": stack - declared}


def meta(*shape: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def step(
    num: int,
    rows: tuple[int, ...],
    classes: int,
    samples: int,
    dtype: str = "float32",
    *,
    pairs: str = "adjacent",
    single: bool = False,
    options: bool = False,
    every: bool = False,
    ready: bool = False,
    backward: bool = True,
) -> None:
    """A training step of M heads ``[*rows, K]``, N samples; ``options``: temperatures, normalised, masked, weighted
    classes, smoothing and the coefficients' gradients; ``every``: gradients of all outputs come in; ``ready``: an
    uncertainty, with gradients.
    """
    heads = [meta(*rows, classes, dtype=getattr(torch, dtype)) for _ in range(num)]
    target = meta(*rows, dtype=torch.int64)
    rule = WeightRule(
        uncertainty=meta(num, *rows, dtype=torch.float32) if ready else None,
        alpha=meta(num),
        beta=meta(num),
        temperature=meta(num) if options else None,
        normalize=options,
    )
    present = meta(num, *rows, dtype=torch.bool) if options else None
    loss_rule = LossRule(meta(classes) if options else None, label_smoothing=0.1 if options else 0.0, pairs=pairs)
    given = ObjectiveOptions(target, None, present, rule, loss_rule, return_logits=False)
    past = Past(
        meta(2, num, samples), meta(num, 1), meta(num, 1), None, meta(rows[0], dtype=torch.int64), 1, *[True] * 3
    )
    out, d_logits, _, kept = triton_kernels.objective(heads, given, single, False, past)
    if d_logits:
        triton_kernels.scale_gradients(d_logits, out.loss, heads)
    elif backward:
        grads = LossGrads(loss=out.loss)
        if every:
            grads = LossGrads(*out[:7])._replace(logits=meta(*rows, classes, dtype=out.loss.dtype))
        rule_gradients = options or every or ready
        triton_kernels.objective_backward(grads, kept, heads, given, rule_gradients)


def fuse(num: int, rows: tuple[int, ...], classes: int, dtype: str = "float32") -> None:
    """Fusion alone, forward and backward."""
    heads = [meta(*rows, classes, dtype=getattr(torch, dtype)) for _ in range(num)]
    rule = WeightRule(None, meta(num), meta(num), meta(num), normalize=True)
    out = triton_kernels.fuse(heads, None, rule)
    triton_kernels.fuse_backward(out, out[2], heads, rule, True)


# The trainers' data sets (nyud2, sunrgbd, food101, mvsa) and the multi-view ones, one launch each; then large ones.
SMALL = {
    "nyud2": lambda: step(2, (256,), 10, 795, single=True),
    "sunrgbd": lambda: step(2, (128,), 19, 4845, "float16", single=True),
    "food101": lambda: step(2, (32,), 101, 60101, single=True),
    "mvsa": lambda: step(2, (32,), 3, 1555, "bfloat16", single=True),
    "six views": lambda: step(6, (32,), 10, 1600, single=True),
    "all pairs": lambda: step(2, (128,), 19, 4845, single=True, pairs="all", options=True),
    "float64": lambda: step(2, (256,), 10, 795, "float64", single=True),
}
LARGE = {
    "target": lambda: step(3, (65_536,), 1000, 100_000),
    "target in half": lambda: step(3, (65_536,), 1000, 100_000, "bfloat16"),
    "beyond 2^31": lambda: step(3, (4_194_304,), 1000, 5_000_000, "bfloat16", backward=False),
    "eight modalities": lambda: step(8, (65_536,), 1000, 100_000, "bfloat16"),
    "sixteen of few classes": lambda: step(16, (4096,), 10, 100_000, "bfloat16"),
    "a million classes": lambda: step(2, (4,), 1_000_000, 1000),
    "dense": lambda: step(3, (4, 65, 65), 21, 100),
}
OPTIONS = {
    "everything": lambda: step(3, (128,), 1000, 1000, pairs="all", options=True, every=True),
    "ready uncertainty": lambda: step(3, (128,), 1000, 1000, ready=True),
    "float64": lambda: step(3, (128,), 1000, 1000, "float64"),
    "float64 with everything": lambda: step(3, (128,), 1000, 1000, "float64", options=True, every=True),
    "one class": lambda: step(2, (4096,), 1, 1000, options=True, every=True),
    "fusion": lambda: fuse(3, (65_536,), 1000),
    "nyud2 in three": lambda: step(2, (256,), 10, 795),
    "six views": lambda: step(6, (200,), 10, 1600),
}
MANY = {
    "eight modalities": lambda: step(8, (65_536,), 1000, 100_000),
    "sixteen modalities": lambda: step(16, (65_536,), 1000, 100_000, "bfloat16"),
    "sixteen with everything": lambda: step(16, (4096,), 100, 10_000, pairs="all", options=True, every=True),
    "sixteen in float64": lambda: step(16, (4096,), 100, 10_000, "float64"),
    "a million with everything": lambda: step(4, (64,), 1_000_000, 1000, options=True, every=True),
    "dense with everything": lambda: step(4, (8, 512, 512), 150, 1000, options=True, every=True),
    "few classes with everything": lambda: step(2, (4096,), 3, 1000, options=True, every=True),
    "fusion of sixteen": lambda: fuse(16, (4096,), 100),
    "fusion in float64": lambda: fuse(3, (4096,), 1000, "float64"),
}
BRIEF = {
    "nyud2": SMALL["nyud2"],
    "dense": LARGE["dense"],
    "everything": OPTIONS["everything"],
}
SUITES = {"brief": BRIEF, "small": SMALL, "large": LARGE, "options": OPTIONS, "many": MANY}


def main(target: str, suite: str) -> list[dict[str, Any]]:
    use(target)
    out = []
    for name, launch in SUITES[suite].items():
        with Compiled() as compiled:
            launch()
        out += [{"case": name, **found} for found in compiled]
    return out


if __name__ == "__main__":
    assert not os.environ.get("TRITON_INTERPRET"), "compile in a process without TRITON_INTERPRET"
    print(json.dumps(main(*sys.argv[1:])))
