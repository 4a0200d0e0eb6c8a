"""Selected subsets keep what is stated of them, by simulation, and single tests their level."""

import pytest
import torch

from qmf_fusion import QualityAwareFusion
from qmf_fusion.selection import _holm, _p_values, bet, select_modalities

from .test_importance import simulate
from .test_subsets import heads


def test_a_bet_that_cannot_win_wins_at_most_as_often_as_stated():
    g = torch.Generator().manual_seed(0)
    fair = 2.0 * torch.randint(2, (4000, 200), generator=g) - 1
    rare = torch.where(torch.rand(4000, 200, generator=g) < 0.1, -0.9, 0.1)
    for gains in (fair.double(), rare.double()):
        p = bet(gains.unbind(1), 1.0, 1.0)
        for level in (0.05, 0.1):
            assert float((p <= level).double().mean()) <= level
    winning = (torch.rand(400, 200, generator=g) < 0.7).double() * 2 - 1
    assert float((bet(winning.unbind(1), 1.0, 1.0) <= 0.05).double().mean()) > 0.95


def test_holm():
    assert _holm(torch.tensor([0.06, 0.01, 0.03, 0.5]), 0.1).tolist() == [False, True, True, False]
    assert _holm(torch.tensor([0.02, 0.01, 0.02]), 0.1).tolist() == [True, True, True]
    # Rejecting ends at the first that stands, though a later one would pass its own threshold.
    assert _holm(torch.tensor([0.06, 0.06]), 0.1).tolist() == [False, False]


def test_the_p_value_is_that_of_the_hardest_rival():
    g = torch.Generator().manual_seed(0)
    values = (torch.rand(4, 300, generator=g) < torch.tensor([0.2, 0.5, 0.8, 0.81]).unsqueeze(1)).double()
    p = _p_values(values, 0.2)
    for s in range(4):
        singles = [bet(0.2 - (values[t] - values[s]), 1.2, 0.8) for t in range(4) if t != s]
        assert float(p[s]) == pytest.approx(max(map(float, singles)))
    assert p[0] == 1
    assert max(p[2:]) < 0.05


def test_a_wrong_subset_is_selected_at_most_as_often_as_stated():
    """The tolerance is what a single modality falls short by, less half a point: both are needed."""
    g, fusion, wrong, sure = torch.Generator().manual_seed(0), QualityAwareFusion(2), 0, 0
    target = torch.randint(4, (15_000,), generator=g)
    logits = 2 * torch.randn(2, 15_000, 4, generator=g) + 2 * torch.nn.functional.one_hot(target, 4)
    best, first = (float((x.argmax(-1) == target).double().mean()) for x in (fusion(logits).logits, logits[0]))
    tolerance = best - first - 0.005
    assert tolerance > 0.05
    for part in torch.arange(15_000).split(300):
        found = select_modalities(fusion, logits[:, part], target[part], tolerance)
        wrong += found.guaranteed and found.modalities != fusion.names
        sure += found.guaranteed
    assert wrong <= 5  # of 50
    assert sure > 25


def test_the_smallest_of_the_good_ones():
    g = torch.Generator().manual_seed(0)
    logits, target = simulate(g, 2000)
    three = torch.cat([logits, 0.01 * torch.randn(1, 2000, 4, generator=g)])
    fusion = QualityAwareFusion(["good", "fair", "noise"], combine="probabilities")
    loose, tight = (select_modalities(fusion, three, target, tolerance) for tolerance in (0.3, 0.03))
    assert loose.modalities == ("good",)
    assert loose.dropped == ("fair", "noise")
    assert "noise" not in tight.modalities
    assert tight.guaranteed
    assert tight.to_dict()["modalities"] == list(tight.modalities)
    assert "confidence of 90 %" in str(tight)
    few = select_modalities(fusion, three[:, :20], target[:20], 0.01)
    assert not few.guaranteed
    assert few.modalities == fusion.names
    assert few.dropped == ()
    assert str(few) == (
        "good + fair + noise: no fewer are shown to be within 0.01 of the best subset, at a confidence of 90 %"
    )


def test_errors_name_the_argument():
    fusion, logits, target = QualityAwareFusion(2), heads(2), torch.arange(20) % 4
    with pytest.raises(ValueError, match="tolerance must be between 0 and 1"):
        select_modalities(fusion, logits, target, 0.0)
    with pytest.raises(ValueError, match="value must lie from 0 to 1"):
        select_modalities(fusion, logits, target, 0.1, "log_loss")
    with pytest.raises(ValueError, match="at most 8 modalities, got 9"):
        select_modalities(QualityAwareFusion(9), heads(9), target, 0.1)
