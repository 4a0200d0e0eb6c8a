"""``prepare nyud2`` on a synthetic HDF5 file."""

import numpy as np
import pytest
from PIL import Image

from qmf_examples.data.catalogue import DATA_SETS
from qmf_examples.data.faults import DataError
from qmf_examples.prepare.frames import Frame, prepare_frames
from qmf_examples.prepare.nyud2 import scene_class
from qmf_examples.prepare.nyud2_mat import mat_converter, plan_mat, read_splits

TILT = np.radians(20)

SCENES = ["bedroom", "kitchen", "study", "home_office", "office", "living_room", "bookstore", "cafe"]


@pytest.fixture
def nyu(tmp_path):
    h5py = pytest.importorskip("h5py", reason="h5py is in the extra [examples]")
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 3, 640, 480), dtype=np.uint8)
    v = np.indices((480, 640))[0]
    y = (v + 1 - 253.73616633) / 519.46961112
    down, forward = y * np.cos(TILT) + np.sin(TILT), np.cos(TILT) - y * np.sin(TILT)
    with np.errstate(divide="ignore"):
        depth = np.minimum(np.where(down > 0, 1.3 / down, np.inf), 2.5 / forward)
    with h5py.File(tmp_path / "nyu.mat", "w") as file:
        file["images"] = images
        file["depths"] = np.broadcast_to(depth.T.astype(np.float32), (8, 640, 480))
        strings = [file.create_dataset(f"#refs#/{i}", data=[[ord(c)] for c in name]) for i, name in enumerate(SCENES)]
        file["sceneTypes"] = np.array([[s.ref for s in strings]], dtype=h5py.ref_dtype)
    savemat(tmp_path / "splits.mat", {"trainNdxs": [[1], [2], [3], [4]], "testNdxs": [[5], [6], [7], [8]]})
    return tmp_path, images


def test_nyud2_images_classes_and_geometry(nyu):
    root, images = nyu
    frames = plan_mat(root / "nyu.mat", root / "splits.mat")
    assert sorted(frame.target for frame in frames) == [
        "test/bookstore/0007.png",
        "test/living_room/0006.png",
        "test/office/0005.png",
        "test/others/0008.png",
        "train/bedroom/0001.png",
        "train/home_office/0004.png",
        "train/kitchen/0002.png",
        "train/others/0003.png",
    ]
    outcome = prepare_frames(
        frames[1:2], mat_converter(root / "nyu.mat", "hha", True), root / "out", {}, size=0, workers=1
    )
    assert outcome.written == 1
    pair = np.asarray(Image.open(root / "out/train/kitchen/0002.png"))
    assert pair.shape == (427, 2 * 561, 3)
    assert np.array_equal(pair[:, :561], images[1].transpose(2, 1, 0)[44:471, 40:601])
    floor, wall = pair[-40:, 700:1000].astype(int), pair[20:60, 700:1000].astype(int)
    assert np.abs(floor[..., 2] - 38).max() <= 1
    assert np.abs(floor[..., 1]).max() <= 1
    assert np.abs(wall[..., 2] - 128).max() <= 1
    _, grey = mat_converter(root / "nyu.mat", "grey", False)("1")
    assert grey.shape == (480, 640, 3)


def test_nyud2_without_depth_is_a_broken_image_and_inpainted_depth_is_kept(nyu):
    h5py = pytest.importorskip("h5py", reason="h5py is in the extra [examples]")
    root, _ = nyu
    with h5py.File(root / "gaps.mat", "w") as file, h5py.File(root / "nyu.mat") as whole:
        for name in ("images", "sceneTypes"):
            file[name] = whole[name][:2]
        depths, raw = whole["depths"][:2], whole["depths"][:2]
        raw[1, 100:500, 100:200] = 0  # inpainted in depths, with something that is no plane
        depths[1, 100:500, 100:200] = 0.7 + np.random.default_rng(0).random((400, 100))
        raw[0] = 0
        file["depths"], file["rawDepths"] = depths, raw
    convert = mat_converter(root / "gaps.mat", "hha", True)
    outcome = prepare_frames([Frame("1", "a.png"), Frame("2", "b.png")], convert, root / "o", {}, size=0, workers=1)
    assert [str(fault) for fault in outcome.faults] == ["1: cannot be used (depth has no pixel whose depth is known)"]
    assert outcome.written == 1
    with Image.open(root / "o" / "b.png") as pair:
        encoded = np.asarray(pair)[:, 561:].astype(int)
    expected = 310 / np.maximum(depths[1].T[44:471, 40:601], 1)
    assert np.abs(encoded[..., 0] - np.clip(expected, 0, 255)).max() <= 0.51
    assert np.abs(encoded[-20:, 300:500, 2] - 38).max() <= 1


def test_nyud2_faults_are_told(nyu, tmp_path):
    from scipy.io import savemat

    root, _ = nyu
    with pytest.raises(DataError, match="--mat: no file"):
        plan_mat(root / "nowhere.mat", root / "splits.mat")
    with pytest.raises(DataError, match="cannot be read as HDF5"):
        plan_mat(root / "splits.mat", root / "splits.mat")
    with pytest.raises(DataError, match="cannot be read as a MATLAB file"):
        plan_mat(root / "nyu.mat", root / "nyu.mat")
    savemat(root / "far.mat", {"trainNdxs": [[1]], "testNdxs": [[9]]})
    with pytest.raises(DataError, match=r"names image 9 for test, and there are images 1 to 8"):
        plan_mat(root / "nyu.mat", root / "far.mat")
    savemat(root / "both.mat", {"trainNdxs": [[1]], "testNdxs": [[1]]})
    with pytest.raises(DataError, match="names image 1 twice, at last for test"):
        plan_mat(root / "nyu.mat", root / "both.mat")
    savemat(root / "half.mat", {"trainNdxs": [[1]]})
    with pytest.raises(DataError, match="no variable 'testNdxs'"):
        plan_mat(root / "nyu.mat", root / "half.mat")


@pytest.mark.parametrize("number", [np.nan, np.inf, 1.5, 1j])
def test_nyud2_splits_must_hold_whole_numbers(tmp_path, number):
    from scipy.io import savemat

    savemat(tmp_path / "odd.mat", {"trainNdxs": [[2], [number]], "testNdxs": [[3]]})
    with pytest.raises(DataError, match=r"--splits: .*odd\.mat must hold numbers"):
        read_splits(tmp_path / "odd.mat")


def tall(_):
    return (np.zeros((250_001, 1, 3), np.uint8),) * 2


def test_a_frame_that_resizing_would_make_too_large_on_its_way_is_told(tmp_path):
    outcome = prepare_frames([Frame("1", "a.png")], tall, tmp_path / "o", {}, size=256, workers=1)
    assert outcome.written == 0
    assert str(outcome.faults[0]).startswith("1: refused: 1 x 250001 pixels would be resized by way of 256 x 250001")


def test_nyud2_scene_types_and_places():
    assert scene_class("bathroom") == "bathroom"
    assert scene_class("bookstore_0001f") == "bookstore"
    assert scene_class("office_kitchen_0001a") == "others"
    assert {scene_class(s) for s in SCENES} <= set(DATA_SETS["nyud2"].classes)
