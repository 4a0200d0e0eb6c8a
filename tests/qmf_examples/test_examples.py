"""The files to copy: each runs on a made-up sample of its data set and says how well it does."""

import re
import runpy
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchvision")
pytest.importorskip("transformers")
FOLDER = Path(__file__).parents[2] / "examples"


@pytest.mark.parametrize(
    ("name", "options", "tests"),
    [
        ("nyud2", ["--epochs", "2"], ["clean", "rgb noisy", "depth noisy"]),
        ("nyud2", ["--epochs", "1", "--robust"], ["clean", "rgb noisy", "depth noisy"]),
        ("sunrgbd", ["--epochs", "1"], ["rgb and depth", "rgb", "depth"]),
        ("food101", ["--epochs", "1", "--accumulate", "4"], [""]),
        ("mvsa", ["--epochs", "2"], ["text", "image", "mean of logits", "fused"]),
        ("mvsa", ["--epochs", "1", "--robust"], ["text", "image", "mean of logits", "fused"]),
    ],
)
def test_an_example_trains_and_tests(name, options, tests, sample, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", str(sample(name)), "--size", "32", *options])
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    said = capsys.readouterr().out
    accuracies = re.findall(r"^test(?:,| with)? ?(.*?): accuracy ([\d.]+) %", said, re.MULTILINE)
    assert [what for what, _ in accuracies] == tests
    assert all(0 <= float(accuracy) <= 100 for _, accuracy in accuracies)
    losses = [float(loss) for loss in re.findall(r"loss of the last batch ([\d.]+)", said)]
    assert len(losses) == int(options[1])
    assert losses == sorted(losses, reverse=True)
    if name == "mvsa":
        assert re.search(r"^on dev: .+\.$", said, re.MULTILINE)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_whole_and_short(path):
    text = path.read_text()
    assert "qmf_examples" not in text
    assert len(text.splitlines()) <= 150
