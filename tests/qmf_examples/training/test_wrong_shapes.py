"""Files of a run that are not what a run writes: each is one line, and nothing of the run is lost."""

import copy
import json
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qmf_examples.cli import main
from qmf_examples.comparison.digits import run_digits
from qmf_examples.comparison.heads import Config
from qmf_examples.errors import CommandError
from qmf_examples.training.checkpoints import unlike
from qmf_examples.training.run import load_learner, train_run
from qmf_examples.training.settings import LARGEST_FILE, QUICK, load_run, read_settings, resolve

LONG = "1" * 5_000
HEX = "0x" + "f" * 5_000  # which Python reads, and does not write out


@pytest.fixture(scope="module")
def layers(sample):
    data = {"data_root": str(sample("nyud2")), "method": "late", "limit_batches": 1}
    # A warm-up, so that there is a scheduler.
    return [QUICK, data, {"epochs": 1, "warmup": 0.2, "batch_size": 4}]


@pytest.fixture(scope="module")
def trained(layers, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained") / "run"
    train_run(resolve("nyud2", *layers), folder)
    return folder


def at(state, path):
    for name in path:
        state = next(iter(state.values())) if name == "*" else state[name]
    return state


GONE = object()
EARLY = "EarlyStopping{'monitor': 'validation/accuracy', 'mode': 'max'}"
# Where, and what there is instead.
WRONG = [
    (("epoch",), "two"),
    (("epoch",), 10**5000),
    (("epoch",), -1),
    (("sizes",), [1]),
    (("sizes", "num_classes"), "ten"),
    (("sizes", "num_samples"), 10**12),
    (("accuracy",), "0.5"),
    (("fingerprint",), 3),
    (("names",), GONE),
    (("state_dict",), GONE),
    (("state_dict",), 5),
    (("state_dict", "*"), GONE),
    (("callbacks",), GONE),
    (("callbacks",), "none"),
    (("callbacks", EARLY), GONE),
    (("callbacks", EARLY, "wait_count"), "many"),
    (("callbacks", EARLY, "best_score"), 0.5),
    (("callbacks", EARLY, "stopping_reason"), 10**5000),
    (("plateau",), GONE),
    (("plateau", "num_bad_epochs"), "3"),
    (("plateau", "min_lrs"), []),
    (("optimizer_states",), []),
    (("optimizer_states", 0, "param_groups"), GONE),
    (("optimizer_states", 0, "param_groups", 0, "lr"), "fast"),
    (("optimizer_states", 0, "param_groups", 0, "params"), [0]),
    (("optimizer_states", 0, "state", 0, "exp_avg"), torch.zeros(2)),
    (("optimizer_states", 0, "state", 0), {}),
    (("optimizer_states", 0, "state"), {"all": {}}),
    (("lr_schedulers",), []),
    (("lr_schedulers", 0, "total_iters"), "x"),
    (("loops",), GONE),
    (("loops", "fit_loop", "epoch_progress", "current", "completed"), "x"),
    (("loops", "fit_loop", "epoch_progress", "current", "ready"), -1),
    (("loops", "fit_loop", "epoch_loop.batch_progress"), GONE),
    (("pytorch-lightning_version",), 7),
]


@pytest.mark.parametrize(
    ("path", "value"),
    # Each starts Lightning anew: every fourth will do by default.
    [pytest.param(*wrong, marks=pytest.mark.slow if n % 4 else ()) for n, wrong in enumerate(WRONG)],
    ids=lambda x: "-".join(map(str, x)) if isinstance(x, tuple) else "",
)
def test_a_last_checkpoint_of_another_make(path, value, layers, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    best = (folder / "best.ckpt").read_bytes()
    state = copy.deepcopy(torch.load(folder / "last.ckpt", weights_only=True))
    name = next(iter(at(state, path[:-1]))) if path[-1] == "*" else path[-1]
    if value is GONE:
        del at(state, path[:-1])[name]
    else:
        at(state, path[:-1])[name] = value
    torch.save(state, folder / "last.ckpt")
    spoilt = (folder / "last.ckpt").read_bytes()
    with pytest.raises(CommandError, match=r"last\.ckpt") as raised:
        train_run(resolve("nyud2", *layers, {"epochs": 2}), folder, resume=True)
    assert len(str(raised.value).splitlines()) == 1
    assert len(str(raised.value)) < 600
    assert (folder / "best.ckpt").read_bytes() == best
    assert (folder / "last.ckpt").read_bytes() == spoilt


@pytest.mark.parametrize(
    "state",
    [
        3,
        [],
        {},
        {"state_dict": {}, "epoch": 0},
        {"state_dict": {}, "epoch": 0, "sizes": {"num_classes": 10, "num_samples": 80}},
        {"state_dict": {"learner.x": 3}, "epoch": 0, "sizes": {"num_classes": 10, "num_samples": 80}},
        {"state_dict": {5: torch.zeros(1)}, "epoch": 0, "sizes": {"num_classes": 10, "num_samples": 80}},
        {"state_dict": {}, "epoch": "0", "sizes": {"num_classes": 10, "num_samples": 80}},
        {"state_dict": {}, "epoch": 0, "sizes": {"num_classes": 2**40, "num_samples": 80}},
    ],
)
def test_a_best_checkpoint_of_another_make(state, trained, tmp_path, capsys):
    folder = shutil.copytree(trained, tmp_path / "run")
    torch.save(state, folder / "best.ckpt")
    assert main(["evaluate", str(folder)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{folder / 'best.ckpt'}: " in line


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        "3",
        '{"accuracy": 0.5, "epochs": 1}',
        '{"accuracy": 0.5, "epochs": 1, "faults": 0, "more": 1}',
        '{"accuracy": "0.5", "epochs": 1, "faults": 0}',
        '{"accuracy": NaN, "epochs": 1, "faults": 0}',
        '{"accuracy": 1.5, "epochs": 1, "faults": 0}',
        '{"accuracy": 0.5, "epochs": "one", "faults": 0}',
        '{"accuracy": 0.5, "epochs": 1, "faults": [[1]]}',
        '{"accuracy": 0.5, "epochs": true, "faults": 0}',
        f'{{"accuracy": 0.5, "epochs": {LONG}, "faults": 0}}',
        '{"accuracy": 0.5, "epochs": 1e999, "faults": 0}',
        '{"accuracy": ' + "[" * 100_000,
        "\x00",
        "\udcff",
    ],
)
def test_finished_json_of_another_make(text, layers, trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "finished.json").write_text(text, errors="surrogateescape")
    with pytest.raises(CommandError, match=r"finished\.json: ") as raised:
        train_run(resolve("nyud2", *layers), folder, resume=True)
    assert len(str(raised.value)) < 400


BOMB = "a: &a [x, x]\n" + "".join(
    f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"epochs: {LONG}", "not YAML of settings .*limit"),
        (f"epochs: {HEX}", "epochs must be at most 1000000000, got a value of type int with a number that is too long"),
        (f"epochs: '{LONG}'", r"epochs must be of type int, got '1+\.\.\.1+'"),
        (f"learning_rate: {HEX}", "learning_rate must be of type float"),
        (f"? {HEX}\n: 1", "settings must have names"),
        (f"freeze: {{rgb: {HEX}}}", "freeze must map modalities to numbers of epochs"),
        ("freeze: {1: 2}", "freeze must map modalities to numbers of epochs"),
        ("epochs: " + "[" * 50_000, "not lists in lists"),
        ("freeze: " + "[" * 300 + "]" * 300, "not lists in lists"),
        ("freeze: [[1]]", r"freeze must map .* got \[\[1\]\]"),
        (BOMB + "freeze: *i", "must hold plain values, not aliases"),
        ("epochs: 1\nepochs: 2", "must set each setting once, got several values of 'epochs'"),
        ("x" * 300 + ": 1", "no such setting: x+;"),
        ("# " + "x" * LARGEST_FILE, "larger than"),
        ("data_set: []", r"data_set.*\[\]"),
        ("epochs: 2020-13-99", "not YAML of settings"),
        ("epochs: 2020-12-24", "epochs must be of type int, got datetime.date"),
        ("weights: !!set {a}", "weights must be of type str"),
        ("a: \x00", "not YAML"),
        ("seeds: 1000000000000", "seeds from 1 to 1000, got 1 and 1000000000000"),
        (f"seeds: {HEX}", "seeds from 1 to 1000"),
        ("seeds: 1.5", "seeds from 1 to 1000"),
        ("seed: abc", "seed and seeds must be whole numbers"),
        (f"method: {HEX}", "method must be of type str"),
        ("method: [rgb]", r"method must be of type str, got \['rgb'\]"),
        ("workers: 1000000", "workers must be at most 1024"),
        ("hidden: 1000000000000", "hidden must be at most 65536"),
        ("load_size: 1000000000", "load_size must be at most 8192"),
    ],
)
def test_yaml_of_another_make(text, message, tmp_path, sample, capsys):
    (tmp_path / "s.yaml").write_text(text)
    arguments = ["train", "nyud2", "--quick", "--data-root", str(sample("nyud2")), "--output", str(tmp_path / "runs")]
    assert main([*arguments, "--config", str(tmp_path / "s.yaml")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert len(line) < 900
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(line)
    assert not (tmp_path / "runs").exists()
    (tmp_path / "settings.yaml").write_text(text if "data_set" in text else f"{text}\ndata_set: nyud2")
    if not text.startswith("seed"):
        with pytest.raises(CommandError, match=r"settings\.yaml: "):
            load_run(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(st.sampled_from("a: [{}]&*!-1\n\t'\"|>%x0epochs"), max_size=40))
def test_yaml_of_any_make(tmp_path, text):
    (tmp_path / "s.yaml").write_text(text)
    try:
        read = read_settings(tmp_path / "s.yaml")
        resolve("nyud2", read)
    except CommandError as error:
        assert len(str(error)) < 900  # noqa: PT017


def test_a_run_in_an_absurd_number_of_seeds_is_refused_on_the_command_line_too(capsys):
    assert main(["train", "nyud2", "--data-root", ".", "--seeds", "1000000000000"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "'--seeds'" in line


@pytest.mark.parametrize(
    "change", [{"epoch": "4"}, {"epoch": -1}, {"epoch": 10**5000}, {"learner": 3}, {"optimizer": {}}]
)
def test_a_checkpoint_of_the_digits_of_another_make(change, quick_run, tmp_path):
    name = "seed3-unimodal.pt"
    state = torch.load(quick_run.output / "checkpoints" / name, weights_only=True)
    torch.save({**state, **change}, tmp_path / name)
    with pytest.raises(CommandError, match=rf"--resume: cannot (go on from|read) .*{name}"):
        run_digits(Config(seeds=(3,), epochs=2), tmp_path, resume=True)


@pytest.mark.parametrize(
    "content", [b"garbage", b"", {"made_with": 3}, {"made_with": {}}, {"made_with": {"hidden": "[]"}}]
)
def test_a_report_of_what_is_no_checkpoint_of_the_digits(content, tmp_path, capsys):
    path = tmp_path / "checkpoints" / "seed0-qmf-paper.pt"
    path.parent.mkdir()
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    assert main(["report", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{path} is no checkpoint of the digits job: " in line


def test_values_of_the_same_make():
    expected = {"n": 1, "x": 0.5, "t": torch.zeros(2), "any": None, "all": [1, "a"], "on": True}
    assert unlike(expected, expected) is None
    assert unlike({**expected, "x": 3, "any": "thing", "more": 1, "t": torch.ones(2)}, expected) is None
    for name, value in (("n", 0.5), ("n", True), ("n", -1), ("x", "0.5"), ("t", torch.zeros(3)), ("t", 1), ("on", 1)):
        assert unlike({**expected, name: value}, expected, "it").startswith(f"it.{name} must ")
    assert unlike({**expected, "all": [1]}, expected, "it") == "it.all must have 2 entries, got 1"
    assert unlike({**expected, "all": [1, 2]}, expected, "it") == "it.all[1] must be of type str like 'a', got 2"
    assert unlike({}, {"a": 1, "b": 2, "c": 3}, "it") == "it lacks a, b and 1 more"


def test_nothing_else_is_needed_to_test_a_run(trained, tmp_path):
    folder = shutil.copytree(trained, tmp_path / "run")
    (folder / "last.ckpt").unlink()
    assert load_learner(folder)
    assert json.loads((folder / "finished.json").read_text())["epochs"] == 1
