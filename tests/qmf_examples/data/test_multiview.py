"""Reading multi-view files in each layout."""

import os
from pathlib import Path

import numpy as np
import pytest

scipy = pytest.importorskip("scipy")
scipy_io = pytest.importorskip("scipy.io")

from qmf_examples.cli import main  # noqa: E402
from qmf_examples.data.multiview import load_mat  # noqa: E402
from qmf_examples.errors import CommandError  # noqa: E402

N = 30
SHARED = os.environ.get("QMF_DATA_ROOT")


def cell(*views):
    out = np.empty((len(views), 1), dtype=object)
    for i, view in enumerate(views):
        out[i, 0] = view
    return out


@pytest.fixture
def views():
    rng = np.random.default_rng(0)
    return rng.normal(3, 2, (N, 4)), rng.normal(size=(N, 7))


@pytest.fixture
def labels():
    return np.repeat([2, 5, 9], 10)


@pytest.mark.parametrize("label", ["y", "Y", "gt"])
def test_reads_a_cell_of_views_either_way_up(tmp_path, views, labels, label):
    from scipy.sparse import csc_matrix

    scipy_io.savemat(tmp_path / "a.mat", {"X": cell(views[0], csc_matrix(views[1]).T), label: labels})
    data = load_mat(tmp_path / "a.mat")
    assert data.name == "a"
    np.testing.assert_allclose(data.views["0"], views[0])
    np.testing.assert_allclose(data.views["1"], views[1])
    np.testing.assert_array_equal(data.labels, np.repeat([0, 1, 2], 10))


def test_reads_views_in_two_parts(tmp_path, views, labels):
    content = {"gt_train": labels[:20], "gt_test": labels[20:]}
    for i, view in enumerate(views, 1):
        content |= {f"x{i}_train": view[:20], f"x{i}_test": view[20:]}
    scipy_io.savemat(tmp_path / "b.mat", content)
    data = load_mat(tmp_path / "b.mat")
    np.testing.assert_allclose(data.views["1"], views[1])
    assert len(data.labels) == N


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"Z": np.ones(3)}, r"must hold X and one of y, Y, gt.*\['Z'\]"),
        ({"X": np.ones((3, 2)), "y": np.arange(3)}, "X must be a cell"),
        ({"X": cell(np.ones((4, 5))), "y": np.arange(3)}, "view 0 must have 3 rows or columns"),
        ({"X": cell(np.full((3, 2), np.nan)), "y": np.arange(3)}, "finite"),
        ({"X": cell(np.ones((3, 2))), "y": np.ones(3)}, "two classes"),
    ],
)
def test_says_what_is_wrong_with_a_file(tmp_path, content, match):
    scipy_io.savemat(tmp_path / "c.mat", content)
    with pytest.raises(CommandError, match=match):
        load_mat(tmp_path / "c.mat")


def structure():
    return {"X": {"a": np.ones(3)}, "y": np.arange(3)}


def two_parts(**changes):
    content = {"x1_train": np.ones((3, 2)), "x1_test": np.ones((2, 2)), "gt_train": np.arange(3), "gt_test": [0, 1]}
    return {name: value for name, value in {**content, **changes}.items() if value is not None}


def one_view(view=None, labels=None):
    view = np.arange(6.0).reshape(3, 2) if view is None else view
    return {"X": cell(view), "y": np.arange(3) if labels is None else labels}


def sparse(shape):
    return scipy.sparse.csc_matrix(([1.0], ([0], [0])), shape=shape)


