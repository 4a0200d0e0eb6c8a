"""``prepare nyud2`` on numbered images, and on the same frames in the release's HDF5 layout."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qmf_examples.cli import main
from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.prepare.coarse_depth import smooth_steps
from qmf_examples.prepare.nyud2 import encode, plan, scene_class
from qmf_examples.prepare.nyud2_images import images_converter, plan_images
from qmf_examples.prepare.nyud2_mat import read_splits

from .nyud2_releases import STEP, from_images, room_depth, write_images, write_mat, write_splits

SCENES = ["kitchen", "study", "home_office"]
TRAIN, TEST = [2, 1], [3]
TARGETS = ["test/home_office/0003.png", "train/kitchen/0001.png", "train/others/0002.png"]


@pytest.fixture(scope="module")
def frames():
    """RGB ``[3, 480, 640, 3]`` and metres ``[3, 480, 640]``: the same room from nearer and nearer."""
    images = np.random.default_rng(0).integers(0, 256, (3, 480, 640, 3), dtype=np.uint8)
    return images, np.stack([room_depth() * scale for scale in (1, 0.9, 0.8)])


@pytest.fixture(scope="module")
def numbered(frames, tmp_path_factory):
    root = tmp_path_factory.mktemp("numbered")
    write_images(root, *frames, SCENES, TRAIN, TEST)
    return root


@pytest.fixture
def copy(numbered, tmp_path):
    """A copy to damage."""
    return shutil.copytree(numbered, tmp_path / "copy")


@pytest.fixture
def run(capfd):
    def run(*arguments, code=0):
        returned = main(["prepare", "nyud2", *map(str, arguments), "--workers", "1"])
        printed = capfd.readouterr()
        assert returned == code, printed.err
        return printed.err if code else printed.out

    return run


def pairs(out):
    return {path.relative_to(out).as_posix(): np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))}


def test_both_sources_give_the_same_pairs(run, frames, numbered, tmp_path):
    """Of the release's file with the depth that the images hold, smoothed alike, and RGB bit for bit."""
    images, depths = frames
    coarse = np.stack([smooth_steps(np.rint(depth / STEP) * STEP, STEP) for depth in depths])
    write_mat(tmp_path / "nyu.mat", images, coarse, SCENES)
    write_splits(tmp_path / "splits.mat", TRAIN, TEST)
    said = run("--mat", tmp_path / "nyu.mat", "--splits", tmp_path / "splits.mat", "--out", tmp_path / "a")
    assert said == f"{tmp_path / 'a'}: 3 frames written, 0 finished before, 0 skipped\n"
    run(*from_images(numbered), "--out", tmp_path / "b")
    a, b = pairs(tmp_path / "a"), pairs(tmp_path / "b")
    assert list(a) == list(b) == TARGETS
    for name in TARGETS:
        assert a[name].shape == b[name].shape == (256, 512, 3)
        assert np.array_equal(a[name][:, :256], b[name][:, :256])
        assert np.abs(a[name].astype(int) - b[name]).max() <= 1  # single precision in the file


def test_coarse_depth_is_a_few_values_from_the_release_s(frames, numbered, tmp_path):
    """In steps of 3.9 cm, a few values of each channel; without smoothing many of the angle."""
    images, depths = frames
    _, coarse = images_converter(numbered / "images", numbered / "depths", "hha", True)("0.png, 0.png")
    _, fine = encode(images[0], depths[0], None, "hha", True)
    _, stairs = encode(images[0], np.rint(depths[0] / STEP) * STEP, None, "hha", True)
    off, unsmoothed = (np.abs(made.astype(int) - fine)[10:-10, 10:-10] for made in (coarse, stairs))
    assert off[..., 0].max() <= 3
    assert np.median(off[..., 1]) <= 3
    assert off[..., 2].mean() < 4
    assert unsmoothed[..., 2].mean() > 10


def test_grey_goes_out_as_it_came_in(run, numbered, tmp_path):
    run(*from_images(numbered), "--out", tmp_path / "o", "--depth", "grey", "--size", 0, "--no-crop")
    made = pairs(tmp_path / "o")
    for name in TARGETS:
        number = int(name[-8:-4]) - 1
        depth = np.asarray(Image.open(numbered / "depths" / f"{number}.png"))
        assert np.array_equal(made[name][:, 640:], np.repeat(depth[..., None], 3, axis=-1))


