"""Pairs of rules: differences by seed, and an interval against scipy's."""

import numpy as np
import pytest

from qmf_examples.comparison.paired import best_rivals, compare_pairs, interval
from qmf_examples.comparison.results import Score
from qmf_examples.comparison.robustness_tables import best_rival_sentence
from qmf_examples.models.methods import Method

stats = pytest.importorskip("scipy.stats")
METHODS = (
    Method("mean", role="average"),
    Method("rival"),
    Method("ours"),
    Method("ours, twice", role="variant"),
    Method("told", role="oracle"),
)
SETS, CONDITIONS, SEEDS = ("a", "b"), ("clean", "noise", "blank"), (0, 1, 2, 3)


@pytest.fixture
def accuracies():
    """By set, method, condition and seed."""
    table = np.random.default_rng(0).uniform(0.4, 0.5, (2, 5, 3, 4))
    table[:, 2] = table[:, 1] + 0.01  # ours, ahead of the rival under every condition
    table[:, 3], table[:, 4] = table[:, 2] + 0.1, table[:, 2] + 0.2
    table[:, 0] = table[:, 1] - 0.1
    table[0, 2, 2] -= 0.02
    table[0, 2, :, 3] += 0.001
    return table


def scores(table):
    return {
        name: [
            Score(method.label, condition, 0.0, seed, float(table[i, m, c, k]), None)
            for m, method in enumerate(METHODS)
            for c, condition in enumerate(CONDITIONS)
            for k, seed in enumerate(SEEDS[: table.shape[3]])
        ]
        for i, name in enumerate(SETS[: len(table)])
    }


def test_differences_are_paired_by_seed(accuracies):
    pairs = {(pair.other, pair.on): pair for pair in compare_pairs(scores(accuracies), "ours", METHODS)}
    assert {on for _, on in pairs} == {"a", "b", "all sets"}
    assert {other for other, _ in pairs} == {"mean", "rival", "ours, twice", "told"}
    by_seed = 100 * (accuracies[:, 2] - accuracies[:, 1]).mean(1)
    for on, differences in (("a", by_seed[0]), ("b", by_seed[1]), ("all sets", by_seed.mean(0))):
        pair = pairs["rival", on]
        assert pair.difference == pytest.approx(differences.mean())
        assert (pair.seeds_won, pair.seeds) == ((differences > 0).sum(), 4)
        if on != "b":  # where they are all alike, which scipy warns of
            expected = stats.ttest_1samp(differences, 0).confidence_interval(0.95)
            assert (pair.low, pair.high) == pytest.approx(tuple(expected))
    assert (pairs["rival", "a"].conditions_won, pairs["rival", "a"].conditions_lost) == (2, 1)
    assert (pairs["rival", "b"].conditions_won, pairs["rival", "b"].conditions_lost) == (3, 0)
    assert pairs["rival", "b"].verdict == "better"
    assert pairs["told", "b"].verdict == "worse"


def test_the_best_rival_is_neither_a_variant_nor_an_oracle(accuracies):
    best = best_rivals(compare_pairs(scores(accuracies), "ours", METHODS), METHODS)
    assert [(pair.other, pair.on) for pair in best] == [("rival", "a"), ("rival", "b"), ("rival", "all sets")]
    assert best_rival_sentence(best[1]).startswith(
        "On b: +1.0 points against the best other rule, rival ([+1.0, +1.0], better)"
    )
    assert "ahead in 4 of 4 seeds, better under 3 conditions, worse under 0" in best_rival_sentence(best[1])


def test_one_seed_is_no_test(accuracies):
    [pair, *_] = compare_pairs(scores(accuracies[:1, ..., :1]), "ours", METHODS)
    assert (pair.on, pair.low, pair.high, pair.verdict) == ("a", None, None, "tie")
    assert pair.cell() == f"{pair.difference:+.1f} 3:0"
    assert "one seed, no test" in best_rival_sentence(pair)


def test_an_interval_around_nothing_is_a_tie():
    low, high = interval([-1.0, 1.5, 0.25])
    assert low < 0 < high
    assert interval([3.0]) == (None, None)
