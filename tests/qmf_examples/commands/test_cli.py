"""The command: what it leaves behind, that it repeats itself, and how it fails."""

import json
import os
import re
import subprocess
import sys
from dataclasses import fields

import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.commands.train_sets import PAPER_SEEDS
from qmf_examples.comparison.digits import TABLE
from qmf_examples.corruption.conditions import VIEW_COPIES as CONDITIONS
from qmf_examples.corruption.view_copies import CORRUPTIONS
from qmf_examples.training.settings import DEFAULTS, Settings, resolve
from qmf_fusion import __version__

# The folders under test, for a process of its own.
ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}


def failing(capsys, arguments):
    """The exit code and the one line on standard error."""
    code = main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("qmf-fusion: error: ")
    return code, lines[0]


def test_results_hold_one_row_per_method_condition_and_level(quick_run):
    content = json.loads((quick_run.output / "results.json").read_text())
    assert (content["schema"], content["kind"], content["unit"]) == (1, "digits", "fraction")
    assert content["versions"] == {"qmf-fusion": __version__, "torch": torch.__version__}
    methods = [method.label for method in TABLE.methods]
    found = [(row["method"], row["condition"], row["level"]) for row in content["rows"]]
    assert found == [(method, *condition) for method in methods for condition in CONDITIONS]
    for row in content["rows"]:
        assert row["seeds"] == [3, 4]
        assert 0 <= row["worst"] <= row["mean"] <= 1
        assert row["worst"] == min(row["accuracies"])
        assert row["mean"] == pytest.approx(sum(row["accuracies"]) / 2)
        assert row["std"] == pytest.approx(abs(row["accuracies"][0] - row["accuracies"][1]) / 2**0.5)
        assert (row["correlation"] is None) or -1 <= row["correlation"] <= 1
        weighted = row["method"].startswith(("QMF", "energy", "robust")) or (
            "oracle" in row["method"] and row["condition"] != "clean"
        )
        assert (row["correlation"] is not None) == weighted
    assert content["config"]["epochs"] == 2
    assert len(content["verdicts"]) == 12  # six fusions, two plain averages


def test_the_heads_learn_and_damage_hurts(quick_run):
    content = json.loads((quick_run.output / "results.json").read_text())
    mean = {(row["method"], row["condition"], row["level"]): row["mean"] for row in content["rows"]}
    for method in ("pixels alone", "mean of probabilities", "QMF, paper"):
        assert mean[method, "clean", 0.0] > 0.7  # chance is 0.1
        for kind, corruption in CORRUPTIONS.items():
            assert mean[method, kind, corruption.levels[-1]] < mean[method, "clean", 0.0]
    # The oracle does not see the damage, so its answer does not depend on the kind or the level.
    assert len({mean["oracle: clean views only", *c] for c in CONDITIONS if c[0] != "clean"}) == 1


def test_the_tables_show_every_method_and_the_losses_in_words(quick_run):
    for method in TABLE.methods:
        assert method.label in quick_run.stdout
    content = json.loads((quick_run.output / "results.json").read_text())
    # A loss at one level need not show in the mean over levels, but it is counted.
    assert len(re.findall(r" [1-9]\d* of 10 *$", quick_run.stdout, re.MULTILINE)) == sum(
        "loses to" in sentence and "nowhere" not in sentence for sentence in content["verdicts"]
    )
    assert "Correlation of weight and loss" in quick_run.stdout
    assert str(quick_run.output / "results.json") in quick_run.stdout


def test_the_plot_is_a_png_of_some_size(quick_run):
    data = (quick_run.output / "accuracy.png").read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    width, height = (int.from_bytes(data[at : at + 4], "big") for at in (16, 20))
    assert width >= 800
    assert height >= 500


@pytest.mark.slow
def test_the_same_seed_gives_the_same_bytes_in_another_process(quick_run, tmp_path):
    script = "import sys; from qmf_examples.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", script, *quick_run.arguments, "--output", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.json").read_bytes() == (quick_run.output / "results.json").read_bytes()
    assert done.stdout.replace(str(tmp_path), "") == quick_run.stdout.replace(str(quick_run.output), "")


