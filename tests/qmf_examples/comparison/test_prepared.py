"""A set's split, scaling and conditions for one seed."""

import numpy as np
import pytest
import torch

from qmf_examples.comparison.prepared import DIGITS, ROBUSTNESS, fit_centre, prepare, split_60_40
from qmf_examples.corruption.conditions import FEATURES, VIEW_COPIES
from qmf_examples.data.digits import load_digits
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
    assert [test.condition for test in prepared.tests] == list(FEATURES)
    again, other = prepare(data, ROBUSTNESS, seed=1), prepare(data, ROBUSTNESS, seed=2)
    for a, b in zip(prepared.tests, again.tests, strict=True):
        assert torch.equal(a.views["0"], b.views["0"])
    assert not torch.equal(prepared.tests[1].views["0"], other.tests[1].views["0"])


def test_the_digits_have_images_to_damage():
    data = load_digits()
    assert [test.condition for test in prepare(data, DIGITS, seed=0).tests] == list(VIEW_COPIES)
    prepared = prepare(data, ROBUSTNESS, seed=0)
    assert [test.condition for test in prepared.tests] == [*FEATURES, *VIEW_COPIES[1:]]
    clean, worst = prepared.tests[0], prepared.tests[len(FEATURES) + 2]
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
