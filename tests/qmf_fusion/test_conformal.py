"""Coverage of prediction sets by simulation, whatever is missing, and the state of their thresholds."""

import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion import QualityAwareFusion
from qmf_fusion.conformal import ConformalSets, conformal_quantile
from qmf_fusion.subsets import all_subsets

from .test_importance import simulate
from .test_subsets import heads

PATTERNS = all_subsets(2)[1:].T  # the first alone, the second alone, both: [2, 3]


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99))
def test_the_quantile_is_the_smallest_that_covers(n, coverage):
    scores = torch.randperm(n, generator=torch.Generator().manual_seed(n)).double()
    found = float(conformal_quantile(scores, coverage))
    k = next((k for k in range(1, n + 1) if k / (n + 1) >= coverage - 1e-9), None)
    assert found == (math.inf if k is None else k - 1)


@pytest.mark.parametrize(
    ("calibrations", "new"), [(100, 20), pytest.param(2000, 1, marks=pytest.mark.slow, id="independent")]
)
@pytest.mark.parametrize("robust", [False, True])
def test_sets_cover_under_every_pattern(robust, calibrations, new):
    """2,000 new samples of each pattern, after 99 complete calibration samples: a nominal 90 % is 90 to 91 %."""
    g, hits = torch.Generator().manual_seed(1), torch.zeros(3)
    fusion = QualityAwareFusion.robust(2, 4) if robust else QualityAwareFusion(2)
    pooled = 0.0
    for _ in range(calibrations):
        logits, target = simulate(g, 99 + new)
        sets = ConformalSets(fusion, 0.9).calibrate(logits[:, :99], target[:99])
        tested, labels = logits[:, 99:].repeat(1, 3, 1), target[99:].repeat(3)
        present = PATTERNS.repeat_interleave(new, 1)
        inside = sets(tested, present=present).gather(1, labels.unsqueeze(1)).view(3, new)
        hits += inside.sum(1)
        # One threshold, that of all modalities, for the second alone.
        sets.thresholds[2] = sets.thresholds[3]
        pooled += float(sets(tested, present=present).gather(1, labels.unsqueeze(1)).view(3, new)[1].sum())
    assert all(0.88 <= hit / 2000 <= 0.92 for hit in hits.tolist())
    assert not 0.88 <= pooled / 2000 <= 0.92  # which is why there is one for each pattern


def test_samples_that_came_with_a_pattern_are_used_where_they_are_enough():
    g, fusion = torch.Generator().manual_seed(2), QualityAwareFusion(2)
    logits, target = simulate(g, 600)
    present = torch.ones(2, 600, dtype=torch.bool)
    present[1, :200] = False  # of the first alone 200, of the second alone 20, of both 380
    present[0, 200:220] = False
    # Those that came without the second are harder: what comes is not what hiding makes.
    logits[0, :200] = 3 * torch.randn(200, 4, generator=g)
    sets = ConformalSets(fusion, 0.9).calibrate(logits, target, present=present)
    assert sets.made.tolist() == [True, False, True, False]
    assert sets.counts.tolist() == [600, 200, 400, 380]
    scores = -fusion(logits[:, :200], present=present[:, :200]).logits.double().log_softmax(-1)
    expected = conformal_quantile(scores.gather(1, target[:200, None]).squeeze(1), 0.9)
    torch.testing.assert_close(sets.thresholds[1], expected)
    hidden = torch.tensor([False, True])
    scores = -fusion(logits[:, 200:], present=hidden).logits.double().log_softmax(-1)
    expected = conformal_quantile(scores.gather(1, target[200:, None]).squeeze(1), 0.9)
    torch.testing.assert_close(sets.thresholds[2], expected)


def test_a_broken_modality_is_missing_and_no_set_is_empty():
    g, fusion = torch.Generator().manual_seed(3), QualityAwareFusion(2)
    logits, target = simulate(g, 300)
    sets = ConformalSets(fusion, 0.5).calibrate(logits, target)
    new, _ = simulate(g, 100)
    broken = new.clone()
    broken[1, 50:] = torch.nan
    present = torch.ones(2, 100, dtype=torch.bool)
    present[1, 50:] = False
    held = sets(broken)
    assert torch.equal(held, sets(new, present=present))
    assert bool(held.any(1).all())
    flat = sets(torch.zeros(2, 1, 4))  # ties are all in or all out
    assert flat.all()


def test_without_a_modality_the_prior_decides():
    g, fusion = torch.Generator().manual_seed(4), QualityAwareFusion(2)
    logits = heads(2, 400)
    target = torch.multinomial(torch.tensor([0.7, 0.2, 0.05, 0.05]), 400, replacement=True, generator=g)
    sets = ConformalSets(fusion, 0.8, prior=torch.tensor([0.7, 0.2, 0.05, 0.05])).calibrate(logits, target)
    nothing = sets(logits, present=torch.zeros(2, dtype=torch.bool))
    assert nothing[0].tolist() == [True, True, False, False]
    assert torch.equal(nothing, nothing[:1].expand(400, 4))


def test_few_samples_give_all_classes():
    g, fusion = torch.Generator().manual_seed(5), QualityAwareFusion(2)
    logits, target = simulate(g, 8)
    assert bool(ConformalSets(fusion, 0.9).calibrate(logits, target)(logits).all())
    never = torch.tensor([True, False])  # nothing to calibrate the second by
    sets = ConformalSets(fusion, 0.9).calibrate(*simulate(g, 500), present=never)
    assert sets.thresholds[2] == math.inf
    assert sets.counts.tolist()[2] == 0
    assert bool(sets(logits, present=~never).all())


def test_state_is_complete():
    g, fusion = torch.Generator().manual_seed(6), QualityAwareFusion(2)
    logits, target = simulate(g, 300)
    sets = ConformalSets(fusion, 0.8).calibrate(logits, target)
    again = ConformalSets(fusion, 0.9)
    again.load_state_dict(copy.deepcopy(sets.state_dict()))
    assert again.coverage == 0.8
    assert torch.equal(again(logits), sets(logits))
    assert torch.equal(sets.bfloat16()(logits), again(logits))  # thresholds stay float64
    assert not any(name.startswith("fusion") for name in sets.state_dict())
    assert not list(sets.parameters())
    with pytest.raises(RuntimeError, match="size mismatch"):
        ConformalSets(QualityAwareFusion(3)).load_state_dict(sets.state_dict())


def test_errors_name_the_argument():
    fusion, logits = QualityAwareFusion(2), heads(2)
    with pytest.raises(RuntimeError, match=r"calibrate\(\) these sets first"):
        ConformalSets(fusion)(logits)
    for coverage, error in ((0, ValueError), (1.0, ValueError), ("0.9", TypeError)):
        with pytest.raises(error, match="coverage must be"):
            ConformalSets(fusion, coverage)
    with pytest.raises(TypeError, match="fusion must be a QualityAwareFusion"):
        ConformalSets(None)
    with pytest.raises(ValueError, match="at most 12 modalities, got 13"):
        ConformalSets(QualityAwareFusion(13))
    with pytest.raises(ValueError, match="prior must be"):
        ConformalSets(fusion, prior=torch.zeros(3))
    with pytest.raises(ValueError, match=r"prior must be \[4\]"):
        ConformalSets(fusion, prior=torch.ones(3)).calibrate(logits, torch.arange(20) % 4)
    with pytest.raises(IndexError, match="target must hold classes"):
        ConformalSets(fusion).calibrate(logits, torch.full((20,), 9))
