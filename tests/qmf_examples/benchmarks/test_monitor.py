"""The monitor's benchmark runs on a file of features, finds what it broke, and writes what it prints."""

import json

import numpy as np
import pytest
import torch

from qmf_examples.benchmarks import monitor
from qmf_examples.benchmarks.monitor import (
    FAULTS,
    MEAN,
    Delay,
    answer,
    delay_table,
    faults,
    feedback,
    feedback_table,
    main,
    train,
)

from ..comparison.test_robustness import write_features


@pytest.fixture
def short(monkeypatch):
    for name, value in {"REFERENCE": 40, "HEALTHY": 20, "FAULTY": 60, "ROWS": 50, "SLICE": 20}.items():
        monkeypatch.setattr(monitor, name, value)


def test_it_measures_every_fault(short, tmp_path, capsys):
    path = write_features(tmp_path / "scenes.npz")
    arguments = ["--seeds", "1", "--streams", "1", "--clean", "2", "--epochs", "2"]
    main([str(path), *arguments, "--json", str(tmp_path / "monitor.json")])
    out = capsys.readouterr().out
    written = json.loads((tmp_path / "monitor.json").read_text())
    assert written["kind"] == "monitor"
    (found,) = written["sets"]
    assert (found["set"], found["false alarms"], found["clean streams"]) == ("scenes", 0, 2)
    delays = {row["fault"]: row for row in found["delays"]}
    assert set(delays) == {*FAULTS, "noise", "dark"}
    assert delays["dead (NaN)"]["found"] == 1
    assert delays["dead (NaN)"]["mostly by"] == "absence"
    assert delays["noise"]["streams"] == 2
    assert delays["dark"]["streams"] == 1  # of a modality that the other has not
    assert found["seeds"] == [1]  # not 0, on which the memory was chosen
    gains = found["feedback"]
    assert set(gains) == {"none", *delays}
    assert list(gains["stuck"]) == [MEAN, "rgb", "depth"]
    assert list(gains["dark"]) == [MEAN, "depth"]
    for stretch in ("before", "fault", "after"):
        each = [gains["stuck"][modality][stretch]["difference"] for modality in (MEAN, "rgb", "depth")]
        assert each[0] == pytest.approx((each[1] + each[2]) / 2)
    for name in delays:
        assert out.count(f"| {name} |") == 3


def test_the_picture(short, tmp_path, capsys):
    path = write_features(tmp_path / "scenes.npz")
    main([str(path), "--epochs", "2", "--picture", str(tmp_path / "monitor.png")])
    assert (tmp_path / "monitor.png").stat().st_size > 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("row 600 | rgb: P(clean)")
    assert lines[-1].startswith("row 1,500 | ")


def test_only_the_modality_is_broken(tmp_path):
    subject = train(str(write_features(tmp_path / "scenes.npz")), 0, 1)
    index, rng = torch.arange(20), np.random.default_rng(0)
    clean = answer(subject, index)
    for name, fault in faults(subject, "depth").items():
        out = answer(subject, index, {"depth": fault(index, rng)})
        assert torch.equal(out.unimodal_logits[0], clean.unimodal_logits[0])
        assert not torch.equal(out.unimodal_logits[1], clean.unimodal_logits[1]), name
    assert "dark" not in faults(subject, "rgb")


def test_a_fault_that_is_not_found_counts_as_late():
    found = [Delay("stuck", "rgb", n, "repetition", 0) for n in (10, 20)] + [Delay("stuck", "rgb", None, None, 1)] * 3
    (row,) = delay_table(found)
    assert row["found"] == 0.4
    assert row["median"] is None
    assert (row["mostly by"], row["elsewhere"]) == ("repetition", 3)


def test_each_test_row_comes_once_in_every_stretch_at_its_own_place(short, tmp_path):
    """Intervals are over test rows, so that a row must have the same column whatever the seed and the modality."""
    subject = train(str(write_features(tmp_path / "scenes.npz")), 1, 2)
    rows = torch.arange(len(subject.labels))
    clean = answer(subject, rows).logits.argmax(-1).eq(subject.labels).double()
    dead = answer(subject, rows, {"depth": torch.full((60, 12), torch.nan)}).logits.argmax(-1)
    given = subject.model.fusion.rule.odds.clone()
    gain = feedback(subject, 1)
    for stretch in ("before", "fault", "after"):
        assert torch.equal(gain["none"][""][stretch][1], clean)
    of = gain["dead (NaN)"]["depth"]
    assert torch.equal(of["before"][1], clean)
    assert torch.equal(of["fault"][1], dead.eq(subject.labels).double())
    assert torch.equal(of["after"][1], clean)
    assert not any(x.isnan().any() for case in gain.values() for of in case.values() for x in of.values())
    assert torch.equal(subject.model.fusion.rule.odds, given)  # for the next stream


def test_the_mean_over_modalities_takes_a_row_once():
    """Two modalities whose gains on each row are opposite have a mean without any spread."""
    right = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 1.0, 0.0, 1.0]], dtype=torch.float64)
    gain = {
        "stuck": {
            name: dict.fromkeys(("before", "fault", "after"), x) for name, x in (("a", right), ("b", right.flip(0)))
        }
    }
    of = feedback_table([gain, gain])["stuck"]
    assert of["a"]["fault"]["low"] < 0 < of["a"]["fault"]["high"]
    assert [of[MEAN]["fault"][key] for key in ("difference", "low", "high")] == [0, 0, 0]
