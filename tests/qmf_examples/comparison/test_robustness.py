"""The robustness bench: runs, agrees with itself, tells the truth about shortfalls, and is attached to the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qmf_examples.cli import main
from qmf_examples.comparison.heads import Config
from qmf_examples.comparison.results import Score
from qmf_examples.comparison.robustness import METHODS, run, split_by_damage, tabulate
from qmf_examples.corruption.conditions import FEATURES
from qmf_examples.data.multiview import MultiView

scipy_io = pytest.importorskip("scipy.io")
SMALL = {"epochs": None, "steps": 25, "hidden": 16, "learning_rate": 1e-3, "weight_decay": 1e-4}


def small_set(name="small", views=4, samples=160, classes=4):
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    centres = rng.normal(size=(views, classes, 12))
    made = [c[labels] + 0.5 * rng.normal(size=(samples, 12)) for c in centres]
    return MultiView(name, {str(number): view for number, view in enumerate(made)}, labels)


@pytest.fixture(scope="module")
def results():
    return run([small_set()], Config(seeds=(0, 1), **SMALL))


def test_bit_reproducible(results):
    again = run([small_set()], Config(seeds=(0, 1), **SMALL))
    assert again == results
    other = run([small_set()], Config(seeds=(2,), **SMALL))
    assert other["small"] != [s for s in results["small"] if s.seed == 0]


def test_every_rule_under_every_condition(results):
    scores = results["small"]
    assert len(scores) == len(METHODS) * len(FEATURES) * 2
    assert [method.role == "oracle" for method in METHODS] == [False] * (len(METHODS) - 1) + [True]
    assert {"robust", "robust, calibrated", "robust + modality dropout"} <= {method.label for method in METHODS}


def test_the_rule_and_the_oracle_see_through_noise(results):
    lines = {line.rule: line for line in tabulate(results)}
    assert lines["robust"].conditions["noise 10"] > lines["energy, logits"].conditions["noise 10"] + 5
    assert lines["robust"].correlations["noise 10"] < -0.2 < lines["energy, logits"].correlations["noise 10"]


def test_tables_are_means_worsts_and_gaps():
    names = [method.label for method in METHODS]
    rng = np.random.default_rng(0)
    results = {
        data: [
            Score(rule, condition, 0.0, seed, float(rng.random()), None if rule == names[0] else float(rng.normal()))
            for rule in names for condition in ("clean", "blank") for seed in (0, 1)
        ]
        for data in ("a", "b")
    }  # fmt: skip
    lines = tabulate(results)
    table = np.array(
        [[[next(s.accuracy for s in results[d] if (s.method, s.condition, s.seed) == (r, c, k)) * 100
           for k in (0, 1)] for c in ("clean", "blank")] for d in ("a", "b") for r in names]
    ).reshape(2, len(names), 2, 2)  # fmt: skip
    by_condition = table.mean((0, 3))
    gaps = by_condition[:-1].max(0) - by_condition
    for i, line in enumerate(lines):
        assert line.rule == names[i]
        assert line.mean == pytest.approx(table[:, i].mean())
        assert line.worst == pytest.approx(table[:, i].mean((0, 1)).min())
        assert line.shortfall == pytest.approx(gaps[i].max())
        assert line.conditions["blank"] == pytest.approx(by_condition[i, 1])
        assert line.sets["b"] == pytest.approx(table[1, i].mean())
    assert all(value is None for value in lines[0].correlations.values())
    assert min(line.shortfall for line in lines[:-1]) >= 0


def test_sets_with_images_have_two_tables():
    clean, noisy, dark = (
        Score("robust", kind, 1.0 * (kind == "noise"), 0, 0.5, None) for kind in ("clean", "noise", "occlusion")
    )
    tables = split_by_damage({"small": [clean, noisy], "digits": [clean, noisy, dark]})
    assert tables == {"small": [clean, noisy], "digits": [clean, noisy], "digits (images)": [clean, dark]}


def test_command(tmp_path, capsys):
    data = small_set()
    views = np.empty((4, 1), dtype=object)
    views[:, 0] = list(data.views.values())
    scipy_io.savemat(tmp_path / "mine.mat", {"X": views, "y": data.labels})
    output = tmp_path / "out"
    arguments = ["bench-robustness", str(tmp_path / "mine.mat"), "--no-digits", "--quick", "--steps", "3"]
    assert main([*arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert all(method.label in printed for method in METHODS)
    assert "Correlation of weight and loss" in printed
    content = json.loads((output / "robustness.json").read_text())
    assert content["sets"] == [{"name": "mine", "samples": 160, "views": [12] * 4}]
    assert len(content["tables"]["features"]) == len(METHODS)
    assert (output / "robustness.png").read_bytes().startswith(b"\x89PNG")
    first = (output / "robustness.json").read_bytes()
    assert main([*arguments, "--output", str(output)]) == 0
    assert (output / "robustness.json").read_bytes() == first


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.mat"], 2, "nowhere.mat"),
        (["--no-digits"], 2, "there must be a .mat file"),
        (["--seeds", "0"], 2, "--seeds"),
    ],
)
def test_command_says_what_is_wrong(arguments, code, message, capsys):
    assert main(["bench-robustness", *arguments]) == code
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


@pytest.mark.parametrize("command", ["bench-robustness", "report"])
def test_a_folder_that_cannot_be_written_to_is_told_before_any_work(command, tmp_path, capsys, monkeypatch):
    def work(*_, **__):
        raise AssertionError("it went to work")

    monkeypatch.setattr("qmf_examples.comparison.robustness.run_and_report", work)
    monkeypatch.setattr("qmf_examples.comparison.theory.report_run", work)
    (tmp_path / "file").write_text("kept")
    folders = [tmp_path / "file", *(path for path in [Path("/proc")] if path.is_dir())]
    for folder in folders:
        given = [str(folder)] if command == "report" else ["--output", str(folder)]
        assert main([command, *given]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert f"'{folder}' cannot be written to" in error
        assert ("RUN" if command == "report" else "--output") in error
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", ["bench-robustness", "report"])
def test_a_disk_that_fails_later_is_one_line(command, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device", "some.json")

    monkeypatch.setattr("qmf_examples.comparison.robustness.run_and_report", refuse)
    monkeypatch.setattr("qmf_examples.comparison.theory.report_run", lambda *_: [])
    monkeypatch.setattr("qmf_examples.comparison.theory.write", refuse)
    given = [str(tmp_path)] if command == "report" else ["--output", str(tmp_path)]
    assert main([command, *given]) == 1
    assert capsys.readouterr().err == "qmf-fusion: error: some.json: No space left on device\n"


def test_a_run_that_is_not_there_is_not_created(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_report_of_a_run(quick_run, tmp_path, capsys):
    run = shutil.copytree(quick_run.output, tmp_path / "run")
    assert main(["report", str(run), "--seed", "3"]) == 0
    printed = capsys.readouterr().out
    assert "gaussian 0.8" in printed
    path = run / "theory-qmf-paper-seed3.json"
    assert str(path) in printed
    written = path.read_bytes()
    found = json.loads(written)
    assert (found["training"], found["seed"]) == ("qmf-paper", 3)
    content = found["reports"]
    assert len(content) == 10
    assert content[0]["eq6"] in ("holds", "undecided", "fails")
    assert [m["name"] for m in content[0]["modalities"]] == ["pixels", "fourier", "gradients", "projections"]
    assert (run / "theory-qmf-paper-seed3-gaussian.png").exists()
    assert main(["report", str(run), "--training", "qmf-released", "--seed", "4"]) == 0
    assert path.read_bytes() == written
    other = json.loads((run / "theory-qmf-released-seed4.json").read_text())
    assert (other["training"], other["seed"]) == ("qmf-released", 4)
    assert other["reports"] != content
    # Heads that were trained without a fusion are held against the paper's default one.
    assert main(["report", str(run), "--training", "unimodal", "--seed", "3"]) == 0
    capsys.readouterr()
    assert main(["report", str(run), "--training", "nothing", "--seed", "3"]) == 1
    assert "it holds: seed3-" in capsys.readouterr().err
