"""``fusion_report`` against numpy and scipy in float64, its verdicts, and the streaming correlation."""

import copy
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qmf_fusion import QualityAwareFusion, fusion_report
from qmf_fusion.correlation_test import judge_correlations
from qmf_fusion.measured import Difference, Measured, measure
from qmf_fusion.theory import WeightLossCorrelation, spearman

from ..two_processes import run_two
from .test_calibration import data, loud_where_right, quietly


def test_report_is_the_definitions():
    logits, target = data(wrong=1)
    static = [0.3, 0.4, 0.5]
    report = fusion_report(QualityAwareFusion(3), logits, target, static)
    x = logits.numpy()
    lse = np.log(np.exp(x).sum(-1))
    weights, losses = 0.1 * lse, lse - np.take_along_axis(x, target.numpy()[None, :, None], -1)[..., 0]
    stats = pytest.importorskip("scipy.stats")
    scale = max(1.2, weights.sum(0).max())
    assert report.scale == pytest.approx(scale)
    term_l = term_cov = 0.0
    for m, row in enumerate(report.modalities):
        w, v = weights[m], losses[m]
        assert row.samples == 200
        assert row.mean_weight == pytest.approx(w.mean())
        assert row.static_weight == pytest.approx(static[m])
        assert row.pearson == pytest.approx(np.corrcoef(w, v)[0, 1])
        assert row.uncertainty_pearson == pytest.approx(-row.pearson)
        assert row.spearman == pytest.approx(stats.spearmanr(w, v)[0])
        assert row.term_cov == pytest.approx(np.cov(w, v, bias=True)[0, 1] / scale)
        assert row.term_l == pytest.approx(w.mean() * v.mean() / scale)
        assert row.term_l_static == pytest.approx(static[m] * v.mean() / scale)
        assert row.interval[0] < row.pearson < row.interval[1]
        term_l, term_cov = term_l + row.term_l, term_cov + row.term_cov
    assert report.bound.term_l == pytest.approx(term_l)
    assert report.bound.term_cov == pytest.approx(term_cov)
    missing = (1 - weights.sum(0).mean() / scale) * np.log(4)
    assert report.bound.total == pytest.approx((weights * losses).sum(0).mean() / scale + missing)
    expected = sum(s * v.mean() for s, v in zip(static, losses, strict=True)) / scale + (1 - 1.2 / scale) * np.log(4)
    assert report.bound_static.total == pytest.approx(expected)
    assert [row.eq6 for row in report.modalities] == ["holds", "fails", "holds"]
    assert [row.assumption1 for row in report.modalities] == ["holds", "fails", "holds"]
    assert report.verdict == "fails"
    assert "Eq. 6 fails for 1" in report.sentence

    fused = {"dynamic": (weights[..., None] * x).sum(0), "static": (np.array(static)[:, None, None] * x).sum(0)}
    for name, f in fused.items():
        loss = np.log(np.exp(f).sum(-1)) - f[np.arange(200), target]
        assert getattr(report.measured.loss, name) == pytest.approx(loss.mean())
        assert getattr(report.measured.accuracy, name) == pytest.approx((f.argmax(-1) == target.numpy()).mean())
        f = f / scale
        bound = report.bound if name == "dynamic" else report.bound_static
        assert bound.loss == pytest.approx((np.log(np.exp(f).sum(-1)) - f[np.arange(200), target]).mean())


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    size=st.sampled_from([0.1, 3.0, 30.0]),
    options=st.fixed_dictionaries(
        {
            "nonnegative": st.booleans(),
            "normalize": st.booleans(),
            "combine": st.sampled_from(["logits", "probabilities"]),
            "alpha": st.sampled_from([-0.01, -0.1, -1.0]),
        }
    ),
)
def test_the_bound_is_one_wherever_it_is_given(seed, size, options):
    g = torch.Generator().manual_seed(seed)
    logits = size * torch.randn(3, 20, 4, generator=g, dtype=torch.float64)
    target, present = torch.randint(4, (20,), generator=g), torch.rand(3, 20, generator=g) < 0.7
    report = fusion_report(QualityAwareFusion(3, **options), logits, target, [0.2, 0.3, 0.5], present, resamples=10)
    assert (report.bound is None) == (report.negative > 0)
    for bound in filter(None, (report.bound, report.bound_static)):
        assert bound.loss <= bound.total + 1e-9
        assert bound.total == pytest.approx(bound.term_l + bound.term_cov + bound.missing)
        if options["combine"] == "probabilities":
            assert bound.missing == pytest.approx(0, abs=1e-9)
            assert report.scale == 1
    if options["normalize"] or options["combine"] == "probabilities":
        assert report.negative == 0
        assert report.measured.loss.dynamic == pytest.approx(report.bound.loss), "what is bounded is what is measured"


