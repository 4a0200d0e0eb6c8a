"""Reading multi-view files in each layout, splitting and corrupting them."""

import os
from pathlib import Path

import numpy as np
import pytest

scipy_io = pytest.importorskip("scipy.io")

from qmf_examples.data.multiview import CONDITIONS, corrupt, load_digits, load_mat, prepare  # noqa: E402
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
    np.testing.assert_allclose(data.views[0], views[0])
    np.testing.assert_allclose(data.views[1], views[1])
    np.testing.assert_array_equal(data.labels, np.repeat([0, 1, 2], 10))


def test_reads_views_in_two_parts(tmp_path, views, labels):
    content = {"gt_train": labels[:20], "gt_test": labels[20:]}
    for i, view in enumerate(views, 1):
        content |= {f"x{i}_train": view[:20], f"x{i}_test": view[20:]}
    scipy_io.savemat(tmp_path / "b.mat", content)
    data = load_mat(tmp_path / "b.mat")
    np.testing.assert_allclose(data.views[1], views[1])
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


def test_split_and_scale(tmp_path, views, labels):
    scipy_io.savemat(tmp_path / "a.mat", {"X": cell(*views), "y": labels})
    data = load_mat(tmp_path / "a.mat")
    prepared = prepare(data, seed=1)
    assert np.bincount(prepared.test_labels).tolist() == [2, 2, 2]
    assert len(prepared.train_labels) == 24
    np.testing.assert_allclose(prepared.train[0].mean(0), 0, atol=1e-12)
    np.testing.assert_allclose(prepared.train[0].std(0), 1)
    assert [c.name for c in prepared.conditions] == list(CONDITIONS)
    again, other = prepare(data, seed=1), prepare(data, seed=2)
    for a, b in zip(prepared.conditions, again.conditions, strict=True):
        np.testing.assert_array_equal(a.views[0], b.views[0])
    assert not np.array_equal(prepared.conditions[1].views[0], other.conditions[1].views[0])


def test_corruptions_do_what_they_say():
    rng = np.random.default_rng(0)
    views = [rng.normal(size=(500, 3)) for _ in range(5)]
    for name in CONDITIONS[1:]:
        condition = corrupt(views, name, seed=0)
        assert (condition.corrupted.sum(0) == 2).all()
        for before, after, hit in zip(views, condition.views, condition.corrupted, strict=True):
            np.testing.assert_array_equal(after[~hit], before[~hit])
            if name == "blank":
                assert (after[hit] == 0).all()
            elif name == "conflict":
                assert {tuple(row) for row in after} <= {tuple(row) for row in before}
                assert (after[hit] != before[hit]).any(1).mean() > 0.95
            else:
                assert (after - before)[hit].std() == pytest.approx(float(name.split()[1]), rel=0.1)
    with pytest.raises(ValueError, match="condition must be one of"):
        corrupt(views, "fire", seed=0)


def test_the_digits_have_images_to_damage():
    data = load_digits()
    assert [view.shape for view in data.views] == [(1797, 64), (1797, 40), (1797, 32), (1797, 46)]
    prepared = prepare(data, seed=0, images=True)
    clean, worst = prepared.conditions[0], prepared.conditions[3]
    np.testing.assert_allclose(clean.views[0], prepare(data, seed=0).conditions[0].views[0])
    for before, after, hit in zip(clean.views, worst.views, worst.corrupted, strict=True):
        np.testing.assert_array_equal(after[~hit], before[~hit])
        assert (after[hit] != before[hit]).any(1).all()


@pytest.mark.skipif(SHARED is None, reason="QMF_DATA_ROOT is not set: no real multi-view files to read")
@pytest.mark.parametrize(("name", "samples", "views"), [("handwritten_6views", 2000, 6), ("wikipedia", 2866, 2)])
def test_real_files(name, samples, views):
    data = load_mat(Path(SHARED) / "multiview" / f"{name}.mat")
    assert (len(data.labels), len(data.views)) == (samples, views)
    assert set(np.unique(data.labels)) == set(range(10))
