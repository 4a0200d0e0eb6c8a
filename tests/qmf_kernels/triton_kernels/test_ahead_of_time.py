"""Every kernel compiles for GPUs that are not here, with no array in local memory; spilled registers are reported."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

pytest.importorskip("triton.backends.nvidia", reason="needs Triton's compiler")

SCRIPT = Path(__file__).with_name("ahead_of_time.py")
THREE = ["forward_kernel", "bookkeeping_kernel", "backward_kernel"]
ONE = ["single_kernel", "scale_kernel"]
LAUNCHES = {
    "small": dict.fromkeys(["nyud2", "sunrgbd", "food101", "mvsa", "six views", "all pairs", "float64"], ONE),
    "large": {
        "target": THREE,
        "target in half": THREE,
        "beyond 2^31": THREE[:2],
        "eight modalities": THREE,
        "sixteen of few classes": THREE,
        "a million classes": THREE,
        "dense": THREE,
    },
    "options": {
        "everything": THREE,
        "ready uncertainty": THREE,
        "float64": THREE,
        "float64 with everything": THREE,
        "one class": THREE,
        "fusion": ["forward_kernel", "backward_kernel"],
        "nyud2 in three": THREE,
        "six views": THREE,
    },
}
LAUNCHES["brief"] = {"nyud2": ONE, "dense": THREE, "everything": THREE}
# Where one thread block hands on what another of its steps, or another block, reads.
BARRIERS = {"single_kernel": 3, "bookkeeping_kernel": 2}


@pytest.mark.parametrize(
    ("target", "suite"),
    [
        ("cuda:90", "brief"),
        *(pytest.param("cuda:90", name, marks=pytest.mark.slow) for name in ("small", "large", "options")),
        *(pytest.param(name, "brief", marks=pytest.mark.slow) for name in ("cuda:80", "cuda:100", "hip:gfx942")),
    ],
)
def test_compiles(target: str, suite: str, tmp_path: Path, record_property: Callable[[str, object], None]) -> None:
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, SCRIPT, target, suite],
        env={**env, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kernels = json.loads(done.stdout)
    launched: dict[str, list[str]] = {}
    for found in kernels:
        launched.setdefault(found["case"], []).append(found["kernel"])
        assert found["binary"] > 0
        assert not found["narrow"], f"32-bit products of sizes: {found}"
        assert found["barriers"] >= BARRIERS.get(found["kernel"], 0), found
        assert found["arrays"] == 0, f"an array in local memory: {found}"
        if found["spilled"]:
            record_property(f"{found['case']}: {found['kernel']}", f"{found['spilled']} bytes of registers spilled")
            print(f"{found['case']}: {found['kernel']} spills {found['spilled']} bytes")
    assert launched == LAUNCHES[suite]
