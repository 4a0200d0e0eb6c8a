"""The Kernel Hub's layout: build.toml is what kernel-builder reads; the README's commands make a kernel that loads."""

import ast
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels"
CONFIG = tomllib.loads((KERNELS / "build.toml").read_text())


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the README's commands make, run from the repository's root."""
    folder = tmp_path_factory.mktemp("hub")
    (commands,) = re.findall(r"```bash\n(mkdir.*?)```", (KERNELS / "README.md").read_text(), re.DOTALL)
    (folder / "kernels").symlink_to(KERNELS)
    subprocess.run(["bash", "-euo", "pipefail", "-c", commands], cwd=folder, check=True)
    return folder / "hub"


def test_build_toml_is_a_pure_python_kernels() -> None:
    assert set(CONFIG) == {"general", "torch-noarch"}  # kernel-builder refuses sections and keys it does not know
    assert set(CONFIG["general"]) <= {"name", "version", "license", "backends", "edition", "hub", "upstream"}
    assert re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", CONFIG["general"]["name"])
    assert isinstance(CONFIG["general"]["version"], int)
    assert set(CONFIG["general"]["backends"]) <= {"cpu", "cuda", "metal", "neuron", "rocm", "xpu"}
    assert "MIT" in (ROOT / "LICENSE").read_text()
    assert CONFIG["general"]["license"] == "mit"


def test_layout_has_what_build_toml_names(hub: Path) -> None:
    assert (hub / "build.toml").read_bytes() == (KERNELS / "build.toml").read_bytes()
    package = hub / "torch-ext" / CONFIG["general"]["name"].replace("-", "_")
    assert (package / "__init__.py").is_file()
    assert not (package / "benchmarks").exists()


def test_imports_are_relative_or_torch(hub: Path) -> None:
    sources = list((hub / "torch-ext").rglob("*.py"))
    assert sources
    for path in sources:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            for name in names:
                top = name.partition(".")[0]
                in_kernels = top == "triton" and path.parent.name == "triton_kernels"
                assert top == "torch" or top in sys.stdlib_module_names or in_kernels, f"{path.name} imports {name}"


def test_two_copies_load_from_outside_of_the_path(hub: Path, tmp_path: Path) -> None:
    """Without Triton being imported, each with operators of its own, and with the same results."""
    name = CONFIG["general"]["name"].replace("-", "_")
    second = tmp_path / "second"
    second.symlink_to(hub / "torch-ext" / name)
    code = f"""
import importlib.util, sys, torch

def load(path, name):
    spec = importlib.util.spec_from_file_location(name, f"{{path}}/__init__.py", submodule_search_locations=[path])
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module

copies = [load({str(hub / "torch-ext" / name)!r}, "kernel_a1"), load({str(second)!r}, "kernel_b2")]
spaces = [copy.NAMESPACE for copy in copies]
assert spaces[0] == "qmf" and spaces[1].startswith("qmf_") and len(set(spaces)) == 2, spaces
assert "triton" not in sys.modules and {name!r} not in sys.modules
w, k = torch.rand(2, 6, generator=torch.Generator().manual_seed(0)), torch.arange(12.0).view(2, 6)
losses = [copy.rank(w, k, "paper", "all") for copy in copies]
assert torch.equal(*losses) and losses[0] > 0
print(*spaces)
"""
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
