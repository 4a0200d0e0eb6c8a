"""Damage to feature views does what its name says, to half of each sample's views."""

import numpy as np
import pytest

from qmf_examples.corruption.conditions import CLEAN, FEATURES, Condition
from qmf_examples.corruption.features import corrupt


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


def test_clean_is_clean_and_strangers_are_named():
    views = [np.ones((4, 2))]
    assert corrupt(views, CLEAN, seed=0)[0] == views
    with pytest.raises(ValueError, match=r"condition must be one of \['clean', 'noise 1'.*got 'fire'"):
        corrupt(views, Condition("fire"), seed=0)
