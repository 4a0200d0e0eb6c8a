"""The monitor on streams with known faults: alarms, none where nothing is wrong, state, processes, feedback."""

import copy
import json
import math
import pickle
from pathlib import Path

import pytest
import torch

from qmf_fusion import FusionModel, QualityAwareFusion
from qmf_fusion.monitor import Alarm, ReliabilityMonitor
from qmf_fusion.monitor.history import POINTS, History
from qmf_fusion.monitor.observed import _hash, pair_up
from qmf_fusion.rules import RULES, EntropyWeights

from ..two_processes import run_two

CENTERS = 4 * torch.eye(5)


def rows(n, seed, spread=(1.0, 1.0), m=2):
    """Logits ``[M, n, 5]`` of heads that are right most of the time, with Gaussian noise of these deviations."""
    g = torch.Generator().manual_seed(seed)
    target = torch.randint(5, (n,), generator=g)
    noise = torch.randn(m, n, 5, generator=g) * torch.tensor(spread).reshape(-1, 1, 1)
    return CENTERS[target] + noise, target


def robust(**options):
    fusion = QualityAwareFusion.robust(["rgb", "depth"], 5, **options)
    return fusion.calibrate(*rows(600, 100)).eval()


def watched(fusion=None, **options):
    return ReliabilityMonitor(robust() if fusion is None else fusion, **options).fit(rows(400, 101)[0])


FAULTS = {
    "dead": (lambda x: torch.full_like(x, torch.nan), {"absence"}),
    "blank": (lambda x: torch.zeros_like(x), {"shift", "repetition"}),
    "stuck": (lambda x: x[:1].expand_as(x), {"repetition"}),
    "noisy": (lambda x: x + 2 * torch.randn(x.shape, generator=torch.Generator().manual_seed(1)), {"shift"}),
    "drifting": (lambda x: x * (1 + torch.linspace(0, 3, len(x)).unsqueeze(1)), {"shift"}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("rule", ["robust", "energy"])
def test_faults_are_found_soon_and_by_name(fault, rule):
    fusion = robust() if rule == "robust" else QualityAwareFusion(["rgb", "depth"]).eval()
    monitor = watched(fusion)
    assert monitor.update(rows(1000, 1)[0]) == []
    damage, tests = FAULTS[fault]
    stream, _ = rows(300, 2)
    stream[1] = damage(stream[1])
    raised = monitor.update(stream)
    assert raised == monitor.alarms
    assert {alarm.modality for alarm in raised} == {"depth"}
    assert tests <= {alarm.test for alarm in raised}
    for alarm in raised:
        if alarm.test in tests:
            assert alarm.raised - 1000 <= (200 if fault == "drifting" else 40)
            assert 990 <= alarm.since <= alarm.raised
            assert alarm.log_e >= monitor.threshold
            assert str(alarm).startswith("depth: it")
    json.dumps([alarm.to_dict() for alarm in raised])


def test_running_estimates_are_exponential_means():
    monitor = watched(memory=50)
    stream, _ = rows(300, 3)
    stream[1, 100:150] = torch.nan
    stream[0, 201] = stream[0, 200]
    monitor.update(stream)
    out = monitor.fusion(stream)
    keep, clean, absent = math.exp(-1 / 50), monitor.running.usual[3].tolist(), 0.0
    for n in range(300):
        absent = keep * absent + (1 - keep) * (100 <= n < 150)
        for m in range(2):
            if m == 0 or not 100 <= n < 150:
                clean[m] = keep * clean[m] + (1 - keep) * float(out.weights[m, n])
    said = monitor.as_dict()
    assert [said["p_clean/rgb"], said["p_clean/depth"]] == pytest.approx(clean)
    assert said["absence/depth"] == pytest.approx(absent)
    assert said["repetition/rgb"] == pytest.approx((1 - keep**2) * keep**98)  # 49 pairs followed
    assert said["repetition/depth"] == 0
    assert set(said) == {
        f"{what}/{name}"
        for name in ("rgb", "depth")
        for what in ("p_clean", "alarm", *(f"{e}{t}" for e in ("", "log_e_") for t in monitor.tests))
    }


def test_shift_stays_up_as_long_as_a_fault_lasts():
    monitor = watched()
    stream, _ = rows(2000, 31)
    stream[1] *= 5
    monitor.update(stream)
    said = monitor.as_dict()
    assert said["shift/depth"] > 0.9
    assert abs(said["shift/rgb"]) < 0.3


def test_a_line_for_any_logger():
    monitor, said = watched(memory=100), []
    stream, _ = rows(50, 3)
    stream[1] = torch.nan
    monitor.update(stream)
    monitor.log(said.append)
    assert said == [monitor.line()]
    assert said[0].startswith("row 50 | rgb: P(clean) 0.79, shift -0.02, repetition 0.0 %")
    assert said[0].endswith("absence 39.3 %, ALARM: absence")
    assert "P(clean)" not in watched(QualityAwareFusion(["rgb", "depth"]).eval()).line()


@pytest.mark.parametrize("rule", RULES)
def test_every_published_rule_is_watched(rule):
    """By an uncertainty of its own, both ways, and without P(clean)."""
    torch.manual_seed(0)  # the networks of pdf
    made = RULES[rule](2, **({"num_classes": 5} if rule == "pdf" else {}))
    fusion = QualityAwareFusion(["rgb", "depth"], combine=made).eval()
    monitor = ReliabilityMonitor(fusion).fit(rows(300, 37)[0])
    assert monitor.shift.two_sided
    assert monitor.update(rows(200, 38)[0]) == []
    stream = rows(100, 39)[0]
    stream[1] *= 20 if rule == "pdf" else 0.05
    assert {(alarm.modality, alarm.test) for alarm in monitor.update(stream)} == {("depth", "shift")}
    assert "p_clean/rgb" not in monitor.as_dict()
    with pytest.raises(ValueError, match="feedback must be False"):
        ReliabilityMonitor(fusion, feedback=True)


def test_a_rule_says_itself_what_its_uncertainty_means():
    class Own(EntropyWeights):
        gives_p_clean = True

    assert ReliabilityMonitor(QualityAwareFusion(2, combine=Own(2))).shift.two_sided
    assert not ReliabilityMonitor(robust()).shift.two_sided


@pytest.mark.parametrize("sizes", [[1] * 120, [7, 50, 1, 62], [119, 1]])
def test_batches_of_any_size_leave_the_same_state(sizes):
    stream, _ = rows(120, 4)
    stream[0, 60:] = stream[0, 60]
    stream[1, 20:40] = torch.nan
    whole, parts = watched(), watched()
    raised = whole.update(stream)
    found = [alarm for part in stream.split(sizes, 1) for alarm in parts.update(part)]
    assert len(raised) >= 2
    assert [(a.modality, a.test, a.since, a.raised) for a in parts.alarms] == [
        (a.modality, a.test, a.since, a.raised) for a in raised
    ]
    assert len(found) == len(raised)
    state = parts.state_dict()
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(state[name], value, equal_nan=True)


def test_more_than_a_block_leaves_the_same_state():
    stream, _ = rows(700, 4)
    whole, parts = watched(), watched()
    whole.update(stream)
    for part in stream.split(301, 1):
        parts.update(part)
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], value, equal_nan=True)


