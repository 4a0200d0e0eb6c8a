"""The Python in README and the guides runs, page by page, as a reader would paste it."""

import importlib
import importlib.util
import pkgutil
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import qmf_fusion
import qmf_fusion.theory

ROOT = Path(__file__).parents[1]
BLOB = "https://github.com/qmf-fusion/qmf-fusion/blob/main/"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", page.read_text(), re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {}
    for number, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    prose = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", prose):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_readme_links_work_on_the_package_index() -> None:
    """Which shows README alone: its links must be whole addresses, of files that are there."""
    targets = re.findall(r"\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert [target for target in targets if not target.startswith("https://")] == []
    ours = [target.removeprefix(BLOB) for target in targets if target.startswith(BLOB)]
    assert ours
    assert [path for path in ours if not (ROOT / path.partition("#")[0]).exists()] == []


def test_every_page_is_in_the_nav_and_in_the_index() -> None:
    yaml = pytest.importorskip("yaml")
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())

    def pages(entries: list[dict[str, object]]) -> list[object]:
        values = [value for entry in entries for value in entry.values()]
        return [page for value in values for page in (pages(value) if isinstance(value, list) else [value])]

    there = sorted(path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md"))
    assert sorted(map(str, pages(config["nav"]))) == there
    linked = re.findall(r"\]\(([^)#]+\.md)", (ROOT / "docs" / "index.md").read_text())
    assert sorted(linked) == [page for page in there if page != "index.md"]


def test_the_interface_lists_what_is_public_once() -> None:
    listed = re.findall(r"^::: (\S+)$", (ROOT / "docs" / "api.md").read_text(), re.MULTILINE)
    objects = [pkgutil.resolve_name(name) for name in listed]
    assert len({id(found) for found in objects}) == len(listed), "listed twice"
    names = {name.rpartition(".")[2] for name in listed}
    hypothesis_is_there = importlib.util.find_spec("hypothesis") is not None
    public = [qmf_fusion, qmf_fusion.functional, qmf_fusion.theory, importlib.import_module("qmf_fusion.integrations")]
    if hypothesis_is_there:
        public.append(importlib.import_module("qmf_fusion.testing"))
    for module in public:
        missing = set(module.__all__) - names - {"__version__", "functional"}
        assert not missing, f"{module.__name__}: {missing}"


def test_the_interface_shows_examples_as_code() -> None:
    griffe = pytest.importorskip("griffe")
    extensions = griffe.load_extensions(str(ROOT / "tools" / "griffe_examples.py"))
    package = griffe.load("qmf_fusion", search_paths=[str(ROOT)], extensions=extensions, docstring_parser="google")
    kinds = [section.kind.value for section in package["functional.fusion_weights"].docstring.parsed]
    assert "examples" in kinds
    assert "admonition" not in kinds


@pytest.mark.slow
def test_readme_main_line_runs(tmp_path: Path) -> None:
    line = next(line for line in blocks(ROOT / "README.md", "bash") if "train digits" in line)
    command = shlex.split(line.strip().splitlines()[0].split("&&")[-1])
    assert command[0] == "qmf-fusion"
    arguments = [*command[1:], "--quick", "--output", str(tmp_path / "digits")]
    entry = "import sys; from qmf_examples.cli import main; sys.exit(main())"
    subprocess.run([sys.executable, "-c", entry, *arguments], check=True, cwd=tmp_path, timeout=600)
    assert (tmp_path / "digits" / "results.json").stat().st_size > 0
    assert list((tmp_path / "digits").glob("*.png"))
