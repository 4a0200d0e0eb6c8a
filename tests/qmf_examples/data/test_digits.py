"""The digits and their views: each against a direct computation or a symmetry that it must have."""

import numpy as np
import pytest

from qmf_examples.data.digits import VIEWS, fourier, gradients, load_digits, pixels, projections

IMAGES = np.random.default_rng(1).random((5, 8, 8))


def test_the_images_are_all_there_and_lie_between_0_and_1():
    data = load_digits()
    assert data.images.shape == (1797, 8, 8)
    assert (data.images.min(), data.images.max()) == (0, 1)
    assert [view.shape for view in data.views.values()] == [(1797, 64), (1797, 40), (1797, 32), (1797, 46)]
    assert list(data.views) == list(data.looks) == list(VIEWS)
    assert data.num_classes == 10


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