@pytest.mark.parametrize("alpha", [-0.01, -0.001])
def test_small_weights_do_not_win_by_being_small(alpha):
    logits, target = data(n=400)
    report = fusion_report(QualityAwareFusion(3, alpha=alpha), logits, target, 0.5)
    assert report.recommended == "static"
    assert report.sentence.startswith("Use the static rule")
    assert report.measured.loss.dynamic > 3 * report.measured.loss.static
    assert report.bound.total > report.bound_static.total


def test_weights_below_0_are_no_case_for_the_theorem():
    """Lemma 1's beta for a mean weight of 0.05 by itself: weights down to -0.65, and about half of the votes turned."""
    logits, target = loud_where_right()
    fusion = QualityAwareFusion(2)
    one, shift = torch.ones(2, dtype=torch.float64), 0.05 - fusion(logits).weights.mean(1)
    fusion.rule.coefficients.correct(scale=one, shift=shift, temper=one)
    report = fusion_report(fusion, logits, target, 0.05)
    assert fusion(logits).weights.min() < -0.5
    assert report.measured.accuracy.static == 1 > 0.8 > report.measured.accuracy.dynamic
    assert report.recommended == "static"
    assert (report.verdict, report.bound) == ("fails", None)
    assert [(m.eq5, m.eq6) for m in report.modalities] == 2 * [("holds", "holds")]
    assert "some weight is negative" in report.sentence
    # What ``calibrate`` makes of the same wish.
    report = fusion_report(quietly(QualityAwareFusion(2), logits, target, 0.05), logits, target)
    assert (report.verdict, report.negative, report.measured.accuracy.dynamic) == ("holds", 0, 1)


def test_fused_probabilities_are_judged_by_their_shares_alone():
    logits, target = data(n=400, wrong=1)
    reports = [
        fusion_report(QualityAwareFusion(3, combine="probabilities", normalize=on), logits, target, [0.2, 0.3, 0.5])
        for on in (False, True)
    ]
    assert str(reports[0]) == str(reports[1])
    assert "shares" in reports[0].judged_by
    assert sum(m.mean_weight for m in reports[0].modalities) == pytest.approx(1)


def test_robust_gets_no_verdict_of_the_theorem():
    logits, target = data(n=400)
    fusion = QualityAwareFusion.robust(3, 4).calibrate(logits, target)
    assert fusion(logits).weights.sum(0).mean() > 1.5
    report = fusion_report(fusion, logits, target)
    assert (report.verdict, report.eq5, report.bound, report.bound_static) == ("none", "none", None, None)
    assert "No theorem covers this rule" in report.sentence
    assert report.recommended in ("dynamic", "static", "either", "depends")
    for m in report.modalities:
        assert m.eq6 == "holds"
        assert 0 <= m.clean.error < 0.1
        assert m.clean.promised == pytest.approx(m.mean_weight)
    assert "Theorem 2" not in str(report)
    assert "P(clean)" in str(report)
    assert all(m.clean is None for m in fusion_report(QualityAwareFusion(3), logits, target).modalities)


def test_p_clean_is_the_mean_of_what_it_becomes_once_the_class_is_known():
    logits, target = data(n=50)
    fusion = QualityAwareFusion.robust(3, 4).calibrate(logits, target)
    out = fusion(logits)
    known = [
        fusion.rule.clean_given_label(fusion.clean_data(logits, torch.full((50,), k))) * out.logits[:, k].exp()
        for k in range(4)
    ]
    torch.testing.assert_close(sum(known), out.weights)