def test_a_stream_goes_on_from_its_state():
    stream, _ = rows(80, 5)
    through, stopped = watched(alpha=0.05), watched(alpha=0.05)
    stream[0, 20:], stream[1, 38:] = torch.nan, stream[1, 38]
    through.update(stream[:, :41])
    stopped.update(stream[:, :41])
    again = ReliabilityMonitor(stopped.fusion)
    shapes = {name: value.shape for name, value in again.state_dict().items()}
    again.load_state_dict(pickle.loads(pickle.dumps(stopped.state_dict())))
    assert shapes == {name: value.shape for name, value in again.state_dict().items()}
    others = [pickle.loads(pickle.dumps(stopped)), copy.deepcopy(stopped).bfloat16()]
    (raised,) = through.update(stream[:, 41:])
    assert (raised.test, len(through.alarms)) == ("repetition", 2)
    for monitor in (again, *others):
        assert monitor.update(stream[:, 41:]) == [raised]
        assert monitor.alarms == through.alarms
        assert monitor.alpha == 0.05
        for name, value in through.state_dict().items():
            assert torch.equal(monitor.state_dict()[name].nan_to_num(7), value.nan_to_num(7)), name
    assert not any(name.startswith("fusion") for name in again.state_dict())
    assert not list(again.parameters())


def test_ties_are_broken_by_the_seed_which_is_part_of_the_state():
    stream, evidence = rows(200, 36)[0], []
    for monitor in (watched(), watched(seed=0), watched(seed=1), watched(seed=2**31)):
        monitor.update(stream)
        evidence.append(monitor.absence.log_e.tolist())
    assert evidence[0] == evidence[1]
    assert len({each for pair in evidence[1:] for each in pair}) == 6
    again = ReliabilityMonitor(monitor.fusion)
    again.load_state_dict(monitor.state_dict())
    for each in (monitor, again):
        each.update(stream)
    assert again.as_dict() == monitor.as_dict()