def test_another_seed_gives_other_numbers(quick_run, tmp_path):
    arguments = ["train", "digits", "--epochs", "2", "--seeds", "1", "--seed", "5", "--output", str(tmp_path)]
    assert main(arguments) == 0
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"][0]["seeds"] == [5]
    assert content["rows"][0]["std"] is None
    before = json.loads((quick_run.output / "results.json").read_text())
    assert [row["mean"] for row in content["rows"]] != [row["mean"] for row in before["rows"]]


@pytest.mark.parametrize(
    "arguments", [[], ["--help"], ["-h"], ["train"], ["train", "--help"], ["train", "digits", "-h"]]
)
def test_help(arguments, capsys):
    assert main(arguments) == 0
    shown = capsys.readouterr()
    assert "Usage: qmf-fusion" in shown.out
    assert shown.err == ""


def test_the_help_of_the_digits_names_all_that_is_compared(capsys):
    assert main(["train", "digits", "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "three forms" in shown
    assert len([method for method in TABLE.methods if method.label.startswith("QMF, ")]) == 1 + 3
    others = [m.label for m in TABLE.methods if m.role == "fusion" and not m.label.startswith("QMF, ")]
    assert others == ["energy of LogitNorm", "robust"]
    for word in ("every view alone", "plain averages", "LogitNorm", "robust", "oracle"):
        assert word in shown


@pytest.mark.parametrize("data_set", DEFAULTS)
def test_the_help_of_a_set_shows_what_each_option_is_without_it(data_set, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "400")
    assert main(["train", data_set, "--help"]) == 0
    shown = capsys.readouterr().out
    lines = {words[0]: line for line in shown.splitlines() if (words := line.strip("│ ").split())}
    defaults = DEFAULTS[data_set]
    for name in {field.name for field in fields(Settings)} - {"data_set", "data_root"}:
        line = lines["--" + name.replace("_", "-")]
        value = getattr(defaults, name)
        if name in ("seed", "method") or type(value) in (int, float, str):
            assert re.search(rf"\[default: \({re.escape(str(value))}[;)]", line), line
        else:
            assert "[default: (" in line
    assert f"runs/{data_set}" in lines["--output"]
    assert f"({PAPER_SEEDS[data_set]}, 1 with --quick)" in lines["--seeds"]
    assert ("tmc: 32" in lines["--batch-size"]) == (data_set in ("nyud2", "sunrgbd"))
    assert "one a core, at most 4" in lines["--workers"]
    frozen = resolve(data_set, {"frozen": True})
    for name in ("hidden", "text_pooling", "learning_rate", "copies", "device"):
        other = getattr(frozen, name)
        said = f"--frozen: {other}" in lines["--" + name.replace("_", "-")]
        assert said == (other != getattr(defaults, name))


def test_the_help_of_features_shows_its_defaults(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    assert main(["features", "--help"]) == 0
    shown = capsys.readouterr().out
    for default in ("(feature-cache beside the file)", "(mean)", "(1)"):
        assert f"[default: {default}]" in shown


def test_the_device_has_one_name_everywhere(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    for command in (["evaluate"], ["bench-trainers"], ["train", "digits"], *(["train", name] for name in DEFAULTS)):
        assert main([*command, "--help"]) == 0
        shown = capsys.readouterr().out
        assert "--device " in shown, command
        assert "--accelerator" not in shown


def test_the_shell_completes():
    script = "import sys; from qmf_examples.cli import main; sys.exit(main())"
    asked = {"_QMF_FUSION_COMPLETE": "complete_bash", "COMP_WORDS": "qmf-fusion bench-r", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-c", script], env={**ENVIRONMENT, **asked}, capture_output=True, text=True)
    assert (done.returncode, done.stdout.split()) == (0, ["bench-robustness"])


def test_version_and_help_start_without_torch():
    script = (
        "import sys; from qmf_examples.cli import main\n"
        "code = main(['train', 'digits', '--help']) or main(['--version'])\n"
        "loaded = {'torch', 'sklearn', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "sys.exit(str(loaded) if loaded else code)"
    )
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[-1] == f"qmf-fusion {__version__}"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--bogus"], "--bogus"),
        (["train", "nothing"], "nothing"),
        (["train", "digits", "--bogus"], "--bogus"),
        (["train", "digits", "extra"], "extra"),
        (["train", "digits", "--seeds", "0"], "--seeds"),
        (["train", "digits", "--seeds", "many"], "--seeds"),
        (["train", "digits", "--epochs", "0"], "--epochs"),
        (["train", "digits", "--seed", "-1"], "--seed"),
        (["train", "digits", "--device", "abacus"], "'--device': 'abacus' cannot be used here"),
        (["train", "digits", "--device", "meta"], "'--device': 'meta' cannot be used here"),
        (["train", "digits", "--device", "cuda:99"], "'--device': 'cuda:99' cannot be used here"),
        (["evaluate", ".", "--device", "cuda:99"], "'--device': 'cuda:99' cannot be used here"),
        (["bench-trainers", "--device", "cuda:99"], "'--device': 'cuda:99' cannot be used here"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(arguments, said, capsys):
    code, line = failing(capsys, arguments)
    assert code == 2
    assert said in line


def test_an_output_that_is_a_file_or_lies_in_one(tmp_path, capsys):
    (tmp_path / "file").write_text("kept")
    for output in ("file", "file/deeper"):
        code, line = failing(capsys, ["train", "digits", "--output", str(tmp_path / output)])
        assert code == 2
        assert "'--output'" in line
        assert "cannot be written to" in line
    assert (tmp_path / "file").read_text() == "kept"


def test_an_output_that_is_not_writable(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    # Permissions do not stop root, so the system's answer is played.
    monkeypatch.setattr("tempfile.TemporaryFile", refuse)
    code, line = failing(capsys, ["train", "digits", "--output", str(tmp_path)])
    assert code == 2
    assert "Permission denied" in line


def test_a_disk_that_fails_later_is_one_line_too(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise OSError(28, "No space left on device", "results.json")

    monkeypatch.setattr("qmf_examples.comparison.digits.run_and_report", refuse)
    code, line = failing(capsys, ["train", "digits", "--output", str(tmp_path)])
    assert code == 1
    assert "results.json: No space left on device" in line


def test_an_interrupt_is_one_line_and_exit_code_130(tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qmf_examples.comparison.digits.run_and_report", interrupt)
    code, line = failing(capsys, ["train", "digits", "--output", str(tmp_path)])
    assert code == 130
    assert line.endswith("interrupted; what was finished is kept: run it again with --resume to go on")


@pytest.mark.parametrize(
    ("command", "work"),
    [
        (["bench-robustness", "--output", "."], "comparison.robustness.run_and_report"),
        (["report", "."], "comparison.theory.report_run"),
    ],
)
def test_an_interrupt_promises_nothing_where_nothing_is_kept(command, work, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(f"qmf_examples.{work}", interrupt)
    assert failing(capsys, command) == (130, "qmf-fusion: error: interrupted")


@pytest.mark.parametrize(("module", "package"), [("matplotlib", "matplotlib"), ("sklearn", "scikit-learn")])
def test_a_missing_package_names_the_extra_before_any_work(module, package, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    code, line = failing(capsys, ["train", "digits", "--output", str(tmp_path / "out")])
    assert code == 1
    assert f"needs {package}" in line
    assert "pip install 'qmf-fusion[examples]'" in line
    assert not (tmp_path / "out").exists()


def test_the_version_needs_no_extra():
    script = "import sys; sys.modules['typer'] = None; from qmf_examples.cli import main; sys.exit(main())"
    done = subprocess.run([sys.executable, "-c", script, "--version"], env=ENVIRONMENT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"qmf-fusion {__version__}\n", "")


def test_the_command_without_typer_names_the_extra():
    script = "import sys; sys.modules['typer'] = None; from qmf_examples.cli import main; sys.exit(main(['--help']))"
    done = subprocess.run([sys.executable, "-c", script], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    assert done.stderr == (
        "qmf-fusion: error: this command needs typer, which is not installed: pip install 'qmf-fusion[examples]'\n"
    )
