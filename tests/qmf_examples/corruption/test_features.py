"""Damage to feature views does what its name says, to half of each sample's views."""

import numpy as np
import pytest

from qmf_examples.corruption.conditions import CLEAN, FEATURES, UNSEEN, Condition
from qmf_examples.corruption.features import DAMAGES, corrupt, replace


@pytest.mark.parametrize("condition", [each for each in FEATURES if each != CLEAN], ids=lambda each: each.name)
def test_corruptions_do_what_they_say(condition):
    rng = np.random.default_rng(0)
    views = [rng.normal(size=(500, 3)) for _ in range(5)]
    damaged, corrupted = corrupt(views, condition, seed=0)
    assert (corrupted.sum(0) == 2).all()
    for before, after, hit in zip(views, damaged, corrupted, strict=True):
        np.testing.assert_array_equal(after[~hit], before[~hit])
        if condition.kind == "blank":
            assert (after[hit] == 0).all()
        elif condition.kind == "conflict":
            assert {tuple(row) for row in after} <= {tuple(row) for row in before}
            assert (after[hit] != before[hit]).any(1).mean() > 0.95
        else:
            assert (after - before)[hit].std() == pytest.approx(condition.level, rel=0.1)


@pytest.mark.parametrize("condition", UNSEEN, ids=lambda each: each.name)
def test_unseen_damages_do_what_they_say(condition):
    rng = np.random.default_rng(0)
    views = [rng.normal(size=(500, 10)) for _ in range(5)]
    damaged, corrupted = corrupt(views, condition, seed=0)
    again, other = corrupt(views, condition, seed=0), corrupt(views, condition, seed=1)
    assert (corrupted.sum(0) == 2).all()
    assert (corrupted != other[1]).any()
    np.testing.assert_array_equal(again[1], corrupted)
    for before, after, same, hit in zip(views, damaged, again[0], corrupted, strict=True):
        np.testing.assert_array_equal(after[~hit], before[~hit])
        np.testing.assert_array_equal(after, same)
        whole, before, after = before, before[hit], after[hit]
        changed = after != before
        if condition.kind == "scale":
            np.testing.assert_array_equal(after, condition.level * before)
        elif condition.kind == "drop":
            assert changed.mean() == pytest.approx(0.8, abs=0.03)
            assert (after[changed] == 0).all()
        elif condition.kind == "impulses":
            assert changed.mean() == pytest.approx(0.3, abs=0.03)
            assert set(after[changed]) == {-5.0, 5.0}
            assert after[changed].mean() == pytest.approx(0, abs=0.5)
        elif condition.kind == "stuck":
            assert (after == after[0]).all()
            assert (whole == after[0]).all(1).any()
        elif condition.kind == "offset":
            np.testing.assert_array_equal(after, before + 2)
        else:
            np.testing.assert_array_equal(after, -before)


def test_each_damage_is_in_a_condition():
    assert set(DAMAGES) == {each.kind for each in (*FEATURES, *UNSEEN)} - {"clean"}
    assert len({each.name for each in (*FEATURES, *UNSEEN)}) == len(FEATURES) + len(UNSEEN)


@pytest.mark.parametrize(("num", "half"), [(1, 1), (2, 1), (3, 1), (4, 2)])
def test_half_of_the_views_are_replaced(num, half):
    views, damaged = [np.zeros((300, 2))] * num, [np.ones((300, 2))] * num
    after, corrupted = replace(views, damaged, Condition("fog"), seed=0)
    assert (corrupted.sum(0) == half).all()
    for view, hit in zip(after, corrupted, strict=True):
        np.testing.assert_array_equal(view, np.repeat(hit[:, None], 2, 1))
    assert corrupted.mean(1) == pytest.approx(half / num, abs=0.1)
    if half < num:
        assert (corrupted != replace(views, damaged, Condition("rain"), seed=0)[1]).any()


def test_a_view_that_does_not_know_the_damage_stays():
    views = [np.zeros((300, 2)), np.zeros((300, 3))]
    after, corrupted = replace(views, [None, np.ones((300, 3))], Condition("fog"), seed=0)
    assert not corrupted[0].any()
    assert not after[0].any()
    assert corrupted[1].mean() == pytest.approx(0.5, abs=0.1)  # as if the first were damaged in the other half
    np.testing.assert_array_equal(after[1].all(1), corrupted[1])


def test_clean_is_clean_and_strangers_are_named():
    views = [np.ones((4, 2))]
    assert corrupt(views, CLEAN, seed=0)[0] == views
    with pytest.raises(ValueError, match=r"condition must be one of \['clean', 'noise 1'.*got 'fire'"):
        corrupt(views, Condition("fire"), seed=0)