def test_smoothing_stays_within_half_a_step_and_keeps_edges_and_gaps():
    flat = np.full((60, 80), 2.0)
    depth = np.where(np.arange(80) < 40, flat, 3.0)
    depth[10:20, 10:20] = 0
    smooth = smooth_steps(depth, STEP)
    assert np.array_equal(smooth == 0, depth == 0)
    assert np.abs(smooth - depth).max() <= STEP / 2 + 1e-12
    assert np.abs(smooth - depth)[depth > 0].max() < 1e-3  # 25 steps apart
    assert np.array_equal(smooth_steps(np.zeros((4, 4)), STEP), np.zeros((4, 4)))


def test_a_second_run_does_nothing_and_another_source_is_refused(run, frames, numbered, tmp_path):
    options = [*from_images(numbered), "--out", tmp_path / "o", "--depth", "grey"]
    run(*options)
    assert run(*options) == f"{tmp_path / 'o'}: 0 frames written, 3 finished before, 0 skipped\n"
    write_mat(tmp_path / "nyu.mat", *frames, SCENES)
    write_splits(tmp_path / "splits.mat", TRAIN, TEST)
    mat = ["--mat", tmp_path / "nyu.mat", "--splits", tmp_path / "splits.mat", "--depth", "grey"]
    assert "was prepared with other settings" in run(*mat, "--out", tmp_path / "o", code=1)