def test_nothing_but_the_monitor_changes():
    monitor = watched()
    before, random = copy.deepcopy(monitor.fusion.state_dict()), torch.get_rng_state()
    stream = rows(50, 6)[0].requires_grad_()
    with torch.inference_mode():
        monitor.update(rows(3, 7)[0])
    monitor.update(stream)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in monitor.fusion.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(value.requires_grad for value in monitor.state_dict().values())


def test_a_monitor_that_was_made_under_inference_mode_goes_on_outside():
    fusion, plain = robust(), watched(feedback=True)
    with torch.inference_mode():
        monitor = watched(fusion, feedback=True)
        monitor.update(rows(30, 7)[0])
    monitor.update(rows(30, 8)[0])
    plain.update(rows(30, 7)[0])
    plain.update(rows(30, 8)[0])
    assert monitor.as_dict() == plain.as_dict()
    assert monitor.reset().alarms == []


def test_outputs_and_logits_are_the_same():
    fusion, (stream, _) = robust(), rows(60, 8)
    present = torch.rand(2, 60, generator=torch.Generator().manual_seed(0)) < 0.8
    monitors = [watched(fusion) for _ in range(4)]
    monitors[0].update(fusion(stream, present))
    monitors[1].update(stream, present=present)
    monitors[2].update({"depth": stream[1], "rgb": stream[0]}, present={"rgb": present[0], "depth": present[1]})
    broken = stream.masked_fill(~present.unsqueeze(-1), torch.inf)
    monitors[3].update(broken)
    for other in monitors[1:]:
        assert other.as_dict() == monitors[0].as_dict()
    monitors[0].update([stream[0], None])
    assert int(monitors[0].absence.seen[1, 1]) == int((~present[1]).sum()) + 60


def test_features_show_what_logits_do_not():
    g, fusion = torch.Generator().manual_seed(0), QualityAwareFusion.robust(["rgb", "depth"], 5, features=[6, None])
    logits, target = rows(600, 9)
    features = torch.randn(1400, 6, generator=g)
    fusion.calibrate(logits, target, features=[features[:600], None]).eval()
    monitor = ReliabilityMonitor(fusion).fit(rows(400, 10)[0], features=[features[600:1000], None])
    assert monitor.update(rows(300, 11)[0], features=[features[1000:1300], None]) == []
    stream = rows(100, 12)[0]
    with pytest.raises(
        ValueError, match=r"features must be of the reference's modalities, \['rgb'\], got those of \[\]"
    ):
        monitor.update(stream)
    (alarm,) = monitor.update(stream, features=[3 * features[1300:], None])
    assert (alarm.modality, alarm.test) == ("rgb", "shift")
    fresh = ReliabilityMonitor(fusion).fit(rows(400, 10)[0], features=[features[600:1000], None])
    stream[0] = stream[0, 0]  # the same logits of other features are not the same row
    assert [alarm.test for alarm in fresh.update(stream, features=[features[1300:], None])] == ["shift"] * (
        len(fresh.alarms)
    )


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_an_output_of_the_layer_alone_brings_its_features(class_dim):
    g = torch.Generator().manual_seed(0)
    fusion = QualityAwareFusion.robust(["rgb", "depth"], 5, features=[6, None], class_dim=class_dim)
    logits, features = torch.randn(2, 400, 3, 5, generator=g), torch.randn(400, 3, 6, generator=g)
    if class_dim == 1:
        logits, features = logits.movedim(-1, 2), features.movedim(-1, 1)
    fusion.calibrate(logits[:, :200], torch.randint(5, (200, 3), generator=g), features=[features[:200], None]).eval()
    out = fusion(logits[:, 200:], features={"rgb": features[200:], "depth": None})
    assert torch.equal(out.features[0], features[200:])
    assert out.features[1] is None
    whole, parts = ReliabilityMonitor(fusion).fit(out), ReliabilityMonitor(fusion)
    parts.fit(logits[:, 200:], features=[features[200:], None])
    assert whole.judged.tolist() == [True, False]
    broken = [torch.full_like(features[:50], torch.nan), None]
    for monitor in (whole, parts):
        monitor.update(fusion(logits[:, :50], features=[features[:50], None]), features=broken)
        assert monitor.absence.seen[:, 1].tolist() == [50, 0]
    for name, value in whole.state_dict().items():
        assert torch.equal(value.nan_to_num(7), parts.state_dict()[name].nan_to_num(7)), name
    with pytest.warns(UserWarning, match="features are not given, though the rule has widths for some"):
        parts.fit(logits[:, 200:])


