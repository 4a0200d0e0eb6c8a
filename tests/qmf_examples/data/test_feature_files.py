"""Reading files of features: what is in them, and one line for whatever is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest

from qmf_examples.data.feature_files import load_npz
from qmf_examples.errors import CommandError

SHARED = os.environ.get("QMF_DATA_ROOT")


def content():
    rng = np.random.default_rng(0)

    def rows(num, width):
        return rng.normal(size=(num, width)).astype(np.float16)

    return {
        "classes": np.array(["a", "b", "c"]),
        "train_y": np.arange(9) % 3,
        "test_y": np.arange(6) % 3,
        "train_rgb_clean": rows(9, 4),
        "train_rgb_flip": rows(9, 4),
        "train_rgb_ir_clean": rows(9, 5),
        "test_rgb_clean": rows(6, 4),
        "test_rgb_gauss_30": rows(6, 4),
        "test_rgb_black": rows(6, 4),
        "test_rgb_ir_clean": rows(6, 5),
        "test_rgb_ir_fog": rows(6, 5),
        "encoder": np.array("left alone"),
    }


def write(path, **changes):
    arrays = {**content(), **changes}
    np.savez(path, **{key: value for key, value in arrays.items() if value is not None})
    return path


def test_what_is_in_a_file(tmp_path):
    data = load_npz(write(tmp_path / "scenes.npz"))
    assert (data.name, data.classes) == ("scenes", ("a", "b", "c"))
    copies = {name: list(copies) for name, copies in data.train.items()}
    assert copies == {"rgb": ["clean", "flip"], "rgb_ir": ["clean"]}
    assert {name: list(copies) for name, copies in data.test.items()} == {
        "rgb": ["clean", "gauss_30", "black"],
        "rgb_ir": ["clean", "fog"],
    }
    assert data.copies == ("flip",)
    assert data.damages == ("gauss_30", "black", "fog")
    np.testing.assert_array_equal(data.test["rgb_ir"]["fog"], content()["test_rgb_ir_fog"])
    np.testing.assert_array_equal(data.test_labels, [0, 1, 2] * 2)


ROWS = np.ones((6, 4), np.float32)
BROKEN = {
    "no classes": ({"classes": None}, "there must be classes, got"),
    "no labels": ({"train_y": None, "test_y": None}, "there must be train_y, test_y, got"),
    "no modality": ({"train_rgb_clean": None, "train_rgb_ir_clean": None}, "there must be train_<modality>_clean, got"),
    "one class": ({"classes": np.array(["a"])}, r"classes must be the names of two at least, got shape \(1,\)"),
    "names of no shape": ({"classes": np.array("a")}, r"two at least, got shape \(\)"),
    "copy of nothing": ({"train_lidar_flip": ROWS}, "train_lidar_flip is of no modality"),
    "damage of nothing": ({"test_lidar_clean": ROWS}, "test_lidar_clean is of no modality"),
    "damage without a modality's clean": ({"train_rgb_ir_clean": None, "train_rgb_clean": None, "train_x_clean": ROWS},
        "train_rgb_flip is of no modality"),
    "no clean test": ({"test_rgb_ir_clean": None}, r"there must be test_rgb_ir_clean beside \['test_rgb_ir_fog'\]"),
    "no test at all": ({"test_rgb_ir_clean": None, "test_rgb_ir_fog": None}, "there must be test_rgb_ir_clean"),
    "taken name": ({"test_rgb_conflict": ROWS}, "test_rgb_conflict must have another name"),
    "train length": ({"train_rgb_flip": ROWS}, r"train_rgb_flip must be 9 rows of 4 features, got shape \(6, 4\)"),
    "test length": ({"test_rgb_black": ROWS[:5]}, r"test_rgb_black must be 6 rows of 4 features, got shape \(5, 4\)"),
    "width": ({"test_rgb_black": ROWS[:, :3]}, r"test_rgb_black must be 6 rows of 4 features, got shape \(6, 3\)"),
    "one dimension": ({"train_rgb_clean": np.ones(9)}, r"train_rgb_clean must be .* got shape \(9,\)"),
    "no features": ({"train_rgb_clean": np.ones((9, 0))}, r"train_rgb_clean must be .* got shape \(9, 0\)"),
    "integers": ({"test_rgb_black": ROWS.astype(int)}, "test_rgb_black must be floating point numbers, got int64"),
    "NaN": ({"test_rgb_black": ROWS * np.nan}, "test_rgb_black must be finite"),
    "infinite": ({"train_rgb_clean": np.full((9, 4), np.inf, np.float16)}, "train_rgb_clean must be finite"),
    "class too large": ({"test_y": np.arange(6)}, "test_y must be from 0 to 2, as there are 3 classes, got 0 to 5"),
    "negative class": ({"train_y": np.arange(9) % 3 - 1}, "train_y must be from 0 to 2, .* got -1 to 1"),
    "labels that are no integers": ({"train_y": np.arange(9) / 9}, "train_y must be integers, .* got float64"),
    "labels of two dimensions": ({"train_y": np.zeros((9, 1), int)}, r"train_y must be integers.* got int64 \(9, 1\)"),
    "no samples": ({"test_y": np.zeros(0, int)}, "test_y must be integers, one a sample"),
    "pickled": ({"encoder": np.array([{}], dtype=object)}, "cannot read .*allow_pickle"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), BROKEN.values(), ids=list(BROKEN))
def test_says_in_a_line_what_is_wrong(tmp_path, changes, message):
    with pytest.raises(CommandError, match=message) as error:
        load_npz(write(tmp_path / "scenes.npz", **changes))
    assert "scenes.npz" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_of_another_kind(tmp_path):
    (tmp_path / "a.npz").write_text("no archive")
    with pytest.raises(CommandError, match=r"cannot read .*a\.npz"):
        load_npz(tmp_path / "a.npz")
    np.save(tmp_path / "b.npy", np.ones(3))
    (tmp_path / "b.npy").rename(tmp_path / "b.npz")
    with pytest.raises(CommandError, match=r"cannot read .*b\.npz"):
        load_npz(tmp_path / "b.npz")


@pytest.mark.skipif(SHARED is None, reason="QMF_DATA_ROOT is not set: no real features to read")
@pytest.mark.parametrize(
    ("name", "train", "test", "widths", "damages"),
    [
        ("nyud2", 795, 654, {"rgb": 1280, "depth": 1280}, 6),
        ("mvsa", 1555, 519, {"text": 384, "image": 1280}, 5),
    ],
)
def test_real_files(name, train, test, widths, damages):
    data = load_npz(Path(SHARED) / "features" / f"{name}.npz")
    assert (len(data.train_labels), len(data.test_labels), len(data.damages)) == (train, test, damages)
    assert {modality: copies["clean"].shape[1] for modality, copies in data.test.items()} == widths


@pytest.mark.parametrize("value", [1e39, -1e39])
def test_what_single_precision_cannot_hold_is_told(tmp_path, value):
    with pytest.raises(CommandError, match="test_rgb_black must be finite, in single precision too"):
        load_npz(write(tmp_path / "scenes.npz", test_rgb_black=np.full((6, 4), value)))
