"""``fusion_report`` against numpy and scipy in float64, its verdicts, and the streaming correlation."""

import json

import numpy as np
import pytest
import torch

from qmf_fusion import QualityAwareFusion, fusion_report
from qmf_fusion.theory import WeightLossCorrelation, spearman

from ..two_processes import run_two
from .test_calibration import data, quietly


def test_report_is_the_definitions():
    logits, target = data(wrong=1)
    static = [0.3, 0.4, 0.5]
    report = fusion_report(QualityAwareFusion(3), logits, target, static)
    x = logits.numpy()
    lse = np.log(np.exp(x).sum(-1))
    weights, losses = 0.1 * lse, lse - np.take_along_axis(x, target.numpy()[None, :, None], -1)[..., 0]
    stats = pytest.importorskip("scipy.stats")
    term_l = term_cov = 0.0
    for m, row in enumerate(report.modalities):
        w, v = weights[m], losses[m]
        assert row.samples == 200
        assert row.mean_weight == pytest.approx(w.mean())
        assert row.static_weight == static[m]
        assert row.pearson == pytest.approx(np.corrcoef(w, v)[0, 1])
        assert row.spearman == pytest.approx(stats.spearmanr(w, v)[0])
        assert row.covariance == pytest.approx(np.cov(w, v, bias=True)[0, 1])
        assert row.term_l == pytest.approx(w.mean() * v.mean())
        assert row.term_l_static == pytest.approx(static[m] * v.mean())
        assert row.interval[0] < row.pearson < row.interval[1]
        term_l, term_cov = term_l + w.mean() * v.mean(), term_cov + np.cov(w, v, bias=True)[0, 1]
    assert report.bound == pytest.approx(term_l + term_cov)
    assert report.bound == pytest.approx((weights * losses).mean(1).sum())
    assert report.bound_static == pytest.approx(sum(s * v.mean() for s, v in zip(static, losses, strict=True)))
    assert [row.eq6 for row in report.modalities] == ["holds", "fails", "holds"]
    assert report.verdict == "fails"
    assert "Eq. 6 fails for 1" in report.sentence


def test_bootstrap_interval_is_near_fishers_and_seeded():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1, 500, 2, generator=g, dtype=torch.float64)
    target = (a[0, :, 0] + 2 * torch.randn(500, generator=g) < a[0, :, 1]).long()
    reports = [fusion_report(QualityAwareFusion(1), a, target, seed=s) for s in (0, 0, 1)]
    first = reports[0].modalities[0]
    z = np.arctanh(first.pearson)
    fisher = np.tanh([z - 1.96 / np.sqrt(497), z + 1.96 / np.sqrt(497)])
    assert first.interval == pytest.approx(fisher, abs=0.06)
    assert reports[0].to_dict() == reports[1].to_dict() != reports[2].to_dict()


def test_calibration_turns_fails_into_holds():
    logits, target = data(n=2000, wrong=1)
    fusion = QualityAwareFusion(3)
    assert fusion_report(fusion, logits, target).verdict == "fails"
    report = fusion_report(quietly(fusion, logits, target), logits, target)
    assert report.verdict == "holds"
    assert report.bound < report.bound_static
    assert report.modalities[1].covariance == pytest.approx(0, abs=1e-12)


def test_small_data_is_undecided_and_an_absent_modality_does_not_spoil_the_rest():
    logits, target = data(n=12)
    assert fusion_report(QualityAwareFusion(3), logits, target, 1e-9).eq5 == "fails"
    tiny = fusion_report(QualityAwareFusion(3), logits[:, :4], target[:4])
    assert tiny.verdict in ("undecided", "fails")
    logits, target = data()
    report = fusion_report(QualityAwareFusion(3), logits, target, present=torch.tensor([True, True, False]))
    assert report.modalities[2].samples == 0
    assert report.modalities[2].eq6 == "undecided"
    assert np.isfinite(report.bound)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("static", [None, 1e-9])
def test_a_few_samples_decide_nothing(n, static):
    for seed in range(5):
        logits, target = data(seed, n=n)
        report = fusion_report(QualityAwareFusion(3), logits, target, static)
        assert {report.verdict, *(m.eq5 for m in report.modalities), *(m.eq6 for m in report.modalities)} == {
            "undecided"
        }
        assert all(f"{n} of the 4 samples" in m.sentence for m in report.modalities)


NAMES = ["a", "b", "c"]


@pytest.mark.parametrize(
    "fusion", [QualityAwareFusion.robust(NAMES, 4), QualityAwareFusion(NAMES)], ids=["robust", "default"]
)
def test_prints_converts_and_plots(fusion, tmp_path):
    pytest.importorskip("matplotlib")
    logits, target = data()
    report = fusion_report(fusion, logits, target)
    text = str(report)
    assert all(word in text for word in ("Term-L", "Term-Cov", "Spearman", "total", report.sentence))
    assert json.loads(json.dumps(report.to_dict()))["verdict"] == report.verdict
    report.plot(str(tmp_path / "report.png"))
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_spearman_takes_ties_at_their_mean_rank():
    stats = pytest.importorskip("scipy.stats")
    x, y = torch.randint(5, (2, 60), generator=torch.Generator().manual_seed(0)).double()
    assert spearman(x, y) == pytest.approx(stats.spearmanr(x, y)[0])


def test_streaming_equals_all_at_once():
    g = torch.Generator().manual_seed(0)
    w, v = torch.randn(2, 3, 1000, generator=g, dtype=torch.float64) + 1e4
    v = v + w
    counted = torch.rand(3, 1000, generator=g) > 0.2
    one, two = WeightLossCorrelation(3), WeightLossCorrelation(3)
    for i, part in enumerate(torch.arange(1000).split(70)):
        (one if i % 2 else two).update(w[:, part], v[:, part], counted[:, part])
    one.merge_state(two)
    out = one.compute()
    for m in range(3):
        a, b = w[m, counted[m]].numpy(), v[m, counted[m]].numpy()
        assert out.samples[m] == len(a)
        assert out.pearson[m].item() == pytest.approx(np.corrcoef(a, b)[0, 1], rel=1e-9)
        assert out.covariance[m].item() == pytest.approx(np.cov(a, b, bias=True)[0, 1], rel=1e-9)
    one.reset()
    assert (one.compute().samples == 0).all()
    assert (one.compute().pearson == 0).all()


WORKER = """
import sys
import torch
from qmf_fusion.theory import WeightLossCorrelation

torch.distributed.init_process_group("gloo")
rank, (w, v) = torch.distributed.get_rank(), torch.load(f"{sys.argv[1]}/data.pt")
metric = WeightLossCorrelation(2)
metric.update(w[:, rank::2], v[:, rank::2])
torch.save(tuple(metric.compute()), f"{sys.argv[1]}/{rank}.pt")
torch.distributed.destroy_process_group()
"""


def test_streaming_across_processes(tmp_path):
    w, v = torch.rand(2, 2, 101, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.save((w, v), tmp_path / "data.pt")
    run_two(WORKER, tmp_path)
    metric = WeightLossCorrelation(2)
    metric.update(w, v)
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    torch.testing.assert_close(found[0], tuple(metric.compute()))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, msg="every process finds the same bits")


def test_streaming_moves_a_batch_to_its_own_device():
    metric = WeightLossCorrelation(2).to("meta")
    metric.update(torch.rand(2, 5), torch.rand(2, 5), torch.ones(2, 5, dtype=torch.bool))
    assert metric.moments.is_meta
