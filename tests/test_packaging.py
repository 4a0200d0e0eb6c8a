"""A wheel and an sdist build, hold what they should, and import from an empty folder."""

import os
import re
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("qmf_fusion", "qmf_kernels", "qmf_examples")


def run(*command: str | Path, cwd: Path, env: dict[str, str] | None = None) -> str:
    done = subprocess.run([str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    copy = tmp_path_factory.mktemp("source") / "tree"
    files = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT).split("\0")
    for name in filter(None, files):
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    # Without isolation, for isolation would download the build tools.
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, copy, cwd=folder)
    return folder


def test_wheel_contents(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        metadata = archive.read(next(name for name in names if name.endswith("METADATA"))).decode()
        entry_points = archive.read(next(name for name in names if name.endswith("entry_points.txt"))).decode()
    tops = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert tops == set(PACKAGES)
    for package in PACKAGES:
        assert f"{package}/py.typed" in names
    # The wheel was built from the sdist, so whatever is tracked must have come through both.
    roots = {"qmf_fusion": "qmf_fusion", "qmf_kernels": "kernels/qmf_kernels", "qmf_examples": "examples/qmf_examples"}
    for package, folder in roots.items():
        for source in (ROOT / folder).rglob("*.py"):
            assert f"{package}/{source.relative_to(ROOT / folder).as_posix()}" in names
    assert "qmf-fusion = qmf_examples.cli:main" in entry_points
    assert "Requires-Python: >=3.11" in metadata
    core = {line for line in metadata.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line}
    # Not Triton: beside an older PyTorch it would replace the one that PyTorch pins.
    assert core == {"Requires-Dist: torch>=2.6", "Requires-Dist: einops>=0.8"}


def test_sdist_contents(built: Path) -> None:
    (sdist,) = built.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    for name in (
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "CITATION.cff",
        "RELEASING.md",
        "tests/test_packaging.py",
    ):
        assert name in names
    for name in ("benchmarks/results/robustness-inputs.json", "tools/griffe_examples.py"):
        assert name in names


def test_the_package_index_takes_both(built: Path) -> None:
    """README is rendered, and every field of the metadata is one that the index knows."""
    pytest.importorskip("twine")
    said = run(sys.executable, "-m", "twine", "check", "--strict", *sorted(built.iterdir()), cwd=built)
    assert said.count("PASSED") == 2


def test_a_release_agrees_on_its_version_day_and_address() -> None:
    version = re.search(r'__version__ = "(.+)"', (ROOT / "qmf_fusion" / "version.py").read_text())
    assert version is not None
    citation = dict(re.findall(r"^([\w-]+): (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE))
    assert citation["version"] == version[1]
    assert f"## [{version[1]}] - {citation['date-released']}" in (ROOT / "CHANGELOG.md").read_text()
    urls = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]
    assert urls["Repository"] == citation["repository-code"]
    assert all(url.startswith(urls["Repository"]) for url in urls.values())
    assert f"repo_url: {urls['Repository']}\n" in (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        addresses = set(re.findall(r"https://github\.com/qmf-fusion/[\w-]+", page.read_text()))
        assert addresses <= {urls["Repository"]}, page.name


def test_wheel_imports_from_an_empty_folder(built: Path, tmp_path: Path) -> None:
    (wheel,) = built.glob("*.whl")
    target, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        "import qmf_fusion, qmf_kernels, qmf_examples, torch\n"
        "out = qmf_fusion.QualityAwareFusion(2)([torch.randn(3, 4)] * 2)\n"
        f"assert all(m.__file__.startswith({str(target)!r}) for m in (qmf_fusion, qmf_kernels, qmf_examples))\n"
        "print(tuple(out.logits.shape), qmf_fusion.__version__)\n"
    )
    env = {**os.environ, "PYTHONPATH": str(target)}
    assert run(sys.executable, "-c", code, cwd=empty, env=env).split()[:2] == ["(3,", "4)"]