def test_positions_of_a_sample_are_one_sample():
    """Forty sets of twelve images, in which weight and loss are alike over an image, and independent of each other."""
    decided = recommended = 0
    for seed in range(40):
        g = torch.Generator().manual_seed(seed)
        # The size that all logits share is the weight, which of them is the target's the loss.
        size = torch.randn(2, 12, 1, 1, 1, generator=g) + 0.3 * torch.randn(2, 12, 6, 6, 1, generator=g)
        classes = torch.rand(2, 12, 1, 1, 4, generator=g).argsort(-1).expand(2, 12, 6, 6, 4)
        logits, target = 5 + classes + size, torch.randint(4, (12, 1, 1), generator=g).expand(12, 6, 6)
        report = fusion_report(QualityAwareFusion(2), logits, target, resamples=200)
        decided += report.eq6 == "fails" or any(m.eq6 == "holds" for m in report.modalities)
        recommended += report.recommended != "either"
        assert (report.measured.samples, report.measured.rows) == (12, 432)
    assert decided <= 8
    assert recommended <= 5


@pytest.mark.parametrize("kind", ["loss", "opposite"])
@pytest.mark.parametrize("n", [4, 5, 6, 8, 10, 20, 50, 200])
def test_of_two_rules_that_are_alike_none_is_recommended(n, kind):
    """Two of logits at random; and two that never agree, where chance alone makes one right of all of a few samples."""
    told, sets, g = 0, 200, torch.Generator().manual_seed(n)
    for seed in range(sets):
        one, other = 2 * torch.randn(2, n, 3, generator=g)
        if kind == "opposite":
            one = torch.nn.functional.one_hot(torch.randint(2, (n,), generator=g), 2).double()
            other = 1 - one
        target = torch.randint(one.shape[-1], (n,), generator=g)
        told += measure(one, other, target, torch.ones(n, dtype=torch.bool), 0.95, 300, seed).recommended != "either"
    assert told <= 0.085 * sets, "5 %, and two standard errors"


def test_the_test_of_eq_6_is_a_clustered_sandwich_with_holms_levels():
    stats = pytest.importorskip("scipy.stats")
    undecided = 0
    for seed in range(30):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(4, 15, 1, generator=g, dtype=torch.float64) + torch.randn(4, 15, 3, generator=g)
        y = x * torch.tensor([0.0, 0.5, 0.9, -0.7]).view(4, 1, 1) + torch.randn(4, 15, 3, generator=g)
        counted = torch.rand(4, 15, 3, generator=g) < 0.8
        found = judge_correlations(x, y, counted, 0.9)
        chances = []
        for m in range(4):
            a, b = (v[m][counted[m]].numpy() for v in (x, y))
            n, r = len(a), np.corrcoef(a, b)[0, 1]
            a, b = (a - a.mean()) / a.std(), (b - b.mean()) / b.std()
            sample = counted[m].nonzero()[:, 0].numpy()
            sums = [(a * b - r * (a * a + b * b) / 2)[sample == s].sum() for s in np.unique(sample)]
            num = len(sums)
            error = np.sqrt(np.square(sums).sum()) / n / (1 - r * r) * np.sqrt(num / (num - 3))
            one = stats.t.sf(np.arctanh(r) / error, num - 2)
            chances.append(np.sort([stats.norm.sf(np.arctanh(r) * np.sqrt(n - 3)), one])[int(r > 0)])
            assert found.r[m] == pytest.approx(r)
            assert found.low[m] < r < found.high[m]
        for sign, p in ((1, np.array(chances)), (-1, 1 - np.array(chances))):
            order = np.argsort(p)
            passed = np.minimum.accumulate(p[order] < 0.1 / (4 - np.arange(4)))
            assert sorted(order[passed]) == [m for m in range(4) if found.sign[m] == sign]
        undecided += int((found.sign == 0).sum())
    assert 30 < undecided < 70


def test_report_and_calibrate_share_one_test():
    held = 0
    for seed in range(30):
        logits, target = data(seed, n=20, wrong=seed % 3)
        logits[seed % 3] += 4 * torch.randn(20, 1, generator=torch.Generator().manual_seed(seed))
        report = fusion_report(QualityAwareFusion(3), logits, target, resamples=5)
        found = quietly(QualityAwareFusion(3), logits, target, 5.0).calibration.held > 0
        assert found.tolist() == [m.eq6 == "fails" for m in report.modalities]
        held += int(found.sum())
    assert 5 < held < 25