def test_a_whole_model_is_watched():
    heads = {name: torch.nn.Linear(4, 3) for name in ("rgb", "depth")}
    model = FusionModel(heads, "robust", num_classes=3).eval()
    g = torch.Generator().manual_seed(0)
    inputs = {name: torch.randn(300, 4, generator=g) for name in heads}
    with torch.no_grad():
        model.fusion.calibrate(model(inputs), torch.randint(3, (300,), generator=g))
        monitor = ReliabilityMonitor(model.fusion).fit(model({n: torch.randn(300, 4, generator=g) for n in heads}))
        assert monitor.update(model({n: torch.randn(100, 4, generator=g) for n in heads})) == []
        raised = monitor.update(model({"rgb": torch.randn(100, 4, generator=g), "depth": None}))
    assert [(alarm.modality, alarm.test) for alarm in raised] == [("depth", "absence")]


@pytest.mark.parametrize("class_dim", [-1, 1])
def test_a_dense_prediction_is_one_row_of_its_positions_mean(class_dim):
    g = torch.Generator().manual_seed(0)
    fusion = QualityAwareFusion(2, class_dim=class_dim).eval()
    maps = torch.randn(2, 200, 3, 4, 5, generator=g)  # [M, B, H, W, K]
    laid = maps if class_dim == -1 else maps.movedim(-1, 2)
    monitor = ReliabilityMonitor(fusion).fit(laid)
    stuck = laid[:, :30].clone()
    stuck[1] = laid[1, 0]
    stuck[0, :, ..., 0] = stuck[0, 0, ..., 0]  # a part of a row alone repeats nothing
    raised = monitor.update(stuck)
    assert {a.modality for a in raised} == {"1"}
    assert "repetition" in {a.test for a in raised}
    flat = ReliabilityMonitor(QualityAwareFusion(2).eval()).fit(maps[:, :, 0, 0])
    means = flat.fusion.uncertainties(maps).mean((2, 3))
    assert torch.equal(monitor.shift.reference.nonzero()[:, 1].unique(), monitor.shift.reference.sum(0).nonzero()[:, 0])
    from qmf_fusion.monitor.ranks import grid_index

    counts = torch.bincount(grid_index(means[1]), minlength=2**16)
    assert (monitor.shift.reference[1] - counts).abs().sum() <= 2  # roundings of the mean
    single = ReliabilityMonitor(QualityAwareFusion(2).eval()).fit(maps[:, :, 0, 0])
    single.update(list(maps[:, 0, 0, 0]))  # one sample without a batch
    assert int(single.rows) == 1


def test_repair():
    monitor, (stream, _) = watched(), rows(100, 13)
    stream[1] = torch.nan
    monitor.update(stream)
    assert [alarm.modality for alarm in monitor.alarms] == ["depth"]
    told = monitor.alarms
    assert monitor.update(stream[:, :10]) == []  # told once
    assert set(monitor.alarms) == set(told)  # though evidence grows
    rgb = monitor.shift.steps[0].clone()
    monitor.reset("depth")
    assert monitor.alarms == []
    assert monitor.as_dict()["absence/depth"] == 0
    assert torch.equal(monitor.absence.seen[1], monitor.absence.reference[1])
    assert monitor.shift.steps.tolist() == [int(rgb), 0]
    assert monitor.update(rows(500, 14)[0]) == []
    (again,) = monitor.update(stream[:, :50])
    assert 600 < again.since <= again.raised < 630
    assert monitor.reset(1).alarms == []
    assert monitor.reset().as_dict()["p_clean/rgb"] == float(monitor.running.usual[3, 0])
    with pytest.raises(ValueError, match=r"modality must be one of \['rgb', 'depth'\] or a number below 2, got 'text'"):
        monitor.reset("text")


def test_no_pair_straddles_a_repair():
    monitor, same = watched(), rows(1, 35)[0]
    monitor.update(same)
    monitor.reset("depth")
    monitor.update(same)
    usual = monitor.repetition.reference[:, 1]
    assert (monitor.repetition.seen[:, 1] - usual).tolist() == [1, 0]


def test_a_reference_of_one_row_and_of_equal_rows():
    alone = ReliabilityMonitor(robust()).fit(rows(1, 15)[0])
    assert alone.update(rows(400, 16)[0]) == []
    assert alone.as_dict()["repetition/rgb"] == 0
    stream, _ = rows(60, 17)
    stream[0] = stream[0, 0]
    assert "repetition" in {alarm.test for alarm in alone.update(stream)}
    with pytest.warns(UserWarning, match="hardly any different values"):
        equal = ReliabilityMonitor(QualityAwareFusion(["rgb", "depth"]).eval()).fit(torch.zeros(2, 50, 5))
    assert equal.as_dict()["repetition/rgb"] == 1
    assert equal.update(torch.zeros(2, 200, 5)) == []  # as it always was
    assert "shift" in {alarm.test for alarm in equal.update(rows(200, 18)[0])}


