"""The kernels stand alone: relative imports, loadable from any path, several copies in one process, with or without
Triton.
"""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import qmf_kernels

PACKAGE = Path(qmf_kernels.__file__).parent

LOAD = """
import importlib.util, os, sys

def load(name, folder):
    spec = importlib.util.spec_from_file_location(
        name, os.path.join(folder, "__init__.py"), submodule_search_locations=[folder]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

def step(copy):
    import torch
    heads = [torch.arange(6.0).reshape(3, 2) * (m + 1) for m in range(2)]
    rule = copy.WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None)
    return round(float(copy.objective(heads, torch.tensor([0, 1, 1]), None, None, rule, copy.LossRule()).loss), 6)
"""


def run(code: str, *arguments: object, interpret: bool = True) -> str:
    env = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")}
    done = subprocess.run(
        [sys.executable, "-c", LOAD + code, *map(str, arguments)],
        env=env | ({"TRITON_INTERPRET": "1"} if interpret else {}),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


@pytest.fixture
def copies(tmp_path: Path) -> list[Path]:
    """Two copies of the kernels, under other names, in folders that no import finds."""
    folders = [tmp_path / "one" / "a_kernel", tmp_path / "two" / "another"]
    for folder in folders:
        shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    return folders


def test_imports_are_relative():
    for source in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(source.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            assert not any(name.partition(".")[0] in ("qmf_kernels", "qmf_fusion", "qmf_examples") for name in names), (
                source
            )


def test_two_copies_in_one_process(copies):
    printed = run(
        """
one, two = load("first", sys.argv[1]), load("second", sys.argv[2])
assert one.NAMESPACE == "qmf" != two.NAMESPACE, (one.NAMESPACE, two.NAMESPACE)
assert step(one) == step(two)
assert not [name for name in sys.modules if name.startswith("qmf_")]
print("twice")
""",
        *copies,
    )
    assert printed == "twice\n"


def test_triton_kernels_of_two_copies_in_one_process(copies):
    pytest.importorskip("triton", minversion="3.6")
    printed = run(
        """
import importlib, torch
for name, folder in zip(("first", "second"), sys.argv[1:]):
    load(name, folder)
    kernels, eager = (importlib.import_module(name + end) for end in (".triton_kernels", ".eager.fusion"))
    heads = [torch.arange(6.0).reshape(3, 2) * (m + 1) for m in range(2)]
    rule = sys.modules[name].WeightRule(None, torch.tensor([-0.1, -0.5]), torch.zeros(2), None)
    for ours, theirs in zip(kernels.fuse(heads, None, rule), eager.fuse(heads, None, rule)):
        torch.testing.assert_close(ours, theirs)
assert not [name for name in sys.modules if name.startswith("qmf_")]
print("twice")
""",
        *copies,
    )
    assert printed == "twice\n"


@pytest.mark.parametrize("interpret", [False, True])
def test_works_where_triton_is_hidden(copies, interpret):
    printed = run(
        """
sys.modules["triton"] = None
copy = load("first", sys.argv[1])
assert step(copy) == step(copy)
assert not any(name.startswith("triton.") for name in sys.modules)
print("trained")
""",
        copies[0],
        interpret=interpret,
    )
    assert printed == "trained\n"
