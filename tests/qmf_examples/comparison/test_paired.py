"""Pairs of rules: differences by seed and sample, their intervals, and what they call a win."""

import math

import numpy as np
import pytest

from qmf_examples.comparison.paired import best_rivals, compare_pairs
from qmf_examples.comparison.results import Score
from qmf_examples.comparison.robustness_tables import best_rival_sentence
from qmf_examples.evaluation.paired_difference import difference, right_less_right
from qmf_examples.models.methods import Method

METHODS = (
    Method("mean", role="average"),
    Method("rival"),
    Method("ours"),
    Method("ours, twice", role="variant"),
    Method("told", role="oracle"),
)
SETS, CONDITIONS, SEEDS, SAMPLES = ("a", "b"), ("clean", "noise", "blank"), (0, 1, 2, 3), 300


@pytest.fixture
def right():
    """By set, method, condition, seed and sample."""
    rng = np.random.default_rng(0)
    easy = rng.random((2, 1, 3, 4, SAMPLES))
    table = (easy < np.array([0.4, 0.5, 0.58, 0.68, 0.78])[None, :, None, None, None]).astype(np.uint8)
    # On set a under "blank", ours and its rival guess apart.
    table[0, 1:3, 2] = rng.random((2, 4, SAMPLES)) < 0.5
    return table


def scores(table):
    return {
        name: [
            Score(method.label, condition, 0.0, seed, cell.mean(), None, cell.tobytes())
            for m, method in enumerate(METHODS)
            for c, condition in enumerate(CONDITIONS)
            for seed, cell in zip(SEEDS, table[i, m, c], strict=False)
        ]
        for i, name in enumerate(SETS[: len(table)])
    }


def test_differences_are_paired_by_seed_and_sample(right):
    pairs = {(pair.other, pair.on): pair for pair in compare_pairs(scores(right), "ours", METHODS)}
    assert {on for _, on in pairs} == {"a", "b", "all sets"}
    assert {other for other, _ in pairs} == {"mean", "rival", "ours, twice", "told"}
    by_set = [x.mean(0) for x in right[:, 2].astype(float) - right[:, 1]]
    for on, sets in (("a", by_set[:1]), ("b", by_set[1:]), ("all sets", by_set)):
        pair = pairs["rival", on]
        by_seed = np.mean([x.mean(1) for x in sets], axis=0)
        assert pair.difference.points == pytest.approx(100 * by_seed.mean())
        assert (pair.seeds_won, pair.seeds) == ((by_seed > 0).sum(), 4)
        assert pair.difference.low < pair.difference.points < pair.difference.high
    assert (pairs["rival", "a"].conditions_won, pairs["rival", "a"].conditions_lost) == (2, 0)
    assert (pairs["rival", "b"].conditions_won, pairs["rival", "b"].conditions_lost) == (3, 0)
    assert pairs["rival", "b"].verdict == "better"
    assert pairs["told", "b"].verdict == "worse"


def test_the_best_rival_is_neither_a_variant_nor_an_oracle(right):
    best = best_rivals(compare_pairs(scores(right), "ours", METHODS), METHODS)
    assert [(pair.other, pair.on) for pair in best] == [("rival", "a"), ("rival", "b"), ("rival", "all sets")]
    said = best_rival_sentence(best[1])
    assert said.startswith(f"On b: {best[1].difference.points:+.1f} points against the best other rule, rival ([+")
    assert "ahead in 4 of 4 seeds, better under 3 conditions, worse under 0" in said


def test_a_win_that_is_luck_is_a_tie():
    # 3 of 300 samples more under one condition: 1 point, and nothing.
    ours, theirs = np.zeros(300, np.uint8), np.zeros(300, np.uint8)
    ours[:40], theirs[40:77] = 1, 1
    pair, told = (
        compare_pairs(
            {"a": [Score(n, "clean", 0.0, 0, x.mean(), None, x.tobytes()) for n, x in (("ours", ours), ("rival", y))]},
            "ours",
            (Method("ours"), Method("rival")),
        )[0]
        for y in (theirs, 1 - ours)
    )
    assert pair.verdict == "tie"
    assert (pair.conditions_won, pair.conditions_lost) == (0, 0)
    assert pair.cell().startswith("≈ +1.0 [-")
    assert "not distinguishable, one seed: over test samples alone" in best_rival_sentence(pair)
    assert told.verdict == "worse"


def test_the_interval_holds_seeds_and_samples():
    rng = np.random.default_rng(0)
    samples = difference([np.repeat(rng.normal(size=(1, 400)), 50, 0)])
    expected = 196 * (1 / 400) ** 0.5
    assert (samples.high - samples.low) / 2 == pytest.approx(expected, rel=0.1)  # 50 seeds on 400 samples are 400
    seeds = rng.normal(size=5)
    half = 100 * 2.776 * seeds.std(ddof=1) / 5**0.5  # Student's t
    found = difference([np.repeat(seeds[:, None], 20, 1)])
    assert (found.high - found.low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(("seeds", "deviation"), [(1, 0.0), (3, 0.02), (5, 0.02)])
def test_what_is_luck_is_seldom_called_a_win(seeds, deviation):
    rng, wrong = np.random.default_rng(1), 0
    for _ in range(200):
        luck = rng.normal(0, deviation, (seeds, 1)) + rng.normal(0, 0.3, (1, 200)) + rng.normal(0, 0.3, (seeds, 200))
        wrong += difference([luck]).verdict != "tie"
    assert wrong <= 18


def test_seeds_with_different_numbers_of_test_samples():
    ours, theirs = [bytes([1] * 40), bytes([1] * 37)], [bytes([1, 0] * 20), bytes([1] * 37)]
    found = difference([right_less_right(ours, theirs)])
    assert found.points == pytest.approx(25)  # the mean of 50 and 0
    assert found.low < 25 < found.high
    assert all(map(math.isfinite, found))