def test_a_reference_in_which_no_shift_could_be_seen_is_told_of():
    blind = "the uncertainties of the reference have hardly any different values, "
    monitor = ReliabilityMonitor(QualityAwareFusion.robust(["rgb", "depth"], 5).eval())
    with pytest.warns(UserWarning, match=blind + "{'rgb': 1, 'depth': 1}: .*calibrate"):
        monitor.fit(rows(400, 15)[0])
    monitor = ReliabilityMonitor(QualityAwareFusion(["rgb", "depth"]).eval())
    reference, _ = rows(400, 15)
    reference[1] += 10_000
    with pytest.warns(UserWarning, match=blind + r"{'depth': \d}: .*bfloat16"):
        monitor.fit(reference)
    ReliabilityMonitor(robust()).fit(rows(20, 15)[0])


def test_rows_of_the_reference_that_do_not_count():
    reference, _ = rows(400, 19)
    reference[1, ::4] = torch.nan
    monitor = ReliabilityMonitor(robust()).fit(reference)
    assert monitor.as_dict()["absence/depth"] == 0.25
    stream, _ = rows(400, 20)
    stream[1, torch.rand(400, generator=torch.Generator().manual_seed(0)) < 0.25] = torch.nan
    assert monitor.update(stream) == []
    stream[1, ::2] = torch.nan
    assert [alarm.test for alarm in monitor.update(stream)] == ["absence"]
    reference[1] = torch.nan
    with pytest.raises(ValueError, match=r"rows of every modality, got none that counts of \['depth'\]"):
        monitor.fit(reference)


def test_a_row_without_an_uncertainty_is_absent():
    """As where a head of its own measure gives none."""

    def undefined(x):
        return torch.where(x[..., 0] > 50, torch.nan, -torch.logsumexp(x, -1))

    monitor = watched(QualityAwareFusion(["rgb", "depth"], uncertainty=undefined).eval())
    stream = rows(50, 34)[0]
    stream[1] += 100
    assert [alarm.test for alarm in monitor.update(stream)] == ["absence"]
    with pytest.raises(ValueError, match=r"none that counts of \['depth'\]"):
        monitor.fit(stream)


def test_errors_name_the_argument():
    fusion = robust()
    with pytest.raises(TypeError, match="fusion must be a QualityAwareFusion, got int"):
        ReliabilityMonitor(3)
    for alpha, error in ((0, ValueError), (1.0, ValueError), (math.nan, ValueError), ("0.1", TypeError)):
        with pytest.raises(error, match="alpha must be"):
            ReliabilityMonitor(fusion, alpha=alpha)
    with pytest.raises(ValueError, match="memory must be an integer of at least 1, got 0"):
        ReliabilityMonitor(fusion, memory=0)
    with pytest.raises(ValueError, match="seed must"):
        ReliabilityMonitor(fusion, seed=-1)
    with pytest.raises(ValueError, match="feedback must be False for AffineRule"):
        ReliabilityMonitor(QualityAwareFusion(2), feedback=True)
    monitor = ReliabilityMonitor(fusion)
    with pytest.raises(RuntimeError, match=r"fit\(\) this monitor first"):
        monitor.update(rows(5, 0)[0])
    assert monitor.alarms == []
    assert monitor.as_dict()["alarm/rgb"] == 0
    monitor.fit(rows(5, 0)[0])
    state = copy.deepcopy(monitor.state_dict())
    with pytest.raises(ValueError, match="logits must hold 2 modalities"):
        monitor.update(rows(5, 0, (1.0, 1.0, 1.0), m=3)[0])
    with pytest.raises(ValueError, match="logits must not be empty"):
        monitor.update(torch.zeros(2, 0, 5))
    with pytest.raises(ValueError, match="must have the 5 classes"):
        monitor.update(torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match="features must be None"):
        monitor.update(rows(5, 0)[0], features=[torch.zeros(5, 2), None])
    fusion.train()
    for call in (monitor.fit, monitor.update):
        with pytest.raises(RuntimeError, match="the fusion is in training mode"):
            call(rows(5, 0)[0])
    for name, value in monitor.state_dict().items():
        assert torch.equal(value, state[name])
    single = ReliabilityMonitor(QualityAwareFusion(2).eval())
    single.level = single.level.float()  # as on MPS
    with pytest.raises(RuntimeError, match="the monitor needs float64"):
        single.fit(rows(5, 0)[0])
    with pytest.raises(ValueError, match="logits must have the 5 classes of the reference, got 7"):
        watched(QualityAwareFusion(["rgb", "depth"]).eval()).update(torch.zeros(2, 3, 7))


