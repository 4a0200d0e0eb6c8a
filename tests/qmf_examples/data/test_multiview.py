"""Reading multi-view files in each layout."""

import os
from pathlib import Path

import numpy as np
import pytest

scipy_io = pytest.importorskip("scipy.io")

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
