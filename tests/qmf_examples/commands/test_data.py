"""``inspect``, ``sample`` and ``prepare`` as a user runs them."""

import json
import sys

import numpy as np
import pytest
from PIL import Image
from sklearn.linear_model import LogisticRegression

from qmf_examples.cli import main
from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.paired_images import PairedImages
from qmf_examples.data.text_images import TextImages
from qmf_examples.models.vocabulary import Vocabulary


@pytest.fixture
def run(capfd):
    """Run the command, and give back what it printed; errors are there with the rest."""

    def run(*arguments, code=0):
        capfd.readouterr()
        returned = main([str(argument) for argument in arguments])
        printed = capfd.readouterr()
        assert returned == code, printed.err
        return printed.out + printed.err

    return run


def tree(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("name", DATA_SETS)
def test_a_sample_is_deterministic_and_passes_inspection(run, name, tmp_path):
    sizes = ["--train", 1, "--test", 1, "--dev", 1, "--image-size", 16]
    run("sample", name, tmp_path / "a", *sizes)
    run("sample", name, tmp_path / "b", *sizes)
    run("sample", name, tmp_path / "c", *sizes, "--seed", 1)
    assert tree(tmp_path / "a") == tree(tmp_path / "b")
    assert tree(tmp_path / "a").keys() == tree(tmp_path / "c").keys()
    assert tree(tmp_path / "a") != tree(tmp_path / "c")
    output = run("inspect", name, "--data-root", tmp_path / "a")
    assert output.endswith("training can run\n")
    assert f"test: image width from {16 * (1 + DATA_SETS[name].paired)} to" in output
    assert ".0" not in output  # the median of an even number of widths
    assert all(label in output for label in DATA_SETS[name].classes)


def features(images):
    return np.stack([np.asarray(image.resize((8, 8))).astype(float).ravel() / 255 for image in images])


def accuracy(train, test, train_labels, test_labels):
    return LogisticRegression(max_iter=300).fit(train, train_labels).score(test, test_labels)


def test_each_modality_of_a_sample_tells_the_class(run, tmp_path):
    run("sample", "nyud2", tmp_path / "n", "--train", 12, "--test", 4, "--image-size", 32)
    train, test = (PairedImages(DATA_SETS["nyud2"], tmp_path / "n", split) for split in ("train", "test"))
    for modality in ("rgb", "depth"):
        x, y = (features([row[modality] for row in (data[i] for i in range(len(data)))]) for data in (train, test))
        assert accuracy(x, y, train.labels, test.labels) > 0.5  # chance is 0.1
    run("sample", "mvsa", tmp_path / "m", "--train", 12, "--test", 6, "--image-size", 32)
    train, test = (TextImages(DATA_SETS["mvsa"], tmp_path / "m", split) for split in ("train", "test"))
    x, y = (features([data[i]["image"] for i in range(len(data))]) for data in (train, test))
    assert accuracy(x, y, train.labels, test.labels) > 0.7  # chance is 0.33
    vocabulary = Vocabulary(row.text for row in train.rows)
    x, y = (
        np.stack([np.bincount(vocabulary.encode(row.text), minlength=len(vocabulary)) for row in data.rows])
        for data in (train, test)
    )
    assert accuracy(x, y, train.labels, test.labels) > 0.7


def test_inspect_counts_all_names_a_few_and_exits_with_1(run, tmp_path):
    root = tmp_path / "m"
    run("sample", "mvsa", root, "--train", 8, "--dev", 2, "--test", 4, "--image-size", 16)
    rows = [json.loads(line) for line in (root / "train.jsonl").read_text().splitlines()]
    for row in rows[:7]:
        (root / row["img"]).unlink()
    with (root / "dev.jsonl").open("a") as file:
        file.write("not json\n")
    output = run("inspect", "mvsa", "--data-root", root, code=1)
    assert "train: 7 cannot be used" in output
    assert output.count("no such file: data/") == 5
    assert "... and 2 more" in output
    assert "dev.jsonl, line 7: not JSON" in output
    assert "unless with --skip-bad, without the 8 faults" in output
    assert run("inspect", "mvsa", "--data-root", root, "--skip-bad").endswith("without the 8 faults\n")
    assert "cannot be used" not in run("inspect", "mvsa", "--data-root", root, "--text-only", code=1).split("dev:")[0]
    report = json.loads(run("inspect", "mvsa", "--data-root", root, "--json", code=1))
    assert report["can_train"] is False
    assert [len(split["faults"]) for split in report["splits"]] == [7, 1, 0]
    assert sum(report["splits"][0]["classes"].values()) == 17
    assert report["splits"][0]["widths"] == [16, 16, 16]


def test_inspect_notes_ids_that_stand_on_several_lines(run, tmp_path):
    run("sample", "mvsa", tmp_path / "m", "--train", 1, "--dev", 1, "--test", 1, "--image-size", 16)
    file = tmp_path / "m" / "train.jsonl"
    file.write_text(file.read_text() * 2)
    output = run("inspect", "mvsa", "--data-root", tmp_path / "m")
    assert "train: 3 ids stand on several lines, such as '1'\n" in output
    assert "dev: 1 ids" not in output


def test_inspect_finds_what_skipping_cannot_mend(run, tmp_path):
    output = run("inspect", "food101", "--data-root", tmp_path / "nowhere", "--skip-bad", code=1)
    assert "no file" in output
    assert "To get it: download UPMC Food-101" in output
    run("sample", "nyud2", tmp_path / "n", "--train", 1, "--test", 1, "--image-size", 16)
    (tmp_path / "n/train/office/office_0000.png").write_bytes(b"")
    output = run("inspect", "nyud2", "--data-root", tmp_path / "n", "--skip-bad", code=1)
    assert "train: 1 classes without a usable row: office" in output
    arguments = [
        "train",
        "nyud2",
        "--quick",
        "--skip-bad",
        "--data-root",
        tmp_path / "n",
        "--output",
        tmp_path / "runs",
    ]
    assert "1 of 10 classes without a usable sample: office" in run(*arguments, code=1)
    output = run("inspect", "sunrgbd", "--data-root", tmp_path / "n", "--skip-bad", code=1)
    assert "SUN RGB-D has 19 classes, found 10" in output


def test_sample_refuses_a_folder_that_holds_something(run, tmp_path):
    (tmp_path / "mine").write_text("precious")
    assert "not an empty folder" in run("sample", "mvsa", tmp_path, code=1)
    assert "not an empty folder" in run("sample", "mvsa", tmp_path / "mine", code=1)


def test_prepare_commands_report_and_go_on(run, tmp_path):
    raw = tmp_path / "raw" / "frame"
    for name in ("image", "depth_bfx"):
        (raw / name).mkdir(parents=True)
    Image.new("RGB", (24, 20), (9, 99, 9)).save(raw / "image" / "a.jpg")
    Image.fromarray(np.full((20, 24), 2000 << 3, np.uint16)).save(raw / "depth_bfx" / "a.png")
    (raw / "intrinsics.txt").write_text("30 0 12 0 30 10 0 0 1")
    (raw / "scene.txt").write_text("office")
    broken = tmp_path / "raw" / "broken"
    broken.mkdir()
    (broken / "scene.txt").write_text("kitchen\n")
    command = ["prepare", "sunrgbd", "--raw", tmp_path / "raw", "--out", tmp_path / "out", "--workers", 1]
    output = run(*command)
    assert "not the published split" in output
    assert "broken, skipped: 1 frames\n  broken: no folder image" in output
    assert "1 frames written, 0 finished before, 1 skipped" in output
    assert "0 frames written, 1 finished before, 1 skipped" in run(*command)
    with Image.open(next((tmp_path / "out").rglob("*.png"))) as written:
        assert written.size == (512, 256)
    assert "prepared with other settings" in run(*command, "--depth", "grey", code=1)
    assert "--mat: no file" in run(
        "prepare", "nyud2", "--mat", tmp_path / "x", "--splits", tmp_path / "y", "--out", tmp_path / "z", code=1
    )
    run("sample", "mvsa", tmp_path / "m", "--train", 8, "--dev", 2, "--test", 4, "--image-size", 16)
    output = run("prepare", "mvsa", "--raw", tmp_path / "m", "--out", tmp_path / "o", "--splits", tmp_path / "m")
    assert "42 of 42 labels are those of the label file" in output
    assert "dropped by the rule agree: 2 pairs" in output


@pytest.mark.parametrize(("module", "package"), [("h5py", "h5py"), ("scipy", "scipy"), ("PIL", "pillow")])
def test_a_missing_extra_is_named(run, tmp_path, monkeypatch, module, package):
    monkeypatch.setitem(sys.modules, module, None)
    output = run("prepare", "nyud2", "--mat", tmp_path, "--splits", tmp_path, "--out", tmp_path, code=1)
    assert f"needs {package}, which is not installed: pip install 'qmf-fusion[examples]'" in output
