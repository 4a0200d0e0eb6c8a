"""Answers of every subset against the layer itself, asked one subset at a time."""

import pytest
import torch

from qmf_fusion import QualityAwareFusion, functional, subsets
from qmf_fusion.consistency import consistency_terms
from qmf_fusion.importance import shapley_importance
from qmf_fusion.subsets import all_subsets, fuse_subsets, subset_number

from .test_rules import RULES


def heads(m=3, n=20, k=4, seed=0):
    return 2 * torch.randn(m, n, k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("rule", ["default", *RULES])
@pytest.mark.parametrize("numbers", [1, 2**22])  # a call for each subset, one for all
def test_answers_are_the_layers_own(rule, numbers, monkeypatch):
    monkeypatch.setattr(subsets, "_NUMBERS_A_CALL", numbers)
    fusion = QualityAwareFusion(3) if rule == "default" else RULES[rule](3, 4)
    logits = heads()
    present = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    prior = torch.tensor([1.0, 2.0, 3.0, 4.0])
    answers = list(fuse_subsets(fusion, logits, all_subsets(3), present=present, prior=prior))
    assert len(answers) == 8
    for subset, answer in zip(all_subsets(3), answers, strict=True):
        there = present & subset.unsqueeze(1)
        out = fusion(logits, present=there)
        none = ~there.any(0)
        assert torch.equal(answer.present, there)
        torch.testing.assert_close(answer.logits[~none], out.logits[~none])
        assert torch.equal(answer.logits[none], (prior.double() / 10).log().expand(int(none.sum()), 4))


def test_one_call_where_there_is_room(monkeypatch):
    fusion, calls = QualityAwareFusion(3), []
    fuse = fusion.rule.fuse
    monkeypatch.setattr(fusion.rule, "fuse", lambda *given: calls.append(1) or fuse(*given))
    list(fuse_subsets(fusion, heads(), all_subsets(3)))
    assert len(calls) == 1


def test_features_reach_the_rule_and_broken_rows_are_absent():
    g = torch.Generator().manual_seed(0)
    logits, features = heads(2, 300), [torch.randn(300, 6, generator=g), torch.randn(300, 6, generator=g)]
    fusion = QualityAwareFusion.robust(2, 4, features=[6, 6])
    fusion.calibrate(logits, torch.randint(4, (300,), generator=g), features=features)
    features[0][5] += 30
    features[1][7] = torch.nan
    logits[0, 9] = torch.inf
    *_, full = fuse_subsets(fusion, logits, all_subsets(2), features=features)
    out = fusion(logits, features=features)
    torch.testing.assert_close(full.logits, out.logits)
    blind = fusion(logits)
    assert not torch.allclose(blind.logits[5], out.logits[5])
    expected = torch.ones(2, 300, dtype=torch.bool)
    expected[1, 7] = expected[0, 9] = False
    assert torch.equal(full.present, expected)


def test_logits_of_any_layout_and_none():
    fusion = QualityAwareFusion(["a", "b"], class_dim=1)
    x = heads(2)
    by_name = list(fuse_subsets(fusion, {"b": x[1], "a": None}, all_subsets(2)))
    assert torch.equal(by_name[1].logits, torch.zeros(20, 4, dtype=torch.float64))  # a is not there
    torch.testing.assert_close(by_name[3].logits, by_name[2].logits)


def test_subset_number_is_the_row_of_all_subsets():
    every = all_subsets(5)
    assert subset_number(every.T).tolist() == list(range(32))
    assert len({tuple(row) for row in every.tolist()}) == 32


def test_nothing_is_learned_or_differentiated():
    fusion = QualityAwareFusion(2, learnable=True)
    x = heads(2).requires_grad_()
    assert not any(answer.logits.requires_grad for answer in fuse_subsets(fusion, x, all_subsets(2)))


@pytest.mark.parametrize(
    ("change", "error", "says"),
    [
        ({"fusion": 3}, TypeError, "fusion must be a QualityAwareFusion"),
        ({"logits": torch.zeros(2, 3, 4, 5)}, ValueError, r"logits must be \[N, K\] per modality"),
        ({"logits": torch.zeros(3, 5, 4)}, ValueError, "logits must hold 2 modalities"),
        ({"subsets": torch.ones(4, 2)}, TypeError, "subsets must be a bool tensor"),
        ({"subsets": torch.ones(4, 3, dtype=torch.bool)}, ValueError, r"subsets must be \[S, 2\]"),
        ({"present": torch.ones(2)}, TypeError, "present must be a bool tensor"),
        ({"prior": "even"}, TypeError, "prior must be a sequence or a tensor"),
        ({"prior": torch.ones(3)}, ValueError, r"prior must be \[4\]"),
        ({"prior": torch.tensor([1.0, 0, 1, 1])}, ValueError, "prior must be positive and finite"),
        ({"features": [torch.zeros(5, 2)] * 2}, ValueError, "features must be None for a rule that takes none"),
    ],
)
def test_errors_name_the_argument(change, error, says):
    given = {"fusion": QualityAwareFusion(2), "logits": heads(2, 5), "subsets": all_subsets(2), **change}
    with pytest.raises(error, match=says):  # at the call, not at the first answer
        fuse_subsets(given.pop("fusion"), given.pop("logits"), given.pop("subsets"), **given)


def test_errors_of_counts_and_targets():
    with pytest.raises(ValueError, match="at most 12"):
        all_subsets(13)
    for target, error, says in (
        (torch.full((20,), 4), IndexError, "classes 0 to 3, got 4"),
        (torch.full((20,), -100), IndexError, "classes 0 to 3, got -100"),
        (torch.zeros(20), TypeError, "target must hold class indices"),
        (torch.zeros(7, dtype=torch.long), ValueError, "target must have the logits' shape"),
    ):
        with pytest.raises(error, match=says):
            shapley_importance(QualityAwareFusion(3), heads(), target)


def test_masks_by_name_and_whole_outputs_are_taken_as_the_layer_takes_them():
    fusion = QualityAwareFusion(["rgb", "depth"])
    logits = dict(zip(fusion.names, heads(2), strict=True))
    present = torch.stack([torch.ones(20, dtype=torch.bool), torch.arange(20) < 8])
    by_name = {"depth": present[1], "rgb": present[0]}  # in another order
    target = torch.arange(20) % 4
    expected = shapley_importance(fusion, logits, target, present=present).samples
    for given, mask in ((logits, by_name), (fusion(logits, present), None)):
        found = shapley_importance(fusion, given, target, present=mask).samples
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        torch.testing.assert_close(consistency_terms(fusion, given, mask), consistency_terms(fusion, logits, present))
    weights = fusion(logits).weights
    found = functional.fuse(logits, weights, by_name)
    torch.testing.assert_close(found, functional.fuse(logits, weights, present))
    given = logits, target, None
    found = functional.qmf_objective(*given, present=by_name)
    torch.testing.assert_close(found, functional.qmf_objective(*given, present=present), equal_nan=True)
