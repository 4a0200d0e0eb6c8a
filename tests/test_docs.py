"""The Python in README and the guides runs, page by page, as a reader would paste it."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
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
    for target in re.findall(r"\]\((?!https?://|#)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), f"{page.name} links to {target}"


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
