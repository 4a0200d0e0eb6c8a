"""The monitor's benchmark runs on a file of features, finds what it broke, and writes what it prints."""

import json

import numpy as np
import pytest
import torch

from qmf_examples.benchmarks import monitor
from qmf_examples.benchmarks.monitor import FAULTS, Delay, answer, delay_table, faults, main, train

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
    assert set(found["feedback"]) == {"none", *delays}
    for name in delays:
        assert out.count(f"| {name} |") == 2


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
