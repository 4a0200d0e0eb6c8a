"""The robustness bench: runs, agrees with itself, tells the truth about shortfalls, and is attached to the command."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from qmf_examples.cli import main
from qmf_examples.comparison.figures import tabulate
from qmf_examples.comparison.heads import Config
from qmf_examples.comparison.results import Score
from qmf_examples.comparison.robustness import FILES, METHODS, Settings, groups, run
from qmf_examples.comparison.robustness_plot import redraw
from qmf_examples.corruption.conditions import FEATURES, UNSEEN
from qmf_examples.data.feature_files import load_npz
from qmf_examples.data.multiview import MultiView
from qmf_examples.errors import CommandError
from qmf_examples.models.methods import ABLATION, RECOMMENDED

pyplot = pytest.importorskip("matplotlib.pyplot")
scipy_io = pytest.importorskip("scipy.io")
SMALL = {"epochs": None, "steps": 25, "hidden": 16, "learning_rate": 1e-3, "weight_decay": 1e-4}
BRIEF = {"epochs": 2, "hidden": 16, "batch_size": 32, "learning_rate": 1e-3}


def small_set(name="small", views=4, samples=160, classes=4):
    rng = np.random.default_rng(0)
    labels = np.arange(samples) % classes
    centres = rng.normal(size=(views, classes, 12))
    made = [c[labels] + 0.5 * rng.normal(size=(samples, 12)) for c in centres]
    return MultiView(name, {str(number): view for number, view in enumerate(made)}, labels)


def settings(*seeds):
    return Settings(views=Config(seeds=seeds, **SMALL), files=Config(seeds=seeds, **BRIEF))


def write_features(path):
    """Two modalities, of which one has an augmented copy and a damage that the other has not."""
    rng = np.random.default_rng(0)
    labels = {"train": np.arange(90) % 3, "test": np.arange(60) % 3}
    arrays = {"classes": np.array(["a", "b", "c"]), **{f"{part}_y": y for part, y in labels.items()}}
    for modality in ("rgb", "depth"):
        centres = rng.normal(size=(3, 12))
        for part, y in labels.items():
            arrays[f"{part}_{modality}_clean"] = centres[y] + 0.5 * rng.normal(size=(len(y), 12))
        arrays[f"test_{modality}_noise"] = arrays[f"test_{modality}_clean"] + 3 * rng.normal(size=(60, 12))
    arrays["train_rgb_flip"] = arrays["train_rgb_clean"] + 0.1
    arrays["test_depth_dark"] = np.zeros((60, 12))
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    return load_npz(write_features(tmp_path_factory.mktemp("features") / "scenes.npz"))


@pytest.fixture(scope="module")
def results():
    return run([small_set()], settings(0, 1))


def test_bit_reproducible(results):
    again = run([small_set()], settings(0, 1))
    assert again == results
    other = run([small_set()], settings(2))
    assert other["small"] != [s for s in results["small"] if s.seed == 0]


def test_every_rule_under_every_condition(results):
    scores = results["small"]
    assert len(scores) == len(METHODS) * (len(FEATURES) + len(UNSEEN)) * 2
    assert [method.role == "oracle" for method in METHODS] == [False] * (len(METHODS) - 1) + [True]
    variants = {method.label for method in METHODS if method.role == "variant"}
    assert variants == {"robust, logits alone", "robust, no modality dropout"}


def test_every_measure_that_a_rule_can_have(results):
    weights = {method.label: method.role not in ("average", "single") for method in METHODS}
    for score in results["small"]:
        assert 0 <= score.ece <= 1
        assert 0 <= score.aurc <= 1
        assert (score.auroc is None) == (score.condition == "clean" or not weights[score.method])
    told = [s.auroc for s in results["small"] if s.method == METHODS[-1].label and s.auroc is not None]
    assert told == [1.0] * len(told)


def test_a_feature_file_is_compared_under_its_own_damages(features):
    scores = run([features], settings(0))["scenes"]
    assert list(dict.fromkeys(s.condition for s in scores)) == ["clean", "noise", "dark", "conflict"]
    assert len(scores) == 4 * len(METHODS)
    assert run([features], settings(0))["scenes"] == scores
    plain = features._replace(train={name: {"clean": made["clean"]} for name, made in features.train.items()})
    assert run([plain], settings(0))["scenes"] != scores  # the copies were trained on


def test_settings_of_feature_files():
    found = (FILES.hidden, FILES.epochs, FILES.steps, FILES.learning_rate, FILES.weight_decay, FILES.batch_size)
    assert found == (64, 40, None, 5e-4, 1e-4, 64)


def test_the_rule_and_the_oracle_see_through_noise(results):
    [designed, _] = groups([small_set()], results).values()
    lines = {line.rule: line for line in tabulate(designed.scores, METHODS)}
    assert lines["robust"].conditions["noise 10"] > lines["energy, logits"].conditions["noise 10"] + 5
    assert lines["robust"].correlations["noise 10"] < -0.2 < lines["energy, logits"].correlations["noise 10"]


def test_tables_are_means_worsts_and_gaps():
    names = [method.label for method in METHODS]
    rng = np.random.default_rng(0)
    results = {
        data: [
            Score(rule, condition, 0.0, seed, float(rng.random()), None if rule == names[0] else float(rng.normal()),
                  b"", float(rng.random()), 0.25, None if condition == "clean" else 0.75)
            for rule in names for condition in ("clean", "blank") for seed in (0, 1)
        ]
        for data in ("a", "b")
    }  # fmt: skip
    lines = tabulate(results, METHODS)
    table = np.array(
        [[[next(s.accuracy for s in results[d] if (s.method, s.condition, s.seed) == (r, c, k)) * 100
           for k in (0, 1)] for c in ("clean", "blank")] for d in ("a", "b") for r in names]
    ).reshape(2, len(names), 2, 2)  # fmt: skip
    by_condition = table.mean((0, 3))
    gaps = by_condition[:-1].max(0) - by_condition
    for i, line in enumerate(lines):
        assert line.rule == names[i]
        assert line.all.accuracy == pytest.approx(table[:, i].mean())
        assert line.worst == pytest.approx(table[:, i].mean((0, 1)).min())
        assert line.all.shortfall == pytest.approx(gaps[i].max())
        assert line.all.shortfall_in == ("clean", "blank")[gaps[i].argmax()]
        assert line.conditions["blank"] == pytest.approx(by_condition[i, 1])
        assert line.sets["b"].accuracy == pytest.approx(table[1, i].mean())
        of_set = table[1].mean(2)
        assert line.sets["b"].shortfall == pytest.approx((of_set[:-1].max(0) - of_set[i]).max())
        ece = {d: [s.ece for s in results[d] if s.method == names[i]] for d in results}
        assert line.sets["b"].ece == pytest.approx(100 * np.mean(ece["b"]))
        assert line.all.ece == pytest.approx(100 * np.mean(ece["a"] + ece["b"]))
        assert line.all.aurc == pytest.approx(25)
        assert line.all.auroc == (None if i == len(names) - 1 else pytest.approx(75))
    assert all(value is None for value in lines[0].correlations.values())
    assert min(line.all.shortfall for line in lines[:-1]) >= 0


def test_what_is_tabled_together(features):
    clean, noisy, stuck, dark = (
        Score("robust", kind, 1.0 * (kind == "noise"), 0, 0.5, None, bytes([1, 0]))
        for kind in ("clean", "noise", "stuck", "occlusion")
    )
    every = {"small": [clean, noisy, stuck], "digits": [clean, noisy, stuck, dark], "scenes": [clean, dark]}
    found = groups([small_set(), small_set("digits"), features], every)
    assert {name: group.scores for name, group in found.items()} == {
        "scenes (inputs)": {"scenes": [clean, dark]},
        "features": {"small": [clean, noisy], "digits": [clean, noisy]},
        "unseen": {"small": [stuck], "digits": [stuck]},
        "digits (images)": {"digits": [clean, dark]},
    }
    assert len({group.picture for group in found.values()}) == 4
    assert list(groups([features], {"scenes": [clean]})) == ["scenes (inputs)"]


def test_command(tmp_path, capsys):
    data = small_set()
    views = np.empty((4, 1), dtype=object)
    views[:, 0] = list(data.views.values())
    scipy_io.savemat(tmp_path / "mine.mat", {"X": views, "y": data.labels})
    output = tmp_path / "out"
    files = [str(write_features(tmp_path / "scenes.npz")), str(tmp_path / "mine.mat")]
    arguments = ["bench-robustness", *files, "--no-digits", "--quick", "--steps", "3", "--seeds", "2"]
    assert main([*arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert all(method.label in printed for method in METHODS)
    assert "Correlation of weight and loss" in printed
    content = json.loads((output / "robustness.json").read_text())
    assert (content["schema"], content["kind"], content["unit"]) == (1, "robustness", "fraction")
    for name, table in content["tables"].items():
        for line in table:
            every = [line, *line["sets"].values()]
            assert all(0 <= each[of] <= 1 for each in every for of in ("accuracy", "shortfall", "ece", "aurc"))
            assert line["accuracy"] == pytest.approx(np.mean(list(line["conditions"].values())))
        accuracy = {line["rule"]: line["accuracy"] for line in table}
        for pair in content["pairs"][name]:
            assert pair["difference"] == pytest.approx(accuracy[RECOMMENDED] - accuracy[pair["other"]])
        # The file is enough to draw the picture again, and to know what it was drawn from.
        picture = content["pictures"][name]
        assert "3 steps" in picture["title"] or "2 epochs" in picture["title"]
        redraw(output / "robustness.json", name, tmp_path / "again.png")
        # But for the last digits of the shares, which may move an edge by a shade.
        again, first = (pyplot.imread(path) for path in (tmp_path / "again.png", output / picture["file"]))
        assert again.shape == first.shape
        assert np.abs(again - first).mean() < 1e-4
    with pytest.raises(CommandError, match="has no table 'nothing'; it has scenes"):
        redraw(output / "robustness.json", "nothing", tmp_path / "again.png")
    with pytest.raises(CommandError, match=r"is no robustness\.json of this version"):
        redraw(tmp_path / "scenes.npz", "features", tmp_path / "again.png")
    assert content["sets"] == [
        {"name": "scenes", "samples": 150, "views": [12, 12]},
        {"name": "mine", "samples": 160, "views": [12] * 4},
    ]
    assert (content["config"]["views"]["steps"], content["config"]["files"]["epochs"]) == (3, 2)
    assert list(content["tables"]) == ["scenes (inputs)", "features", "unseen"]
    assert {len(table) for table in content["tables"].values()} == {len(METHODS)}
    assert content["tables"]["scenes (inputs)"][0]["sets"]["scenes"]["ece"] > 0
    assert {len(pairs) for pairs in content["pairs"].values()} == {len(METHODS) - 1}
    assert "On scenes: " in printed
    assert "against the best other rule" in printed
    for name in ("robustness", "robustness-unseen", "robustness-inputs-scenes"):
        assert (output / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    first = (output / "robustness.json").read_bytes()
    assert main([*arguments, "--output", str(output)]) == 0
    assert (output / "robustness.json").read_bytes() == first


def test_ablation_of_the_recommended_rule(tmp_path, capsys):
    file = write_features(tmp_path / "scenes.npz")
    arguments = ["bench-robustness", str(file), "--no-digits", "--ablation", "--quick", "--output", str(tmp_path)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    content = json.loads((tmp_path / "robustness.json").read_text())
    lines = {line["rule"]: line for line in content["tables"]["scenes (inputs)"]}
    assert list(lines) == [method.label for method in ABLATION.methods]
    assert all(rule in printed for rule in lines)
    taken = [line["auroc"] for rule, line in lines.items() if rule.startswith("without")]
    assert len(set(taken)) > 3  # the switches reach the rule
    assert (tmp_path / "robustness-inputs-scenes.png").exists()


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["nowhere.mat"], 2, "nowhere.mat"),
        (["--no-digits"], 2, "there must be a .mat or .npz file"),
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
    refused = "must be a run's folder or an .npz file of features, got {}"
    folders = [tmp_path / "file", *(path for path in [Path("/proc")] if path.is_dir())]
    for folder in folders:
        given = [str(folder)] if command == "report" else ["--output", str(folder)]
        assert main([command, *given]) == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        wanted = refused if command == "report" and folder.is_file() else "'{}' cannot be written to"
        assert wanted.format(folder) in error
        assert ("RUN" if command == "report" else "--output") in error
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("command", ["bench-robustness", "report"])
def test_a_disk_that_fails_later_is_one_line(command, tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device", "some.json")

    monkeypatch.setattr("qmf_examples.comparison.robustness.run_and_report", refuse)
    monkeypatch.setattr("qmf_examples.comparison.theory.report_run", lambda *_: ([], None))
    monkeypatch.setattr("qmf_examples.comparison.missing.show", lambda *_: None)
    monkeypatch.setattr("qmf_examples.comparison.theory.write", refuse)
    given = [str(tmp_path)] if command == "report" else ["--output", str(tmp_path)]
    assert main([command, *given]) == 1
    assert capsys.readouterr().err == "qmf-fusion: error: some.json: No space left on device\n"


def test_a_run_that_is_not_there_is_not_created(tmp_path, capsys):
    assert main(["report", str(tmp_path / "nowhere")]) == 1
    assert "holds no checkpoint" in capsys.readouterr().err
    assert not (tmp_path / "nowhere").exists()


def test_report_of_a_file_of_features(tmp_path, capsys):
    given = np.random.default_rng(0)
    target = np.arange(90) % 3
    rows = {name: given.normal(size=(90, 4)) + 2 * np.eye(3, 4)[target] for name in ("rgb", "depth")}
    arrays = {"classes": np.array(["a", "b", "c"]), "train_y": target, "test_y": target}
    for name, x in rows.items():
        arrays |= {f"train_{name}_clean": x, f"test_{name}_clean": x, f"test_{name}_black": 0 * x}
    np.savez(tmp_path / "rooms.npz", **arrays)
    for training in ("qmf-paper", "robust"):
        command = ["report", str(tmp_path / "rooms.npz"), "--training", training, "--output", str(tmp_path / "out")]
        assert main(command) == 0
        printed = capsys.readouterr().out
        assert f"rooms, test split, {training}, seed 0" in printed
        found = json.loads((tmp_path / "out" / f"theory-{training}-seed0.json").read_text())
        assert [level["condition"] for level in found["reports"]] == ["clean", "black", "conflict"]
        assert [m["name"] for m in found["reports"][0]["modalities"]] == ["rgb", "depth"]
        assert (found["reports"][0]["verdict"] == "none") == (training == "robust")
    assert main(["report", str(tmp_path / "rooms.npz"), "--training", "nothing", "--output", str(tmp_path)]) == 1
    assert "there is no training nothing; there are: plain" in capsys.readouterr().err
    assert main(["report", str(tmp_path / "other.npz")]) == 2
    assert "is no file" in capsys.readouterr().err


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
    assert (found["schema"], found["kind"], found["unit"]) == (1, "theory", "fraction")
    content = found["reports"]
    assert len(content) == 10
    assert content[0]["eq6"] in ("holds", "undecided", "fails")
    assert content[0]["recommended"] in ("dynamic", "static", "either", "depends")
    assert found["split"] == "test"
    assert "test split" in printed
    text = path.with_suffix(".txt").read_text()
    assert text.startswith("clean, test split\n\nMeasured on the 719 samples given")
    assert "Not computed: the Rademacher complexities" in text
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