def test_state_of_another_monitor_is_refused_before_any_of_it_is_taken():
    state = watched(QualityAwareFusion(["rgb", "depth"]).eval(), memory=50).state_dict()
    for other, message in (
        (ReliabilityMonitor(QualityAwareFusion(["rgb", "depth"], combine="tmc"), memory=50), "another kind of fusion"),
        (ReliabilityMonitor(QualityAwareFusion(["rgb", "text"]), memory=50), "of the modalities"),
        (ReliabilityMonitor(QualityAwareFusion(["rgb", "depth"])), "'memory': 50, .* and this one has {'memory': 30"),
    ):
        with pytest.raises(RuntimeError, match=message):
            other.load_state_dict(state)
        assert int(other.samples) == int(other.absence.reference.sum()) == 0
    fed = watched(feedback=True)
    with pytest.raises(RuntimeError, match="'feedback': True"):
        ReliabilityMonitor(fed.fusion).load_state_dict(fed.state_dict())


def test_pairs_do_not_overlap_and_wait_for_their_second():
    counted = torch.tensor([[1, 1, 1, 1, 1, 0, 1]], dtype=torch.bool)
    prints = torch.tensor([[4, 4, 4, 5, 5, 5, 9]])
    waiting = torch.zeros(3, 1, dtype=torch.int64)
    whole = pair_up(counted, prints, waiting)
    assert whole.tolist() == [[-1, 1, -1, 0, -1, 0, -1]]
    assert waiting.flatten().tolist() == [1, 1, 9]
    waiting.zero_()
    parts = [pair_up(counted[:, n : n + 1], prints[:, n : n + 1], waiting) for n in range(7)]
    assert torch.equal(torch.cat(parts, 1), whole)


def test_rows_of_the_same_few_values_in_other_places_are_other_rows():
    values = torch.cartesian_prod(*[torch.tensor([-1.0, 0.0, 0.5, 2.0])] * 7)
    assert len(_hash(values).unique()) == len(values)
    assert torch.equal(_hash(values[:9].repeat(2, 1))[:9], _hash(values[:9]))
    stream = torch.tensor([[2.0, -1.0, -1.0, 2.0], [-1.0, 2.0, 2.0, -1.0]]).repeat(50, 1).expand(2, -1, -1)
    assert ReliabilityMonitor(QualityAwareFusion(2).eval()).fit(stream[:, :9]).as_dict()["repetition/0"] == 0


@pytest.mark.parametrize("step", [1, 3, 700])
def test_the_history_thins_itself_out(step):
    history = History(1)
    for start in range(1, 2101, step):
        rows = torch.arange(start, min(start + step, 2101))
        history.add(rows, rows.double().unsqueeze(1))
    got, values = history.points()
    assert got.tolist() == list(range(8, 2101, 8))
    assert torch.equal(values[:, 0], got.double())
    assert POINTS // 2 <= 262 <= POINTS


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    monitor, (stream, _) = watched(), rows(300, 21)
    monitor.plot()  # before any row
    stream[1, 100:] = torch.nan
    monitor.update(stream)
    figure = monitor.plot(str(tmp_path / "monitor.png"), title="two sensors")
    assert (tmp_path / "monitor.png").stat().st_size > 0
    assert len(figure.axes) == 4
    assert [each.get_title() for each in figure.axes[:2]] == ["rgb", "depth"]
    log_e = figure.axes[3].lines[2].get_ydata()  # absence of depth
    assert len(log_e) == 300
    assert log_e[99] < 0 < 5 < log_e[-1]


WORKER = """
import sys
import torch
import torch.distributed as dist
from tests.qmf_fusion.test_monitor import parts_of_two, watched

dist.init_process_group("gloo")
monitor, own = watched(), watched(everywhere=False)
for part in parts_of_two(dist.get_rank()):
    found = monitor.update(part)
    own.update(part)
torch.save([monitor.state_dict(), own.state_dict(), len(monitor.alarms)], f"{sys.argv[1]}/{dist.get_rank()}.pt")
dist.destroy_process_group()
"""


def parts_of_two(rank):
    """Batches of other sizes in each process, all of whole pairs; the second's depth is stuck in the end."""
    stream, _ = rows(60, 22 + rank)
    if rank == 1:
        stream[1, 20:] = stream[1, 20]
    return stream.split([2, 18, 40] if rank == 0 else [20, 10, 30], 1)


