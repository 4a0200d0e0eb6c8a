"""Shapley values against their definition over orders, their axioms, sampled orders, and conformal intervals."""

import copy
import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion import QualityAwareFusion
from qmf_fusion.importance import (
    accuracy,
    conditional_utilisation,
    mean_intervals,
    shapley,
    shapley_importance,
)
from qmf_fusion.importance_intervals import ShapleyIntervals
from qmf_fusion.subsets import all_subsets, fuse_subsets

from .test_rules import RULES
from .test_subsets import heads

GAMES = st.integers(1, 5).flatmap(
    lambda m: st.lists(st.floats(-100, 100), min_size=2**m, max_size=2**m).map(
        lambda v: torch.tensor(v, dtype=torch.float64)
    )
)


def by_orders(values):
    """The definition: what each modality adds, on average over all orders."""
    num = len(values).bit_length() - 1
    total = [0.0] * num
    for order in itertools.permutations(range(num)):
        number = 0
        for m in order:
            total[m] += float(values[number + 2**m] - values[number])
            number += 2**m
    return torch.tensor(total, dtype=torch.float64) / math.factorial(num)


@settings(max_examples=60, deadline=None)
@given(GAMES)
def test_shapley_is_the_mean_over_orders_and_efficient(values):
    found = shapley(values)
    torch.testing.assert_close(found, by_orders(values))
    torch.testing.assert_close(found.sum(), values[-1] - values[0])


@settings(max_examples=60, deadline=None)
@given(GAMES, st.floats(-3, 3), st.randoms(use_true_random=False))
def test_shapley_is_linear(values, factor, random):
    other = values[torch.tensor(random.sample(range(len(values)), len(values)))]
    torch.testing.assert_close(shapley(values + factor * other), shapley(values) + factor * shapley(other))


@settings(max_examples=60, deadline=None)
@given(GAMES, st.data())
def test_shapley_gives_nothing_to_a_null_player_and_the_same_to_equal_ones(values, data):
    num = len(values).bit_length() - 1
    numbers = torch.arange(len(values))
    m = data.draw(st.integers(0, num - 1))
    null = values[numbers & ~(2**m)]  # the worth of a set does not change with m
    torch.testing.assert_close(shapley(null)[m], torch.zeros((), dtype=torch.float64))
    if num > 1:
        other = data.draw(st.integers(0, num - 1).filter(lambda n: n != m))
        swapped = numbers & ~(2**m | 2**other)
        swapped = swapped | ((numbers >> m) % 2 << other) | ((numbers >> other) % 2 << m)
        alike = (values + values[swapped]) / 2
        found = shapley(alike)
        torch.testing.assert_close(found[m], found[other])


@pytest.mark.parametrize("rule", ["default", *RULES])
@pytest.mark.parametrize("value", ["accuracy", "log_loss"])
def test_importance_is_the_definition(rule, value):
    fusion = QualityAwareFusion(3) if rule == "default" else RULES[rule](3, 4)
    logits, target = heads(), torch.arange(20) % 4
    worths = []
    for subset in all_subsets(3):
        fused = fusion(logits, present=subset).logits.double() if subset.any() else torch.zeros(20, 4).double()
        if value == "log_loss":
            worths.append(-torch.nn.functional.cross_entropy(fused, target, reduction="none"))
        elif subset.any():
            worths.append((fused.argmax(-1) == target).double())
        else:
            worths.append(torch.full((20,), 0.25, dtype=torch.float64))
    found = shapley_importance(fusion, logits, target, value)
    expected = torch.stack([by_orders(v) for v in torch.stack(worths).T], 1)
    torch.testing.assert_close(found.samples, expected)
    torch.testing.assert_close(torch.tensor(found.mean).double(), expected.mean(1))
    assert found.sampling_error == [0.0] * 3
    stats = pytest.importorskip("scipy.stats")
    for m in range(3):
        ends = stats.t.interval(0.95, 19, expected[m].mean(), stats.sem(expected[m]))
        assert found.interval[m] == pytest.approx(ends, rel=1e-3, abs=1e-3)


