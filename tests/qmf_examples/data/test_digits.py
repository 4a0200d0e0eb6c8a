"""The views: each against a direct computation or a symmetry that it must have."""

import numpy as np
import pytest

from qmf_examples.data.digits import VIEWS, Scaler, fourier, gradients, load_split, pixels, projections

IMAGES = np.random.default_rng(1).random((5, 8, 8))


def test_the_split_is_of_all_images_stratified_seeded_and_scaled():
    train, test = load_split(0)
    assert sorted([*train.ids, *test.ids]) == list(range(1797))
    for part in (train, test):
        assert part.images.min() == 0
        assert part.images.max() == 1
        assert part.images.shape[1:] == (8, 8)
    shares = [np.bincount(part.labels, minlength=10) / len(part.labels) for part in (train, test)]
    assert abs(shares[0] - shares[1]).max() < 0.002
    np.testing.assert_array_equal(load_split(0)[1].ids, test.ids)
    assert (load_split(1)[1].ids != test.ids).any()


def test_there_are_at_least_four_views_of_one_image_each():
    assert len(VIEWS) >= 4
    for look in VIEWS.values():
        features = look(IMAGES)
        assert features.shape[0] == 5
        assert features.ndim == 2
        np.testing.assert_allclose(look(IMAGES[2:3]), features[2:3])  # no image sees another
    assert len({look(IMAGES).shape[1] for look in VIEWS.values()}) == len(VIEWS)


def test_pixels_are_the_image():
    np.testing.assert_array_equal(pixels(IMAGES).reshape(5, 8, 8), IMAGES)


def test_fourier_magnitudes_equal_the_definition_and_ignore_cyclic_shifts():
    grid = np.arange(8)
    waves = np.exp(-2j * np.pi * np.outer(grid, grid) / 8)
    expected = abs(waves @ IMAGES[0] @ waves.T / 8)[:, :5]
    np.testing.assert_allclose(fourier(IMAGES)[0].reshape(8, 5), expected, atol=1e-12)
    np.testing.assert_allclose(fourier(np.roll(IMAGES, (2, 3), (1, 2))), fourier(IMAGES), atol=1e-12)


@pytest.mark.parametrize(("axis", "sign", "direction"), [(2, 1, 0), (1, 1, 2), (2, -1, 4), (1, -1, 6)])
def test_a_ramp_has_one_gradient_direction(axis, sign, direction):
    ramp = np.arange(8) / 8
    image = np.broadcast_to(ramp if axis == 2 else ramp[:, None], (1, 8, 8))
    histograms = gradients(image if sign == 1 else -image).reshape(4, 8)
    expected = np.zeros((4, 8))
    expected[:, direction] = 16 / 8  # 16 pixels a cell, each with a slope of 1/8
    np.testing.assert_allclose(histograms, expected)


def test_gradients_stay_in_their_cell_and_vanish_on_flat_images():
    assert (gradients(np.ones((1, 8, 8))) == 0).all()
    image = np.zeros((1, 8, 8))
    image[0, 1, 1] = 1
    cells = gradients(image).reshape(4, 8).sum(1)
    assert cells[0] > 0
    assert (cells[1:] == 0).all()


def test_projections_are_means_along_lines():
    got, image = projections(IMAGES)[0], IMAGES[0]
    expected = [*image.mean(1), *image.mean(0)]
    expected += [np.diagonal(image, -n).mean() for n in range(-7, 8)]
    expected += [np.diagonal(image[::-1], n).mean() for n in range(-7, 8)]
    np.testing.assert_allclose(got, expected, atol=1e-12)


def test_the_scaler_centres_and_leaves_constant_features_harmless():
    features = np.random.default_rng(2).normal(3.0, 2.0, (100, 6))
    features[:, 0] = 0.0
    scaler = Scaler.fit(features)
    scaled = scaler(features)
    assert scaled.dtype == np.float32
    np.testing.assert_allclose(scaled.mean(0), 0, atol=1e-6)
    assert scaler(np.full((1, 6), 1.0))[0, 0] == pytest.approx(1 / features.std(0).mean())