def test_two_processes_know_what_one_would(tmp_path: Path):
    run_two(WORKER, tmp_path)
    one, alone = watched(), watched()
    for both in zip(parts_of_two(0), parts_of_two(1), strict=True):
        one.update(torch.cat(both, 1))
    for part in parts_of_two(1):
        alone.update(part)
    assert {(alarm.modality, alarm.test) for alarm in one.alarms} >= {("depth", "repetition")}
    for rank in range(2):
        state, own, alarms = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert alarms == len(one.alarms)
        for name, value in one.state_dict().items():
            if name != "waiting":
                torch.testing.assert_close(state[name], value)
    for name, value in alone.state_dict().items():
        assert torch.equal(own[name], value)


def feed(monitor, n, seed, damage=None, size=10):
    """Right answers over rows that the model's own fusion answers batch by batch, as in production."""
    stream, target = rows(n, seed)
    if damage is not None:
        stream[1] = damage(stream[1])
    right = 0
    for part, labels in zip(stream.split(size, 1), target.split(size), strict=True):
        out = monitor.fusion(part)
        monitor.update(out)
        right += int((out.logits.argmax(-1) == labels).sum())
    return right / n


def noisy(x):
    return 3 * torch.randn(x.shape, generator=torch.Generator().manual_seed(3))


def test_feedback_lets_odds_follow_a_fault_and_recovers():
    plain, fed = watched(), watched(robust(), feedback=True, memory=50)
    feed(fed, 300, 23)
    assert all(0.4 < value < 2.5 for value in fed.odds.factor.tolist())
    feed(plain, 300, 23)
    without, with_it = (feed(monitor, 300, 24, noisy) for monitor in (plain, fed))
    assert float(fed.odds.factor[1]) > 2 > float(fed.odds.factor[0])
    assert with_it > without
    torch.testing.assert_close(fed.fusion.rule.odds, fed.odds.given * fed.odds.factor)
    assert torch.equal(fed.odds.given, plain.fusion.rule.odds)
    feed(fed, 300, 25)
    assert all(0.4 < value < 2.5 for value in fed.odds.factor.tolist())
    assert fed.as_dict()["odds/depth"] == float(fed.odds.factor[1])
    feed(fed, 100, 24, noisy)
    fed.reset("depth")
    assert fed.odds.factor[1] == 1
    fed.fit(rows(400, 101)[0])
    assert torch.equal(fed.fusion.rule.odds, fed.odds.given)


def test_feedback_takes_a_row_that_repeats_for_broken():
    """However typical it is."""
    plain, fed = watched(), watched(robust(), feedback=True)
    stuck = [feed(monitor, 200, 29, lambda x: x[:1].expand_as(x)) for monitor in (plain, fed)]
    assert plain.running.now[3, 1] > 0.5  # P(clean)
    assert float(fed.odds.factor[1]) == 30
    assert float(fed.odds.factor[0]) < 4
    assert stuck[1] > stuck[0]
    feed(fed, 200, 30)
    assert float(fed.odds.factor[1]) < 2.5


@pytest.mark.parametrize("start", [30.0, 0.1])
def test_feedback_forgets_from_either_bound(start):
    """Odds at a bound change every later P(clean), but not what it would be at the odds as given."""
    fed = watched(robust(), feedback=True, memory=30)
    fed.odds.set(fed.fusion.rule, torch.tensor([1.0, start], dtype=torch.float64))
    fed.running.now[3, 1] = 0.02 if start > 1 else 0.999
    feed(fed, 400, 26)
    assert 0.3 < float(fed.odds.factor[1]) < 3


def test_feedback_stays_within_its_bounds_and_leaves_evidence_alone():
    plain, fed = watched(), watched(robust(), feedback=True)
    for monitor in (plain, fed):
        feed(monitor, 500, 27, lambda x: 30 * x.flip(-1))
        feed(monitor, 100, 28, lambda x: torch.full_like(x, torch.nan))
    assert 0.1 <= float(fed.odds.factor.min()) <= float(fed.odds.factor.max()) <= 30
    assert float(fed.odds.factor[1]) > 3
    for name, test in plain.tests.items():
        for key, value in test.state_dict().items():
            torch.testing.assert_close(fed.tests[name].state_dict()[key], value)
    again = ReliabilityMonitor(fed.fusion, feedback=True)
    again.load_state_dict(fed.state_dict())
    again.reset()
    torch.testing.assert_close(fed.fusion.rule.odds, plain.fusion.rule.odds)


def fault_of(monitor, factor):
    """Feedback in the middle of a fault of depth."""
    monitor.odds.set(monitor.fusion.rule, torch.tensor([1.0, factor], dtype=torch.float64))
    return monitor