def test_a_callable_and_a_missing_modality_and_the_prior():
    fusion, logits, target = QualityAwareFusion(2), heads(2), torch.arange(20) % 4
    present = torch.ones(2, 20, dtype=torch.bool)
    present[1, 10:] = False
    own = shapley_importance(fusion, logits, target, accuracy, present=present)
    named = shapley_importance(fusion, logits, target, "accuracy", present=present)
    assert torch.equal(own.samples, named.samples)
    assert own.value == "accuracy"
    assert bool((named.samples[1, 10:] == 0).all())
    prior = torch.tensor([1.0, 1.0, 1.0, 3.0])
    of_prior = shapley_importance(fusion, logits, target, "accuracy", prior=prior, present=present)
    # The commonest class is what the empty set says.
    gain = of_prior.samples.sum(0) - named.samples.sum(0)
    torch.testing.assert_close(gain, torch.where(target == 3, 0.25 - 1, 0.25).double())


def test_sampled_orders_agree_with_all_subsets_within_their_error():
    fusion, logits, target = QualityAwareFusion(4), heads(4, 30), torch.arange(30) % 4
    exact = shapley_importance(fusion, logits, target)
    drawn = shapley_importance(fusion, logits, target, permutations=400, seed=3)
    assert all(error > 0 for error in drawn.sampling_error)
    for a, b, error in zip(exact.mean, drawn.mean, drawn.sampling_error, strict=True):
        assert abs(a - b) < 4 * error
    torch.testing.assert_close(drawn.samples.sum(0), exact.samples.sum(0))  # efficient for each order
    again = shapley_importance(fusion, logits, target, permutations=400, seed=3)
    assert torch.equal(again.samples, drawn.samples)
    other = shapley_importance(fusion, logits, target, permutations=400, seed=4)
    assert not torch.equal(other.samples, drawn.samples)
    few = shapley_importance(fusion, logits, target, permutations=25, seed=3)
    assert few.sampling_error[0] > 2 * drawn.sampling_error[0]
    _, without = mean_intervals(few.samples, torch.zeros(4), 0.95)
    assert all(a < c and b > d for (a, b), (c, d) in zip(few.interval, without, strict=True))


def test_more_than_twelve_modalities_are_sampled():
    fusion, logits = QualityAwareFusion(14), heads(14, 5)
    found = shapley_importance(fusion, logits, torch.arange(5) % 4)
    assert min(found.sampling_error) > 0
    full, none = fuse_subsets(fusion, logits, torch.tensor([[True] * 14, [False] * 14]))
    target = torch.arange(5) % 4
    gain = (full.logits.log_softmax(-1) - none.logits.log_softmax(-1))[torch.arange(5), target]
    torch.testing.assert_close(found.samples.sum(0), gain)


def test_importance_is_shown():
    found = shapley_importance(QualityAwareFusion(["rgb", "d"]), heads(2, 1), torch.tensor([0]), "accuracy")
    content = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert [each["name"] for each in content["modalities"]] == ["rgb", "d"]
    assert content["modalities"][0]["interval"] == [None, None]  # of one sample
    assert "rgb  +" in str(found) or "rgb  -" in str(found)
    assert "points of accuracy" in str(found)


def test_utilisation_is_wu_s():
    assert conditional_utilisation(0.5, [0.4, 0.6]) == pytest.approx([0.2, -0.2])
    assert conditional_utilisation(0.0, [0.0]) == [0.0]


def simulate(generator, n, m=2, k=4):
    """Exchangeable samples of heads of unequal worth."""
    target = torch.randint(k, (n,), generator=generator)
    strength = torch.tensor([3.0, 1.0]).view(m, 1, 1)
    return 2 * torch.randn(m, n, k, generator=generator) + strength * torch.nn.functional.one_hot(target, k), target


