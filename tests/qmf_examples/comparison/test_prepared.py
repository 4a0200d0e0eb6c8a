"""A set's split, scaling and conditions for one seed."""

import numpy as np
import pytest
import torch

from qmf_examples.comparison.prepared import DIGITS, ROBUSTNESS, fit_centre, prepare, prepare_file, split_60_40
from qmf_examples.corruption.conditions import FEATURES, UNSEEN, VIEW_COPIES
from qmf_examples.data.digits import load_digits
from qmf_examples.data.feature_files import FeatureFile
from qmf_examples.data.multiview import MultiView


def test_split_and_scale():
    rng = np.random.default_rng(0)
    views = {"0": rng.normal(3, 2, (30, 4)), "1": rng.normal(size=(30, 7))}
    data = MultiView("a", views, np.repeat([0, 1, 2], 10))
    prepared = prepare(data, ROBUSTNESS, seed=1)
    assert prepared.test_labels.bincount().tolist() == [2, 2, 2]
    assert len(prepared.train_labels) == 24
    np.testing.assert_allclose(prepared.train["0"].mean(0), 0, atol=1e-6)
    np.testing.assert_allclose(prepared.train["0"].std(0, correction=0), 1, rtol=1e-6)
    assert [test.condition for test in prepared.tests] == [*FEATURES, *UNSEEN]
    again, other = prepare(data, ROBUSTNESS, seed=1), prepare(data, ROBUSTNESS, seed=2)
    for a, b in zip(prepared.tests, again.tests, strict=True):
        assert torch.equal(a.views["0"], b.views["0"])
    assert not torch.equal(prepared.tests[1].views["0"], other.tests[1].views["0"])


def test_the_digits_have_images_to_damage():
    data = load_digits()
    assert [test.condition for test in prepare(data, DIGITS, seed=0).tests] == list(VIEW_COPIES)
    prepared = prepare(data, ROBUSTNESS, seed=0)
    assert [test.condition for test in prepared.tests] == [*FEATURES, *UNSEEN, *VIEW_COPIES[1:]]
    clean, worst = prepared.tests[0], prepared.tests[len(FEATURES) + len(UNSEEN) + 2]
    for before, after, hit in zip(clean.views.values(), worst.views.values(), worst.corrupted, strict=True):
        assert torch.equal(after[~hit], before[~hit])
        assert (after[hit] != before[hit]).any(1).all()


def test_the_digits_split_is_of_all_images_stratified_and_seeded():
    labels = load_digits().labels
    train, test = split_60_40(labels, 0)
    assert sorted([*train, *test]) == list(range(1797))
    shares = [np.bincount(labels[part], minlength=10) / len(part) for part in (train, test)]
    assert abs(shares[0] - shares[1]).max() < 0.002
    np.testing.assert_array_equal(split_60_40(labels, 0)[1], test)
    assert (split_60_40(labels, 1)[1] != test).any()


def test_the_digits_scale_centres_and_leaves_constant_features_harmless():
    features = np.random.default_rng(2).normal(3.0, 2.0, (100, 6))
    features[:, 0] = 0.0
    scale = fit_centre(features)
    np.testing.assert_allclose(scale(features).mean(0), 0, atol=1e-12)
    assert scale(np.full((1, 6), 1.0))[0, 0] == pytest.approx(1 / features.std(0).mean())


def feature_file():
    rng = np.random.default_rng(0)
    rows = [rng.normal(3, 2, size=(num, width)).astype(np.float16) for num in (40, 20) for width in (4, 5)]
    train = {"rgb": {"clean": rows[0], "flip": rows[0] + 100}, "depth": {"clean": rows[1]}}
    test = {
        "rgb": {"clean": rows[2], "fog": rows[2] - 50},
        "depth": {"clean": rows[3], "fog": rows[3] - 50, "dark": 0 * rows[3]},
    }
    return FeatureFile("scenes", ("a", "b"), train, np.arange(40) % 2, test, np.arange(20) % 2)


def test_a_file_is_scaled_by_its_clean_training_rows_and_damaged_by_halves():
    data = feature_file()
    prepared = prepare_file(data, seed=1)
    assert prepared.num_classes == 2
    assert [test.condition.name for test in prepared.tests] == ["clean", "fog", "dark", "conflict"]
    rgb = data.train["rgb"]["clean"].astype(np.float64)
    mean, deviation = rgb.mean(0), rgb.std(0)
    np.testing.assert_allclose(prepared.train["rgb"], (rgb - mean) / deviation, atol=1e-5)
    clean, fog, dark, conflict = prepared.tests
    assert not clean.corrupted.any()
    np.testing.assert_allclose(clean.views["rgb"], (data.test["rgb"]["clean"] - mean) / deviation, atol=1e-5)
    assert (fog.corrupted.sum(0) == 1).all()
    hit = fog.corrupted[0]
    fogged = np.clip((data.test["rgb"]["fog"] - mean) / deviation, -50, 50)
    np.testing.assert_allclose(fog.views["rgb"][hit], fogged[hit], atol=1e-4)
    assert torch.equal(fog.views["rgb"][~hit], clean.views["rgb"][~hit])
    assert not dark.corrupted[0].any()
    assert torch.equal(dark.views["rgb"], clean.views["rgb"])
    assert dark.corrupted[1].any()
    assert (conflict.corrupted.sum(0) == 1).all()
    rows = {tuple(row) for row in clean.views["depth"].tolist()}
    assert {tuple(row) for row in conflict.views["depth"].tolist()} <= rows
    other = prepare_file(data, seed=2)
    assert torch.equal(other.train["rgb"], prepared.train["rgb"])
    assert not torch.equal(other.tests[1].corrupted, fog.corrupted)


def test_training_takes_the_same_copy_of_all_modalities_of_a_sample():
    prepared = prepare_file(feature_file(), seed=0)
    [flip] = prepared.copies
    assert torch.equal(flip["depth"], prepared.train["depth"])  # which has no such copy
    index = torch.tensor([7, 3, 3])
    given = prepared.batch(index, torch.tensor([0, 1, 0]))
    assert torch.equal(given["rgb"], torch.stack([prepared.train["rgb"][7], flip["rgb"][3], prepared.train["rgb"][3]]))
    assert torch.equal(given["depth"], prepared.train["depth"][index])
    first, second = (prepared.draw_copies(seed=0, epoch=epoch) for epoch in (1, 2))
    assert set(first.tolist()) == {0, 1}
    assert not torch.equal(first, second)
    assert torch.equal(prepared.draw_copies(seed=0, epoch=1), first)
    assert not torch.equal(prepared.draw_copies(seed=1, epoch=1), first)
    alone = prepare(
        MultiView("a", {"0": np.random.default_rng(0).normal(size=(20, 3))}, np.arange(20) % 2), ROBUSTNESS, 0
    )
    assert not alone.draw_copies(seed=0, epoch=1).any()