def test_intervals_are_near_fishers_and_the_bootstrap_is_seeded():
    g = torch.Generator().manual_seed(0)
    a = torch.randn(1, 500, 2, generator=g, dtype=torch.float64)
    target = (a[0, :, 0] + 2 * torch.randn(500, generator=g) < a[0, :, 1]).long()
    reports = [fusion_report(QualityAwareFusion(1), a, target, seed=s) for s in (0, 0, 1)]
    first = reports[0].modalities[0]
    z = np.arctanh(first.pearson)
    fisher = np.tanh([z - 1.96 / np.sqrt(497), z + 1.96 / np.sqrt(497)])
    assert first.interval == pytest.approx(fisher, abs=0.06)
    assert reports[0].to_dict() == reports[1].to_dict() != reports[2].to_dict()


def test_the_paired_interval_is_that_of_the_mean_difference():
    logits, target = data(n=500)
    report = fusion_report(QualityAwareFusion(3), logits, target, [0.9, 0.1, 0.1], resamples=4000)
    out = QualityAwareFusion(3)(logits).logits
    static = (torch.tensor([0.9, 0.1, 0.1]).view(3, 1, 1) * logits).sum(0)
    losses = [torch.nn.functional.cross_entropy(f, target, reduction="none") for f in (out, static)]
    gap = losses[0] - losses[1]
    error = float(gap.std()) / 500**0.5
    # At 97.5 %, as the accuracy has the other half of the level.
    expected = (float(gap.mean()) - 2.2414 * error, float(gap.mean()) + 2.2414 * error)
    assert report.measured.loss.difference == pytest.approx(float(gap.mean()))
    assert report.measured.loss.interval == pytest.approx(expected, abs=0.15 * error)


def test_recommendations_weigh_both_measures():
    def told(loss, accuracy, samples=100):
        ends = {-1: (-2.0, -1.0), 0: (-1.0, 1.0), 1: (1.0, 2.0)}
        measured = Measured(samples, samples, *(Difference(0.0, 0.0, ends[sign]) for sign in (loss, accuracy)))
        return measured.recommended

    assert told(-1, 0) == told(0, 1) == told(-1, 1) == "dynamic"
    assert told(1, 0) == told(0, -1) == told(1, -1) == "static"
    assert told(1, 1) == told(-1, -1) == "depends"
    assert told(0, 0) == told(-1, 1, samples=3) == "either"


RULING_OUT = {
    "energy": QualityAwareFusion(3),
    "temperature": QualityAwareFusion(3, temperature=2.0),
    "normalize": QualityAwareFusion(3, normalize=True),
    "nonnegative": QualityAwareFusion(3, nonnegative=True),
    "entropy": QualityAwareFusion(3, uncertainty="entropy"),
    "msp": QualityAwareFusion(3, uncertainty="msp"),
    "evidence": QualityAwareFusion(3, uncertainty="evidence"),
}


def ruled_out():
    """One class of each sample's others is -inf in modality 0, all of modality 1 is in one sample, and one is NaN."""
    logits, target = data(n=400)
    logits[0, torch.arange(400), (target + 1) % 4] = -torch.inf
    logits[1, 7] = -torch.inf
    logits[2, 9, 0] = torch.nan
    return logits, target


@pytest.mark.parametrize("rule", RULING_OUT)
def test_rows_that_rule_a_class_out_count_as_they_do_in_forward(rule):
    logits, target = ruled_out()
    fusion, counted = RULING_OUT[rule], torch.isfinite(logits.logsumexp(-1))
    for n in range(2):
        report, out = fusion_report(fusion, logits, target, [0.2, 0.3, 0.5], resamples=50), fusion(logits)
        assert [m.samples for m in report.modalities] == [400, 399, 399]
        shown = report.measured
        assert shown.loss.dynamic == pytest.approx(torch.nn.functional.cross_entropy(out.logits, target).item())
        assert shown.accuracy.dynamic == pytest.approx((out.logits.argmax(-1) == target).double().mean().item())
        static = torch.tensor([0.2, 0.3, 0.5]).view(3, 1) * counted
        if rule == "normalize":
            static = static / static.sum(0)
        fixed = (static.unsqueeze(-1) * torch.where(static.unsqueeze(-1) > 0, logits, 0)).sum(0)
        assert shown.loss.static == pytest.approx(torch.nn.functional.cross_entropy(fixed, target).item())
        for m in report.modalities:
            assert np.isfinite([*m.interval, *m.mean_interval, m.mean_loss, m.term_l, m.term_cov, m.pearson]).all()
        for bound in (report.bound, report.bound_static):
            assert n == 0 or bound is not None
            assert bound is None or bound.loss <= bound.total + 1e-9
        fit = ["temperature", "alpha"]
        fusion = quietly(copy.deepcopy(fusion), logits, target, [0.2, 0.3, 0.5], fit=fit)
    weights = fusion(logits).weights
    if rule != "normalize":
        torch.testing.assert_close(weights.sum(1) / counted.sum(1), torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))


