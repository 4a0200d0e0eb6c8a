"""What importing the package needs, in a fresh interpreter."""

import subprocess
import sys

import pytest

BLOCK = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Blocked())
"""


def run(blocked, code):
    script = BLOCK.format(blocked=blocked) + code
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    "blocked", [("triton",), ("hypothesis",), ("numpy", "sklearn", "matplotlib", "scipy", "typer")]
)
def test_works_without(blocked):
    done = run(
        blocked,
        f"""
import torch, qmf_fusion
from qmf_fusion import QMFLoss, QualityAwareFusion
heads = [torch.randn(3, 4, requires_grad=True) for _ in range(2)]
QMFLoss(QualityAwareFusion(2), 3)(heads, torch.tensor([0, 1, 2]), torch.arange(3)).loss.backward()
assert not set({blocked!r}) & set(sys.modules)
print("trained")
""",
    )
    assert done.stdout == "trained\n", done.stderr


def test_importing_the_package_imports_neither_hypothesis_nor_triton():
    code = "import torch; before = set(sys.modules); import qmf_fusion; print(sorted(set(sys.modules) - before))"
    done = run((), code)
    assert done.returncode == 0, done.stderr
    loaded = done.stdout
    assert "'qmf_fusion.fusion'" in loaded
    assert "'hypothesis" not in loaded
    assert "'triton" not in loaded
    assert "'qmf_examples" not in loaded
    for beside in ("subsets", "importance", "missing", "selection", "conformal", "consistency", "monitor"):
        assert f"'qmf_fusion.{beside}" not in loaded


def test_testing_needs_hypothesis():
    done = run(("hypothesis",), "import qmf_fusion.testing")
    assert done.returncode != 0
    assert "hypothesis" in done.stderr


def test_kernels_know_nothing_of_the_package():
    done = run((), "import qmf_kernels; print(any(name.startswith('qmf_fusion') for name in sys.modules))")
    assert done.stdout == "False\n", done.stderr