@pytest.mark.parametrize(
    ("calibrations", "new"), [(200, 10), pytest.param(2000, 1, marks=pytest.mark.slow, id="independent")]
)
def test_conformal_intervals_cover_as_stated(calibrations, new):
    """2,000 new samples, after 99 calibration samples each: a nominal 90 % is 90 to 91 %."""
    g, fusion, hits, rows = torch.Generator().manual_seed(0), QualityAwareFusion(2), torch.zeros(2), 99 + new
    every, labels = simulate(g, calibrations * rows)
    truth = shapley_importance(fusion, every, labels).samples.unflatten(1, (calibrations, rows))
    for number, target in enumerate(labels.view(calibrations, rows)):
        logits = every.unflatten(1, (calibrations, rows))[:, number]
        intervals = ShapleyIntervals(fusion, 0.9).calibrate(logits[:, :99], target[:99])
        low, high, _ = intervals(logits[:, 99:])
        own = truth[:, number, 99:]
        hits += ((low <= own) & (own <= high)).sum(1)
    assert all(0.88 <= hit / 2000 <= 0.92 for hit in hits.tolist())


def test_conformal_intervals_tell_apart_and_keep_their_state():
    g, fusion = torch.Generator().manual_seed(1), QualityAwareFusion(2)
    logits, target = simulate(g, 400)
    intervals = ShapleyIntervals(fusion, 0.8, prior=torch.ones(4)).calibrate(logits, target)
    again = ShapleyIntervals(fusion, 0.5, prior=torch.ones(4))
    again.load_state_dict(copy.deepcopy(intervals.state_dict()))
    new, _ = simulate(g, 50)
    assert again.coverage == 0.8
    assert all(torch.equal(a, b) for a, b in zip(intervals(new), again(new), strict=True))
    assert bool((intervals.half().radius == again.radius).all())
    low, high, _ = intervals(new)
    assert float((high - low).std()) > 0  # not the same width for all
    present = torch.ones(2, 50, dtype=torch.bool)
    present[1, :25] = False
    low, high, expected = intervals(new, present=present)
    assert not bool(low[1, :25].any() | high[1, :25].any() | expected[1, :25].any())
    few = ShapleyIntervals(fusion, 0.9).calibrate(logits[:, :5], target[:5])
    assert bool((few(new).high == math.inf).all())
    with pytest.raises(RuntimeError, match="calibrate"):
        ShapleyIntervals(fusion)(new)


def test_errors_name_the_argument():
    fusion, logits, target = QualityAwareFusion(2), heads(2), torch.arange(20) % 4
    for value, error, says in (
        ("f1", ValueError, "value must be one of"),
        (3, TypeError, "value must be one of"),
        (lambda fused: fused.sum(), ValueError, r"value must return \(20, 4\)"),
        (lambda fused: fused * torch.nan, ValueError, "value must be finite"),
    ):
        with pytest.raises(error, match=says):
            shapley_importance(fusion, logits, target, value)
    with pytest.raises(ValueError, match="permutations"):
        shapley_importance(fusion, logits, target, permutations=0)
    with pytest.raises(ValueError, match="confidence"):
        shapley_importance(fusion, logits, target, confidence=1.0)
    with pytest.raises(ValueError, match=r"\[2\^M, \*\]"):
        shapley(torch.zeros(3))
    ruled_out = logits.clone()
    ruled_out[:, 0, 0] = -torch.inf
    with pytest.raises(ValueError, match="-inf rules the target's class out"):
        shapley_importance(fusion, ruled_out, target)
    with pytest.raises(ValueError, match="finite for every class"):
        ShapleyIntervals(fusion).calibrate(ruled_out, target)
    with pytest.raises(ValueError, match="coverage must be between 0 and 1"):
        ShapleyIntervals(fusion, 1.0)
    with pytest.raises(TypeError, match="fusion"):
        ShapleyIntervals(torch.nn.Linear(1, 1))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 4), st.integers(2, 6), st.integers(0, 99))
def test_importance_of_any_count_is_efficient(m, k, seed):
    logits = heads(m, 6, k, seed)
    found = shapley_importance(QualityAwareFusion(m), logits, torch.arange(6) % k)
    *_, full = fuse_subsets(QualityAwareFusion(m), logits, all_subsets(m))
    own = full.logits.log_softmax(-1)[torch.arange(6), torch.arange(6) % k]
    torch.testing.assert_close(found.samples.sum(0), own + math.log(k))