def test_p_clean_is_at_the_odds_as_given_whoever_multiplies_them():
    stream, _ = rows(200, 32)
    plain, fed, as_trained = watched(), watched(feedback=True), watched(feedback=True)
    plain.update(stream)
    beside = watched(fed.fusion)
    fault_of(fed, 30.0)
    out = fed.fusion(stream)
    as_trained.load_state_dict(fed.state_dict())
    torch.testing.assert_close(as_trained.fusion.rule.odds, torch.tensor([0.3, 9.0]).double())
    for monitor in (beside, as_trained, fed):
        monitor.update(out)
        assert monitor.running.now[3, 1] == pytest.approx(float(plain.running.now[3, 1]), abs=1e-6)
    torch.testing.assert_close(as_trained.fusion.rule.odds, fed.fusion.rule.odds)


def test_p_clean_of_a_map_is_at_the_odds_as_given_position_by_position():
    g = torch.Generator().manual_seed(0)
    maps, target = 3 * torch.randn(2, 300, 7, 5, generator=g), torch.randint(5, (300, 7), generator=g)
    fusion = QualityAwareFusion.robust(["rgb", "depth"], 5).calibrate(maps[:, :100], target[:100]).eval()
    plain = ReliabilityMonitor(fusion).fit(maps[:, 100:200])
    plain.update(maps[:, 200:])
    fed = fault_of(ReliabilityMonitor(copy.deepcopy(fusion), feedback=True).fit(maps[:, 100:200]), 30.0)
    fed.update(maps[:, 200:])
    assert fed.running.now[3, 1] == pytest.approx(float(plain.running.now[3, 1]), abs=1e-6)


def test_p_clean_that_calibration_holds_follows_no_odds():
    fusion = robust()
    fusion.calibration.held[1] = 0.6
    fed = fault_of(watched(fusion, feedback=True), 30.0)
    fed.update(rows(50, 40)[0])
    assert fed.running.now[3, 1] == pytest.approx(0.6)
    assert fed.odds.factor[1] == pytest.approx(1.0, abs=1e-3)


def test_odds_that_somebody_else_sets_are_not_lost():
    fed = fault_of(watched(feedback=True), 5.0)
    rule, stream = fed.fusion.rule, rows(20, 33)[0]
    rule.set_odds([2.0, 2.0])
    state = copy.deepcopy(fed.state_dict())
    for call in (lambda: fed.update(stream), fed.reset):
        with pytest.raises(RuntimeError, match=r"the rule's odds are \[2.0, 2.0\], and feedback has set \[0.3, 1.5\]"):
            call()
    for name, value in fed.state_dict().items():
        assert torch.equal(value.nan_to_num(7), state[name].nan_to_num(7))
    fed.fit(rows(400, 101)[0])
    assert rule.odds.tolist() == fed.odds.given.tolist() == [2.0, 2.0]
    fed.update(stream)
    fed.reset()
    assert rule.odds.tolist() == [2.0, 2.0]
    other = ReliabilityMonitor(fed.fusion, feedback=True).fit(rows(400, 101)[0])
    fault_of(other, 5.0)
    with pytest.raises(RuntimeError, match="another monitor"):
        fed.update(stream)


def test_a_reference_taken_in_a_fault_is_at_the_odds_as_given():
    fed, plain = fault_of(watched(feedback=True), 30.0), watched()
    with pytest.raises(ValueError, match="got none that counts"):
        fed.fit(torch.full((2, 20, 5), torch.nan))
    torch.testing.assert_close(fed.fusion.rule.odds, torch.tensor([0.3, 9.0]).double())
    fed.fit(fed.fusion(rows(400, 101)[0]))  # an output that was made at the raised odds
    assert torch.equal(fed.running.usual, plain.running.usual)
    assert fed.fusion.rule.odds.tolist() == [0.3, 0.3]


@pytest.mark.slow
@pytest.mark.parametrize("feedback", [False, True])
def test_no_alarm_in_100000_clean_rows(feedback):
    monitor = watched(robust(), feedback=feedback)
    for seed in range(100):
        monitor.update(rows(1000, 1000 + seed)[0])
    assert monitor.alarms == []
    assert int(monitor.rows) == 100_000
    assert all(0.4 < value < 2.5 for value in monitor.odds.factor.tolist())


def test_an_alarm_is_a_sentence():
    said = str(Alarm("depth", "repetition", since=1002, raised=1010, log_e=50.0, alpha=0.01))
    assert said == (
        "depth: it gives the same row again and again, since about row 1,002 (repetition, raised at row 1,010, e-value "
        "10^21.7, false alarms at most 1 %)"
    )
