"""Damage: what it does to pixels, to which views, and that it depends on nothing but its seed."""

import numpy as np
import pytest

from qmf_examples.corruption.view_copies import CORRUPTIONS, choose_views, corrupt

IMAGES = np.random.default_rng(0).random((200, 8, 8)) * 0.5 + 0.25
IDS = np.arange(200) * 7
HALF = choose_views(4, IDS, seed=1)
KINDS = list(CORRUPTIONS)


@pytest.mark.parametrize("views", [1, 2, 3, 4, 5])
def test_half_of_each_samples_views_are_chosen(views):
    chosen = choose_views(views, IDS, seed=1)
    assert chosen.shape == (views, 200)
    assert (chosen.sum(0) == views // 2).all()


def test_every_view_is_chosen_about_equally_often_and_by_sample():
    chosen = choose_views(4, np.arange(4000), seed=1)
    # Binomial(4000, 1/2) has a standard deviation of 32: five of them.
    assert (abs(chosen.sum(1) - 2000) < 160).all()
    assert len({tuple(column) for column in chosen.T}) == 6  # all pairs of four views occur


@pytest.mark.parametrize("kind", KINDS)
def test_only_chosen_copies_change_and_stay_in_range(kind):
    for level in CORRUPTIONS[kind].levels:
        copies = corrupt(IMAGES, IDS, HALF, kind, level, seed=2)
        assert copies.shape == (4, 200, 8, 8)
        assert copies.min() >= 0
        assert copies.max() <= 1
        changed = (copies != IMAGES).any((2, 3))
        assert not changed[~HALF].any()
        assert changed[HALF].mean() > 0.99  # salt-and-pepper at 0.1 leaves 0.9**64 = 0.1 % of copies whole


@pytest.mark.parametrize("kind", KINDS)
def test_the_views_copies_are_damaged_each_in_its_own_way(kind):
    copies = corrupt(IMAGES, IDS, np.ones((4, 200), dtype=bool), kind, CORRUPTIONS[kind].levels[0], seed=2)
    alike = (copies[0] == copies[1]).all((1, 2))
    assert alike.mean() < 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_damage_depends_on_seed_kind_and_sample_alone(kind):
    level = CORRUPTIONS[kind].levels[1]
    np.random.seed(0)
    whole = corrupt(IMAGES, IDS, HALF, kind, level, seed=2)
    state = np.random.get_state()[1].copy()
    some = np.array([150, 3, 77])
    np.testing.assert_array_equal(corrupt(IMAGES[some], IDS[some], HALF[:, some], kind, level, seed=2), whole[:, some])
    assert (np.random.get_state()[1] == state).all()  # the global generator is neither read nor reseeded
    assert (corrupt(IMAGES, IDS, HALF, kind, level, seed=3) != whole).any()


@pytest.mark.parametrize("kind", KINDS)
def test_a_level_of_zero_changes_nothing_and_more_changes_more(kind):
    np.testing.assert_array_equal(corrupt(IMAGES, IDS, HALF, kind, 0.0, seed=2), np.repeat(IMAGES[None], 4, 0))
    sizes = [abs(corrupt(IMAGES, IDS, HALF, kind, level, 2) - IMAGES).mean() for level in CORRUPTIONS[kind].levels]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_gaussian_noise_has_the_standard_deviation_asked_for_before_clipping():
    grey = np.full((500, 8, 8), 0.5)
    everything = np.ones((2, 500), dtype=bool)
    noise = corrupt(grey, np.arange(500), everything, "gaussian", 0.05, seed=0) - 0.5
    assert abs(noise.std() - 0.05) < 0.001  # 64,000 draws: standard error 0.00014
    assert abs(noise.mean()) < 0.001
    clipped = corrupt(grey, np.arange(500), everything, "gaussian", 5.0, seed=0)
    # Clipped at both ends, where the released code lets dark pixels wrap round to white.
    assert 0.4 < (clipped == 0).mean() < 0.5
    assert 0.4 < (clipped == 1).mean() < 0.5


def test_salt_and_pepper_hits_the_share_of_pixels_asked_for():
    grey = np.full((500, 8, 8), 0.5)
    copies = corrupt(grey, np.arange(500), np.ones((2, 500), dtype=bool), "salt-and-pepper", 0.3, seed=0)
    assert set(np.unique(copies)) == {0.0, 0.5, 1.0}
    assert abs((copies == 0).mean() - 0.15) < 0.01
    assert abs((copies == 1).mean() - 0.15) < 0.01


@pytest.mark.parametrize("side", [1, 3, 6, 8, 20])
def test_occlusion_covers_one_square_inside_of_the_image(side):
    copies = corrupt(np.ones((50, 8, 8)), np.arange(50), np.ones((2, 50), dtype=bool), "occlusion", side, seed=0)
    side = min(side, 8)
    for copy in copies.reshape(-1, 8, 8):
        rows, columns = np.nonzero(copy == 0.5)
        assert len(rows) == side * side
        assert np.ptp(rows) == np.ptp(columns) == side - 1
    if side < 8:
        assert len({copy.tobytes() for copy in copies.reshape(-1, 8, 8)}) > 3  # not all in one place


def test_errors_name_the_argument():
    with pytest.raises(ValueError, match=r"kind must be one of .*occlusion.*got 'fog'"):
        corrupt(IMAGES, IDS, HALF, "fog", 1.0, 0)
    with pytest.raises(ValueError, match=r"level must be at least 0, got -1"):
        corrupt(IMAGES, IDS, HALF, "gaussian", -1.0, 0)