def test_broken_images_are_named_and_the_others_written(run, copy, tmp_path, capfd):
    data = (copy / "images" / "0.png").read_bytes()
    (copy / "images" / "0.png").write_bytes(data[: len(data) // 2])
    Image.fromarray(np.full((480, 640), 900, np.uint16)).save(copy / "depths" / "1.png")
    assert main(["prepare", "nyud2", *map(str, from_images(copy)), "--out", str(tmp_path / "o"), "--workers", "1"]) == 0
    said = capfd.readouterr()
    assert said.out == f"{tmp_path / 'o'}: 1 frames written, 0 finished before, 2 skipped\n"
    lines = said.err.splitlines()
    assert lines[0] == "broken, skipped: 2 frames"
    assert lines[1].startswith("  0.png, 0.png: cannot be read: 0.png (")
    assert lines[2] == "  1.png, 1.png: 1.png must be grey in 8 bits (mode L), got mode I;16"
    assert list(pairs(tmp_path / "o")) == TARGETS[:1]


def test_images_of_another_size_are_told(run, copy, tmp_path):
    for i in range(3):
        Image.new("RGB", (320, 240)).save(copy / "images" / f"{i}.png")
    said = run(*from_images(copy), "--out", tmp_path / "o", code=1)
    assert "0.png, 0.png: image is uint8 (240, 320, 3) and depth (480, 640), height by width" in said
    assert said.endswith("no frame could be written\n")


def rewrite(name, text):
    return lambda root: (root / name).write_text(text)


FAULTS = {
    "no folder": (lambda root: (root / "images").rename(root / "x"), "--images: .*images cannot be read as a folder"),
    "a missing frame": (
        lambda root: (root / "depths" / "1.png").unlink(),
        "--depths: .* lacks 1 of the 3 images that --meta lists, image 1 for one; they must be numbered from 0 to 2",
    ),
    "one too many": (
        lambda root: (root / "images" / "2.png").rename(root / "images" / "3.png"),
        "--images: .* lacks 1 of the 3 images",
    ),
    "a list that is shorter": (
        rewrite("meta/sceneTypes.csv", "SceneTypes\nkitchen\nstudy\n"),
        "--images: .* has an image 2, and --meta lists images 0 to 1",
    ),
    "a list that is longer": (
        rewrite("meta/sceneTypes.csv", "SceneTypes\n" + "study\n" * 5),
        "--images: .* lacks 2 of the 5 images that --meta lists, image 3 for one",
    ),
    "an index outside": (
        rewrite("meta/val_indexes.csv", "Index\n4\n"),
        "--meta: .* names image 4 for test, and there are images 1 to 3",
    ),
    "an index twice": (
        rewrite("meta/val_indexes.csv", "Index\n3\n1\n"),
        "--meta: .* names image 1 twice, at last for test",
    ),
    "no number": (
        rewrite("meta/train_indexes.csv", "Index\n1\n2.5\n"),
        r"--meta: .*train_indexes\.csv, line 3: must be a frame's number, got '2\.5'",
    ),
    "no list": (lambda root: (root / "meta/val_indexes.csv").unlink(), r"--meta: no file .*val_indexes\.csv"),
    "an empty list": (rewrite("meta/train_indexes.csv", "Index\n"), "has nothing under its heading"),
    "no text": (lambda root: (root / "meta/sceneTypes.csv").write_bytes(b"\xff\n\xfe"), "cannot be read"),
    "two of a number": (
        lambda root: (root / "images" / "01.jpg").write_bytes(b""),
        r"--images: .* has two images 1, 01\.jpg and 1\.png",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_does_not_fit_is_one_line_and_nothing_is_written(run, copy, tmp_path, fault):
    damage, expected = FAULTS[fault]
    damage(copy)
    said = run(*from_images(copy), "--out", tmp_path / "o", code=1)
    assert said.count("\n") == 1
    with pytest.raises(AssertionError, match=expected):
        raise AssertionError(said)
    assert not (tmp_path / "o").exists()


def test_other_files_and_leading_zeros_do_not_matter(copy):
    (copy / "images" / "1.png").rename(copy / "images" / "0001.png")
    for name in ("Thumbs.db", "list.txt", "preview.png", "-1.png", "².png"):
        (copy / "images" / name).write_bytes(b"")
    assert [frame.source for frame in plan_images(copy / "images", copy / "depths", copy / "meta")] == [
        "0001.png, 1.png",
        "0.png, 0.png",
        "2.png, 2.png",
    ]


@pytest.mark.parametrize(
    ("given", "got"),
    [
        ([], "neither"),
        (["--mat"], "--mat"),
        (["--images", "--depths"], "--images and --depths"),
        (["--mat", "--splits", "--meta"], "--mat and --splits and --meta"),
        (["--splits", "--images", "--depths", "--meta"], "--splits and --images and --depths and --meta"),
    ],
)
def test_the_sources_exclude_each_other(run, tmp_path, given, got):
    options = [part for option in given for part in (option, tmp_path)]
    said = run(*options, "--out", tmp_path / "o", code=1)
    assert said.endswith(f"give either --mat and --splits, or --images, --depths and --meta; got {got}\n")
    assert not (tmp_path / "o").exists()


@pytest.mark.skipif("QMF_DATA_ROOT" not in os.environ, reason="QMF_DATA_ROOT is not set: no real frames")
def test_real_frames_give_the_same_pairs_from_both_sources(run, tmp_path):
    """Two real frames in the layout of the release's file, with the depth of their images, and as those images."""
    raw = Path(os.environ["QMF_DATA_ROOT"]) / "nyud2_raw"
    numbers = [5, 700]  # of the images; the lists count from 1
    scenes = (raw / "meta" / "sceneTypes.csv").read_text().splitlines()
    images = [np.asarray(Image.open(raw / "nyu_images" / f"{i}.jpg")) for i in numbers]
    depths = [np.asarray(Image.open(raw / "nyu_depths" / f"{i}.png")) * STEP for i in numbers]
    names = [scenes[i + 1] for i in numbers]
    write_images(tmp_path / "numbered", images, depths, names, [1], [2])
    write_mat(tmp_path / "nyu.mat", images, np.stack([smooth_steps(depth, STEP) for depth in depths]), names)
    write_splits(tmp_path / "splits.mat", [1], [2])
    run("--mat", tmp_path / "nyu.mat", "--splits", tmp_path / "splits.mat", "--out", tmp_path / "a")
    run(*from_images(tmp_path / "numbered"), "--out", tmp_path / "b")
    a, b = pairs(tmp_path / "a"), pairs(tmp_path / "b")
    assert list(a) == list(b) == [f"test/{scene_class(names[1])}/0002.png", f"train/{scene_class(names[0])}/0001.png"]
    for name, pair in a.items():
        off = np.abs(pair.astype(int) - b[name])
        assert off[:, :256].max() == 0
        assert (off > 1).mean() < 0.001  # rounding to single precision turns a normal where there is hardly a plane


@pytest.mark.skipif("QMF_DATA_ROOT" not in os.environ, reason="QMF_DATA_ROOT is not set: no real lists")
def test_the_real_lists_are_the_release_s_split():
    raw = Path(os.environ["QMF_DATA_ROOT"]) / "nyud2_raw"
    frames = plan_images(raw / "nyu_images", raw / "nyu_depths", raw / "meta")
    splits = read_splits(raw / "meta" / "splits.mat")
    scenes = (raw / "meta" / "sceneTypes.csv").read_text().splitlines()[1:]
    assert {frame.target for frame in frames} == {frame.target for frame in plan(scenes, splits, "splits.mat")}
    assert [sum(frame.target.startswith(split) for frame in frames) for split in ("train", "test")] == [795, 654]
    assert {frame.target.split("/")[1] for frame in frames} == set(DATA_SETS["nyud2"].classes)
    assert all(frame.source == f"{(i := int(frame.target[-8:-4]) - 1)}.jpg, {i}.png" for frame in frames)
