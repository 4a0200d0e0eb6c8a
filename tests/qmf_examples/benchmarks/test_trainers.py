"""The trainers' benchmark runs on samples, names what it measured, and all of its sides load the same bytes."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from qmf_examples.benchmarks import loading, steps, trainers
from qmf_examples.cli import main
from qmf_examples.training.settings import QUICK, resolve


def run(arguments, output, capsys):
    threads = torch.get_num_threads()
    code = main(["bench-trainers", *arguments, "--output", str(output)])
    captured = capsys.readouterr()
    assert torch.get_num_threads() == threads
    assert code == 0, captured.err
    return captured.out, json.loads((output / "results.json").read_text())


def test_figures_are_positive_and_labelled(tmp_path, capsys):
    out, written = run(["nyud2", "mvsa", "--quick", "--repeats", "1"], tmp_path, capsys)
    assert written["environment"]["torch"] == torch.__version__
    assert written["notes"] == ["Tiny networks and images: these figures only show that everything runs."]
    assert written["notes"][0] in out
    assert [row["data_set"] for row in written["loading"]] == [row["data_set"] for row in written["steps"]]
    for row in written["loading"]:
        assert min(row["kept"], row["anew"]) > 0
        assert row["ratio"] == pytest.approx(row["kept"] / row["plain"])
        assert f"{row['kept']:,.0f}" in out
    for row in written["steps"]:
        assert list(row["seconds"]) == ["forward", "objective", "backward", "optimizer"]
        assert min(row["seconds"].values()) > 0
        assert 0 < row["share"] < 1
        assert row["networks"] in out
    assert [row["networks"] for row in written["steps"]] == ["2 x tiny", "tiny BERT + tiny"]


def test_a_given_folder_and_one_part(sample, tmp_path, capsys):
    arguments = ["sunrgbd", "--data-root", str(sample("sunrgbd")), "--only", "loading", "--quick", "--repeats", "1"]
    out, written = run(arguments, tmp_path, capsys)
    assert written["steps"] == []
    assert written["loading"][0]["samples"] == 5 * 19
    assert written["bench"]["data_root"] == str(sample("sunrgbd"))
    assert "the data set's files" in " ".join(out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--data-root", "."], 2, "takes one SET"),
        (["mvsa", "--data-root", "nowhere", "--only", "loading"], 1, "no file nowhere"),
        (["mvsa", "--device", "nothing"], 2, "'nothing' cannot be used here"),
        (["imagenet"], 2, "'imagenet' is not one of"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, code, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["bench-trainers", *arguments]) == code
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", ["nyud2", "mvsa"])
def test_all_sides_load_equal_bytes(name, sample, tmp_path):
    root = sample(name)
    if name == "nyud2":  # frames as published: wider than the released loader shrinks, and no squares
        root = tmp_path
        for label in range(10):
            for split in ("train", "test"):
                (root / split / f"class{label}").mkdir(parents=True)
                pixels = np.random.default_rng(label).integers(0, 256, (230, 600, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{label}" / "a.png")
    settings = resolve(name, QUICK, {"data_root": str(root)})
    sides = loading.make_sides(settings, tmp_path / "cache")
    assert [side.samples.kept is not None for side in sides[:2]] == [True, False]
    seen = []

    def compare(batches):
        plain = sides[2].tensors(batches[2])
        for side, batch in zip(sides[:2], batches, strict=False):
            for a, b in zip(side.tensors(batch), plain, strict=True):
                assert torch.equal(a, b)
        seen.extend(plain)

    with torch.random.fork_rng():
        seconds = loading.take_turns(sides, 3, compare)
    assert len(seen) == 3 * len(seconds)
    assert sum(len(x) for x in seen) == 3 * len(sides[0].samples)


def test_released_shapes_need_no_network(monkeypatch):
    """Two ResNet-18, and BERT-base with ResNet-152, built as they are; the steps are not run."""
    shapes = {}

    def look(learner, inputs, target, index, optimizer, device):
        shapes[len(target)] = sum(p.numel() for p in learner.parameters())
        return (1.0, 2.0, 3.0, 4.0)

    monkeypatch.setattr(steps, "_step", look)
    for name, batch in (("nyud2", 256), ("mvsa", 16)):
        bench = trainers.Bench((name,), ("step",), repeats=1)
        _, [row] = trainers.measure(bench, lambda text: None)
        assert (row.batch, row.image_size, row.share) == (batch, 224, pytest.approx(0.2))
    assert shapes[256] == 2 * 11_181_642
    assert shapes[16] == pytest.approx(109_482_240 + 58_143_808, rel=1e-3)