BROKEN = {
    "a NaN label": (one_view(labels=[0.0, 1.0, np.nan]), "y must be whole numbers, got nan"),
    "an infinite label": (one_view(labels=[0.0, 1.0, np.inf]), "y must be whole numbers, got inf"),
    "half a label": (one_view(labels=[0.0, 1.0, 1.5]), "y must be whole numbers, got 1.5"),
    "complex labels": (one_view(labels=[0, 1, 2j]), "y must be whole numbers, one a sample, got complex128"),
    "labels as text": (one_view(labels="abc"), "y must be whole numbers, one a sample, got <U"),
    "labels as a cell": (one_view(labels=cell("a", "b", "c")), "y must be whole numbers, one a sample, got object"),
    "a column of labels for each class": (one_view(labels=np.eye(3)), r"y must be .* got float64 \(3, 3\)"),
    "no labels": (one_view(labels=np.zeros((0, 0))), "y must be whole numbers, one a sample"),
    "a complex view": (one_view(np.ones((3, 2)) * 1j), r"view 0 must be a matrix of real numbers, got complex128"),
    "a complex sparse view": (one_view(sparse((3, 2)) * 1j), "view 0 must be a matrix of real numbers, got complex128"),
    "a cell in a cell": (one_view(cell(np.ones(2), np.ones(3))), "view 0 must be a matrix of real numbers, got object"),
    "a view of text": (one_view("abc"), "view 0 must be a matrix of real numbers, got <U"),
    "a view of structures": (one_view({"a": 1}), "view 0 must be a matrix of real numbers"),
    "three dimensions": (one_view(np.ones((3, 2, 2))), r"view 0 must be a matrix .* got float64 \(3, 2, 2\)"),
    "no columns": (one_view(np.ones((3, 0))), r"view 0 must be a matrix of real numbers"),
    "an infinite value": (one_view([[np.inf, 1], [1, 1], [1, 1]]), "view 0 must be finite"),
    "too large for single precision": (one_view(np.full((3, 2), 1e39)), "view 0 must be finite, in single precision"),
    "a sparse view of terabytes": (one_view(sparse((10**9, 3))), "view 0 must have at most 500,000,000 values"),
    "no views": ({"X": np.empty((0, 0), object), "y": np.arange(3)}, "X must be a cell of views"),
    "a structure": (structure(), "X must be a cell of views"),
    "a part without its other": (two_parts(x1_test=None, gt_test=None), "there must be x1_test, gt_test beside"),
    "parts of two widths": (two_parts(x1_test=np.ones((2, 3))), r"x1_test must have \(2, 2\) rows and columns, got"),
    "fewer rows than labels": (two_parts(gt_train=np.arange(4)), r"x1_train must have \(4, 2\) rows and columns"),
    "a NaN label of a part": (two_parts(gt_test=[0, np.nan]), "gt_test must be whole numbers, got nan"),
    "a complex part": (two_parts(x1_test=np.ones((2, 2)) * 1j), "x1_test must be a matrix of real numbers"),
}


@pytest.mark.parametrize(("content", "message"), BROKEN.values(), ids=list(BROKEN))
def test_poison_is_told_in_one_line(tmp_path, content, message):
    path = tmp_path / "poison.mat"
    scipy_io.savemat(path, content)
    with pytest.raises(CommandError, match=message) as error:
        load_mat(path)
    assert "poison.mat" in str(error.value)
    assert "\n" not in str(error.value)


def test_poison_ends_the_command_with_a_status(tmp_path, capsys):
    path = tmp_path / "poison.mat"
    scipy_io.savemat(path, one_view(labels=[0.0, 1.0, np.nan]))
    assert main(["bench-robustness", "--quick", "--no-digits", "--output", str(tmp_path / "out"), str(path)]) == 1
    poisoned = f"qmf-fusion: error: {path}: y must be whole numbers, got nan and 0 more that are none\n"
    assert capsys.readouterr().err == poisoned
    scipy_io.savemat(path, one_view())
    assert main(["bench-robustness", "--quick", "--no-digits", "--output", str(tmp_path / "out"), str(path)]) == 1
    assert "a set must have 5 samples at least" in capsys.readouterr().err


def test_whole_numbers_of_any_type_are_labels(tmp_path):
    for labels in (np.array([0.0, 1.0, 7.0]), np.array([3, 4, 9], np.uint8), np.arange(3)[:, None]):
        scipy_io.savemat(tmp_path / "e.mat", one_view(labels=labels))
        assert load_mat(tmp_path / "e.mat").labels.tolist() == [0, 1, 2]


def test_a_file_that_is_no_mat_file(tmp_path):
    (tmp_path / "d.mat").write_text("not a matrix")
    with pytest.raises(CommandError, match="cannot read"):
        load_mat(tmp_path / "d.mat")


@pytest.mark.skipif(SHARED is None, reason="QMF_DATA_ROOT is not set: no real multi-view files to read")
@pytest.mark.parametrize(("name", "samples", "views"), [("handwritten_6views", 2000, 6), ("wikipedia", 2866, 2)])
def test_real_files(name, samples, views):
    data = load_mat(Path(SHARED) / "multiview" / f"{name}.mat")
    assert (len(data.labels), len(data.views)) == (samples, views)
    assert set(np.unique(data.labels)) == set(range(10))