@pytest.mark.parametrize("combine", [{"combine": "probabilities"}, {"normalize_logits": 0.1}])
def test_rows_that_are_absent_in_forward_for_a_ruled_out_class_do_not_count(combine):
    logits, target = ruled_out()
    fusion = QualityAwareFusion(3, **combine)
    report = fusion_report(fusion, logits, target, resamples=5)
    assert [m.samples for m in report.modalities] == [0, 399, 399] == (fusion(logits).weights != 0).sum(1).tolist()


def test_a_target_that_is_ruled_out_is_named():
    logits, target = ruled_out()
    logits[0, 3, target[3]] = logits[0, 5, target[5]] = -torch.inf
    for call in (fusion_report, QualityAwareFusion.calibrate):
        with pytest.raises(ValueError, match=r"-inf at the target's class.*\{'0': 2\}"):
            call(QualityAwareFusion(3), logits, target)
    ignored = target.clone()
    ignored[[3, 5]] = -100
    assert fusion_report(QualityAwareFusion(3), logits, ignored).measured.samples == 398


def test_calibration_turns_fails_into_holds():
    logits, target = data(n=2000, wrong=1)
    fusion = QualityAwareFusion(3)
    assert fusion_report(fusion, logits, target).verdict == "fails"
    report = fusion_report(quietly(fusion, logits, target), logits, target)
    assert report.verdict == "holds"
    assert report.bound.total < report.bound_static.total
    assert report.modalities[1].term_cov == pytest.approx(0, abs=1e-12)


def test_shares_that_are_held_where_modalities_are_absent_are_the_static_rule():
    logits, target = data(wrong=1)
    present = torch.rand(3, 200, generator=torch.Generator().manual_seed(0)) < 0.7
    fusion = quietly(QualityAwareFusion(3, normalize=True), logits, target, present=present)
    report = fusion_report(fusion, logits, target, present=present)
    assert (report.eq5, report.eq6, report.verdict, report.recommended) == ("holds", "holds", "holds", "either")
    assert report.measured.loss.difference == pytest.approx(0, abs=1e-9)


def test_small_data_is_undecided_and_an_absent_modality_does_not_spoil_the_rest():
    logits, target = data(n=12)
    assert fusion_report(QualityAwareFusion(3), logits, target, 1e-9).eq5 == "fails"
    tiny = fusion_report(QualityAwareFusion(3), logits[:, :4], target[:4])
    assert tiny.verdict in ("undecided", "fails")
    logits, target = data()
    report = fusion_report(QualityAwareFusion(3), logits, target, present=torch.tensor([True, True, False]))
    assert report.modalities[2].samples == 0
    assert report.modalities[2].eq6 == "undecided"
    assert np.isfinite(report.bound.total)
    written = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert written["modalities"][2]["mean_weight"] is None
    with pytest.raises(ValueError, match="a row that counts"):
        fusion_report(QualityAwareFusion(3), logits, torch.full_like(target, -100))


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("static", [None, 1e-9])
def test_a_few_samples_decide_nothing(n, static):
    for seed in range(5):
        logits, target = data(seed, n=n)
        report = fusion_report(QualityAwareFusion(3), logits, target, static)
        assert {report.verdict, *(m.eq5 for m in report.modalities), *(m.eq6 for m in report.modalities)} == {
            "undecided"
        }
        assert report.recommended == "either"
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
    assert all(word in text for word in ("Spearman", "r(u, loss)", report.judged_by, report.sentence))
    if report.bound is not None:
        assert all(word in text for word in ("Term-L", "Term-Cov", "data given", "Not computed: the Rademacher"))
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
