"""The missing-modality report against its definitions."""

import json

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion import QualityAwareFusion
from qmf_fusion.importance import shapley_importance
from qmf_fusion.missing import calibration_error, missing_report
from qmf_fusion.subsets import all_subsets

from .test_subsets import heads


def test_report_is_the_definitions():
    fusion, logits, target = QualityAwareFusion(["a", "b", "c"]), heads(3, 60), torch.arange(60) % 4
    prior = torch.tensor([4.0, 2.0, 1.0, 1.0])
    report = missing_report(fusion, logits, target, prior=prior)
    sizes = [len(each.modalities) for each in report.subsets]
    assert sizes == [0, 1, 1, 1, 2, 2, 2, 3]
    found = {each.modalities: each for each in report.subsets}
    right, losses = {}, {}
    for subset in all_subsets(3):
        names = tuple(n for n, there in zip(fusion.names, subset, strict=True) if there)
        fused = fusion(logits, present=subset).logits if names else (prior / 8).log().double().expand(60, 4)
        right[names] = (fused.argmax(-1) == target).double()
        losses[names] = F.cross_entropy(fused, target, reduction="none")
        assert found[names].accuracy == pytest.approx(float(right[names].mean()))
        assert found[names].log_loss == pytest.approx(float(losses[names].mean()))
        metric = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
        assert found[names].ece == pytest.approx(float(metric(fused.softmax(-1), target, 4, n_bins=15)), abs=1e-6)
    everything = ("a", "b", "c")
    for n, (name, others) in enumerate((("a", ("b", "c")), ("b", ("a", "c")), ("c", ("a", "b")))):
        m = report.modalities[n]
        assert m.name == name
        assert m.accuracy.alone == pytest.approx(float((right[(name,)] - right[()]).mean()))
        assert m.log_loss.last == pytest.approx(float((losses[others] - losses[everything]).mean()))
        assert m.log_loss.last_interval[0] < m.log_loss.last < m.log_loss.last_interval[1]
        gone = float((right[everything] - right[others]).mean())
        assert m.utilisation == pytest.approx(gone / found[everything].accuracy)
        for value in ("accuracy", "log_loss"):
            alone = shapley_importance(fusion, logits, target, value, prior=prior)
            assert getattr(m, value).shapley == pytest.approx(alone.mean[n])
            assert getattr(m, value).shapley_interval == pytest.approx(alone.interval[n])


def test_it_is_shown_as_table_dict_and_picture(tmp_path):
    pytest.importorskip("matplotlib")
    report = missing_report(QualityAwareFusion(["rgb", "depth"]), heads(2), torch.arange(20) % 4)
    text = str(report)
    assert "rgb + depth" in text
    assert "utilisation" in text
    plain = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert [each["modalities"] for each in plain["subsets"]] == [[], ["rgb"], ["depth"], ["rgb", "depth"]]
    report.plot(str(tmp_path / "missing.png"))
    assert (tmp_path / "missing.png").stat().st_size > 1000
    one = missing_report(QualityAwareFusion(2), heads(2, 1), torch.zeros(1, dtype=torch.long)).to_dict()
    assert one["modalities"][0]["accuracy"]["last_interval"] == [None, None]


def test_many_modalities_get_the_ends_and_sampled_orders():
    fusion, logits, target = QualityAwareFusion(13), heads(13, 8), torch.arange(8) % 4
    report = missing_report(fusion, logits, target)
    assert [len(each.modalities) for each in report.subsets] == [0] + [1] * 13 + [12] * 13 + [13]
    drawn = shapley_importance(fusion, logits, target)
    assert [m.log_loss.shapley for m in report.modalities] == pytest.approx(drawn.mean)
    assert [m.log_loss.shapley_interval for m in report.modalities] == [pytest.approx(e) for e in drawn.interval]
    eight = missing_report(QualityAwareFusion(6), heads(6, 8), target)
    assert len(eight.subsets) == 64
    assert "(64 subsets in all" in str(eight)


def test_one_modality_and_ties():
    report = missing_report(QualityAwareFusion(1), torch.zeros(1, 4, 4), torch.arange(4))
    assert [each.accuracy for each in report.subsets] == [0.25, 0.25]
    assert report.modalities[0].accuracy.last == 0.0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 40), st.integers(2, 5), st.integers(0, 1000))
def test_calibration_error_is_torchmetrics(n, k, seed):
    metric = pytest.importorskip("torchmetrics.functional.classification").multiclass_calibration_error
    g = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(n, k, generator=g, dtype=torch.float64)).softmax(-1)
    target = torch.randint(k, (n,), generator=g)
    expected = float(metric(probabilities, target, k, n_bins=15))
    assert calibration_error(probabilities, target) == pytest.approx(expected, abs=1e-6)
