"""What a report says of missing modalities, and that sets cover on rows that did not calibrate them."""

import json

import pytest
import torch

from qmf_examples.comparison import missing
from qmf_examples.comparison.prepared import Damaged, Prepared
from qmf_examples.corruption.conditions import CLEAN, Condition
from qmf_examples.evaluation.display import console
from qmf_examples.models.learners import Answer, Learner
from qmf_fusion import QualityAwareFusion
from qmf_fusion.missing import missing_report

VIEWS = {"rgb": 2.0, "depth": 1.0}


class Given(Learner):
    """Its views are logits."""

    def forward(self, inputs):
        return Answer(next(iter(inputs.values())), tuple(inputs.values()), features=tuple(inputs.values()))


def made(num=400, classes=4):
    g = torch.Generator().manual_seed(0)
    target = torch.randint(classes, (num,), generator=g)
    hot = torch.nn.functional.one_hot(target, classes)
    clean = {name: 2 * size * hot + 3 * torch.randn(num, classes, generator=g) for name, size in VIEWS.items()}
    damaged = {name: 3 * torch.randn(num, classes, generator=g) for name in VIEWS}
    none = torch.zeros(2, num, dtype=torch.bool)
    tests = [Damaged(CLEAN, clean, none), Damaged(Condition("noise", 1), damaged, ~none)]
    return Prepared(clean, torch.tensor([0, 0, 1, 2]), tests, target, classes)


@pytest.fixture(scope="module")
def found():
    return missing.examine(Given(), QualityAwareFusion(list(VIEWS)), made(), seed=0)


def test_the_report_is_of_the_clean_test_split_with_the_shares_of_the_training_labels(found):
    data = made()
    expected = missing_report(
        QualityAwareFusion(list(VIEWS)), data.tests[0].views, data.test_labels, prior=torch.tensor([2.0, 1, 1, 1])
    )
    assert found.report == expected
    assert found.selection.modalities


def test_sets_and_intervals_cover_on_the_other_half_of_clean_rows_and_not_on_damaged_ones(found):
    clean = [each for each in found.sets if each.condition == "clean"]
    assert [each.modalities for each in clean] == [("rgb", "depth"), ("depth",), ("rgb",)]
    assert all(0.87 < each.coverage < 0.93 for each in (*clean, *found.intervals))
    assert clean[0].size < clean[1].size
    damaged = [each for each in found.sets if each.condition != "clean"]
    assert all(hurt.coverage < whole.coverage - 0.03 for hurt, whole in zip(damaged, clean, strict=True))


def test_it_is_shown_and_written(found, tmp_path, capsys):
    missing.show(found, console(180))
    text = capsys.readouterr().out
    assert "added to all others [interval at 95 %]" in text  # not taken for markup
    assert "Which modalities do you need?" in text
    assert "noise" in text
    path = missing.write(found, tmp_path, "robust", 3)
    content = json.loads(path.read_text())
    assert path.name == "missing-robust-seed3.json"
    assert content["report"]["samples"] == 400
    assert len(content["sets"]) == 6
    assert path.with_suffix(".png").stat().st_size > 1000


def test_more_views_than_subsets_can_be_gone_through_are_reported_without_sets():
    views = {str(n): torch.randn(30, 3, generator=torch.Generator().manual_seed(n)) for n in range(13)}
    target = torch.arange(30) % 3
    tests = [Damaged(CLEAN, views, torch.zeros(13, 30, dtype=torch.bool))]
    data = Prepared(views, target, tests, target, 3)
    found = missing.examine(Given(), QualityAwareFusion(list(views)), data, seed=0)
    assert (found.selection, found.intervals, found.sets) == (None, [], [])
    assert len(found.report.modalities) == 13
