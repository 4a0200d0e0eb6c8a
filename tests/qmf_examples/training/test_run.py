"""Training runs: every method on every set, resumption after SIGKILL, bad data, and what a folder must not do."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import BertConfig, BertModel

from qmf_examples.cli import main
from qmf_examples.errors import CommandError
from qmf_examples.training import paired_batches
from qmf_examples.training.lightning_module import TrainingModule
from qmf_examples.training.run import load_learner, read_checkpoint, train_run
from qmf_examples.training.settings import METHODS, QUICK, resolve

SMALL = {"batch_size": 8, "limit_batches": 3}
# Dropout, warm-up, a plateau, accumulation over an odd count of batches: whatever has a state is in play.
LIVELY = {
    "batch_size": 8,
    "limit_batches": 100,
    "epochs": 4,
    "hidden": 16,
    "dropout": 0.3,
    "warmup": 0.2,
    "plateau_patience": 0,
    "accumulate": 3,
}
KILLED = """
import io, json, os, signal, sys
from pathlib import Path
import torch
from qmf_examples.training.settings import resolve
from qmf_examples.training.lightning_module import TrainingModule
from qmf_examples.training.run import train_run

torch.set_num_threads(1)
data_set, layers, folder, where, number = sys.argv[1:6]
calls = 0


def die_at_the_right_call():
    global calls
    calls += 1
    return calls == int(number)


def die():
    os.kill(os.getpid(), signal.SIGKILL)


if where == "step":
    plain_step = TrainingModule.training_step

    def training_step(self, batch, n):
        if die_at_the_right_call():
            die()
        return plain_step(self, batch, n)

    TrainingModule.training_step = training_step
else:
    plain_save = torch.save

    def save(state, file):
        if die_at_the_right_call():
            whole = io.BytesIO()
            plain_save(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        plain_save(state, file)

    torch.save = save
train_run(resolve(data_set, *json.loads(layers)), Path(folder))
"""


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    ("data_set", "method"),
    [(name, method) for name in ("nyud2", "mvsa") for method in METHODS[name]],
)
def test_every_method_trains_and_loads(data_set, method, sample, tmp_path):
    settings = resolve(data_set, QUICK, SMALL, {"data_root": str(sample(data_set)), "method": method, "epochs": 1})
    finished = train_run(settings, tmp_path / "run")
    assert 0 <= finished.accuracy <= 1
    assert finished.epochs == 1
    loaded, learner, _ = load_learner(tmp_path / "run")
    assert loaded == settings
    state = read_checkpoint(tmp_path / "run" / "last.ckpt")["state_dict"]
    for name, value in learner.state_dict().items():
        torch.testing.assert_close(value, state[f"learner.{name}"], rtol=0, atol=0)


@pytest.mark.parametrize(("data_set", "classes"), [("sunrgbd", 19), ("food101", 101)])
def test_the_other_two_sets_from_inspection_to_evaluation(data_set, classes, sample, tmp_path, capsys):
    root = ["--data-root", str(sample(data_set))]
    assert main(["inspect", data_set, *root]) == 0
    train = ["train", data_set, "--quick", "--limit-batches", "2", *root, "--output", str(tmp_path / "runs")]
    assert main(train) == 0, capsys.readouterr().err
    assert main([*train, "--resume"]) == 0
    assert main(["evaluate", str(tmp_path / "runs"), "--levels", "0,5", "--noise", "salt-pepper"]) == 0
    written = json.loads((tmp_path / "runs" / "evaluation" / "results.json").read_text())
    assert [(cell["method"], cell["level"]) for cell in written["cells"]] == [("qmf", 0), ("qmf", 5)]
    sizes = read_checkpoint(tmp_path / "runs" / "qmf" / "seed1" / "best.ckpt")["sizes"]
    assert sizes["num_classes"] == classes


def test_it_learns_what_the_sample_shows(sample, tmp_path):
    settings = resolve("mvsa", QUICK, {"data_root": str(sample("mvsa")), "method": "bow", "epochs": 12})
    assert train_run(settings, tmp_path / "run").accuracy >= 2 / 3


@pytest.mark.parametrize("method", ["qmf", "mmbt"])
def test_a_bert_from_a_folder_trains_and_is_tested_from_elsewhere(method, sample, tmp_path, monkeypatch, capsys):
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "sad", "happy", "the", "map", "##s"]
    bert = tmp_path / "bert"
    bert.mkdir()
    (bert / "vocab.txt").write_text("\n".join(words) + "\n")
    (bert / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "BertTokenizer"}))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 64}
    BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(bert)
    monkeypatch.chdir(tmp_path)
    arguments = ["train", "mvsa", "--quick", "--method", method, "--text-encoder", "bert", "--limit-batches", "2"]
    assert main([*arguments, "--data-root", str(sample("mvsa")), "--output", "runs"]) == 0, capsys.readouterr().err
    monkeypatch.chdir(sample("mvsa"))
    assert main(["evaluate", str(tmp_path / "runs"), "--levels", "0", "--noise", "gaussian"]) == 0
    _, _, numbering = load_learner(tmp_path / "runs" / method / "seed1")
    assert numbering("happy maps") == [2, 6, 8, 9, 3]


@pytest.mark.skipif("QMF_DATA_ROOT" not in os.environ, reason="QMF_DATA_ROOT is not set: no real texts to train on")
def test_the_bag_of_words_learns_from_mvsas_real_texts(tmp_path):
    data = os.path.join(os.environ["QMF_DATA_ROOT"], "mvsa_single")
    layers = [QUICK, {"data_root": data, "method": "bow", "limit_batches": 1000, "epochs": 5, "learning_rate": 0.02}]
    # The largest class has 282 of dev's 518 texts.
    assert train_run(resolve("mvsa", *layers, {"batch_size": 64}), tmp_path / "run").accuracy > 282 / 518 + 0.02


def kill(data_set, layers, folder, where, number):
    command = [sys.executable, "-c", KILLED, data_set, json.dumps(layers), str(folder), where, str(number)]
    code = subprocess.run(command, capture_output=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert code.returncode == -signal.SIGKILL, code.stderr.decode()


def what_matters(folder):
    state = read_checkpoint(folder / "last.ckpt")
    stopping = next(saved for name, saved in state["callbacks"].items() if name.startswith("EarlyStopping"))
    return {
        "weights": state["state_dict"],
        "optimizer": state["optimizer_states"],
        "warmup": state["lr_schedulers"],
        "plateau": state["plateau"],
        "stopping": stopping,
        "epoch": state["epoch"],
        "best": read_checkpoint(folder / "best.ckpt")["state_dict"],
        "finished": json.loads((folder / "finished.json").read_text()),
    }


def assert_same(ours, theirs):
    if isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs)
    elif isinstance(ours, dict):
        assert ours.keys() == theirs.keys()
        for name in ours:
            assert_same(ours[name], theirs[name])
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs)
        for a, b in zip(ours, theirs, strict=True):
            assert_same(a, b)
    else:
        assert ours == theirs


@pytest.fixture(scope="module")
def whole_run(sample, tmp_path_factory):
    layers = [QUICK, LIVELY, {"data_root": str(sample("nyud2")), "method": "qmf", "patience": 3}]
    folder = tmp_path_factory.mktemp("whole") / "run"
    train_run(resolve("nyud2", *layers), folder)
    return layers, what_matters(folder)


# Five batches an epoch: in the first epoch, between two checkpoints; and while a checkpoint is half written.
@pytest.mark.parametrize(
    ("where", "number"),
    [*(pytest.param(*at, marks=pytest.mark.slow) for at in (("step", 3), ("step", 13), ("write", 4))), ("write", 2)],
)
def test_a_killed_run_resumes_to_the_same_numbers(where, number, whole_run, tmp_path):
    layers, expected = whole_run
    kill("nyud2", layers, tmp_path / "run", where, number)
    assert not (tmp_path / "run" / "finished.json").exists()
    train_run(resolve("nyud2", *layers), tmp_path / "run", resume=True)
    assert_same(what_matters(tmp_path / "run"), expected)


def test_a_run_killed_behind_its_last_epoch_trains_no_more(sample, tmp_path):
    layers = [QUICK, SMALL, {"data_root": str(sample("mvsa")), "epochs": 9, "patience": 1, "method": "image"}]
    first = train_run(resolve("mvsa", *layers), tmp_path / "run")
    assert first.epochs < 9
    (tmp_path / "run" / "finished.json").unlink()
    assert train_run(resolve("mvsa", *layers), tmp_path / "run", resume=True) == first


def test_resumption_refuses_other_settings_and_damaged_checkpoints(sample, tmp_path):
    layers = [QUICK, SMALL, {"data_root": str(sample("mvsa")), "method": "image", "epochs": 1}]
    folder = tmp_path / "run"
    train_run(resolve("mvsa", *layers), folder)
    with pytest.raises(CommandError, match="holds a run: go on with it by --resume, or give another --output"):
        train_run(resolve("mvsa", *layers), folder)
    with pytest.raises(CommandError, match=r"was made with learning_rate 0.003, not 0.1; seed 1, not 2|seed 1, not 2"):
        train_run(resolve("mvsa", *layers, {"learning_rate": 0.1, "seed": 2}), folder, resume=True)
    (folder / "finished.json").unlink()
    (folder / "last.ckpt").write_bytes((folder / "last.ckpt").read_bytes()[:1000])
    with pytest.raises(CommandError, match=r"last.ckpt: cannot be read as a checkpoint"):
        train_run(resolve("mvsa", *layers), folder, resume=True)


class Payload:
    def __reduce__(self):
        return os.mkdir, ("executed",)


def test_runs_of_networks_that_were_laid_out_otherwise_are_refused_in_one_line(sample, tmp_path, capsys):
    # As TMC was, before it was a rule that every method's networks take.
    arguments = ["train", "nyud2", "--quick", "--data-root", str(sample("nyud2")), "--output", str(tmp_path)]
    arguments += ["--method", "tmc", "--epochs"]
    assert main([*arguments, "1"]) == 0
    folder = tmp_path / "tmc" / "seed1"
    for name in ("best.ckpt", "last.ckpt"):
        content = torch.load(folder / name, weights_only=True)
        content["state_dict"] = {
            key.replace("model.heads.", "parts."): x
            for key, x in content["state_dict"].items()
            if "rule" not in key and "criterion" not in key
        }
        torch.save(content, folder / name)
    capsys.readouterr()
    for command, message in (
        (["evaluate", str(folder)], "does not fit its settings or data, or is of another version"),
        ([*arguments, "2", "--resume"], "last.ckpt: cannot be gone on from"),
    ):
        assert main(command) == 1
        said = capsys.readouterr().err.strip()
        assert message in said
        assert len(said.splitlines()) == 1


def test_nothing_in_a_run_folder_is_executed(sample, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    layers = [QUICK, SMALL, {"data_root": str(sample("mvsa")), "method": "image", "epochs": 1}]
    train_run(resolve("mvsa", *layers), tmp_path / "run")
    torch.save({"state_dict": {}, "epoch": Payload()}, tmp_path / "run" / "best.ckpt")
    with pytest.raises(CommandError, match="cannot be read as a checkpoint"):
        load_learner(tmp_path / "run")
    content = (tmp_path / "run" / "settings.yaml").read_text()
    (tmp_path / "run" / "settings.yaml").write_text(content + "form: !!python/object/apply:os.mkdir [executed]\n")
    with pytest.raises(CommandError, match="not YAML"):
        load_learner(tmp_path / "run")
    assert not (tmp_path / "executed").exists()


def test_bad_rows_are_fatal_or_skipped_and_counted(sample, tmp_path, capsys):
    data = tmp_path / "data"
    shutil.copytree(sample("mvsa"), data)
    lines = (data / "train.jsonl").read_text().splitlines()
    broken = json.loads(lines[1])
    lines[1] = json.dumps({**broken, "img": "../outside.jpg"})
    lines[2] = "{not json"
    (data / "train.jsonl").write_text("\n".join(lines) + "\n")
    arguments = ["train", "mvsa", "--quick", "--data-root", str(data), "--output", str(tmp_path / "runs")]
    assert main(arguments) == 1
    said = capsys.readouterr().err
    assert "train.jsonl, line 2: the path leads out of the data folder" in said
    assert "train.jsonl, line 3: not JSON" in said
    assert not list((tmp_path / "runs").rglob("last.ckpt"))
    assert main([*arguments, "--skip-bad", "--resume"]) == 0
    assert "2 bad rows skipped" in capsys.readouterr().out


def test_frozen_encoders_stay_as_they_were(sample, tmp_path):
    layers = [QUICK, SMALL, {"data_root": str(sample("mvsa")), "method": "late", "freeze": {"image": 1}}]
    for epochs, changes in ((1, False), (2, True)):
        settings = resolve("mvsa", *layers, {"epochs": epochs, "accumulate": 1})
        train_run(settings, tmp_path / str(epochs))
        torch.manual_seed(0)
        _, learner, _ = load_learner(tmp_path / str(epochs))
        state = read_checkpoint(tmp_path / str(epochs) / "last.ckpt")
        conv = next(name for name in state["state_dict"] if name.endswith("image.encoder.trunk.conv1.weight"))
        moments = [m["exp_avg"].shape for m in state["optimizer_states"][0]["state"].values()]
        assert (state["state_dict"][conv].shape in moments) is changes
        assert learner is not None


def test_command_and_config_file(sample, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump({"method": "rgb,late", "seeds": 2, "epochs": 1, "data_root": str(sample("nyud2"))})
    )
    output = tmp_path / "runs"
    code = main(
        [
            *("train", "nyud2", "--quick", "--selection", "test", "--limit-batches", "2"),
            "--config",
            str(config),
            "--output",
            str(output),
        ]
    )
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "epochs are chosen on the test set" in said.out
    assert sorted(str(path.parent.relative_to(output)) for path in output.rglob("finished.json")) == [
        "late/seed1",
        "late/seed2",
        "rgb/seed1",
        "rgb/seed2",
    ]
    saved = yaml.safe_load((output / "late/seed2/settings.yaml").read_text())
    assert (saved["selection"], saved["epochs"], saved["seed"], saved["image_encoder"]) == ("test", 1, 2, "tiny")
    assert list((output / "late/seed2/tensorboard").glob("events.*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "mvsa", "--quick"], "--data-root: must name the data set's folder. MVSA-Single lies as"),
        (["train", "mvsa", "--quick", "--data-root", "none"], "no file none/train.jsonl"),
        (["train", "mvsa", "--data-root", ".", "--method", "rgb"], "--method: rgb is none of mvsa's: bow, image, bert"),
        (["train", "nyud2", "--data-root", "NYUD2", "--quick", "--validation", "0.05"], "must hold out at least one"),
        (["train", "nyud2", "--data-root", ".", "--quick", "--weights", "imagenet"], "/train. NYU Depth V2 lies as"),
        (["train", "nyud2", "--data-root", "NYUD2", "--device", "abacus"], "--device: must be one of auto, gpu, "),
        (["train", "nyud2", "--data-root", "NYUD2", "--device", "cuda:x"], "such as cuda:1, got 'cuda:x'"),
        (["train", "nyud2", "--data-root", "NYUD2", "--device", "cuda:99"], "--device: there is no cuda:99 here"),
        (
            ["train", "nyud2", "--data-root", "NYUD2", "--device", "cuda:0", "--devices", "2"],
            "--devices: must be 1 with the one device cuda:0, got '2'",
        ),
        (["evaluate", "none"], "no folder none"),
        (["evaluate", "."], "no runs in ."),
    ],
)
def test_errors_are_one_message_and_a_code(arguments, message, sample, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([str(sample("nyud2")) if argument == "NYUD2" else argument for argument in arguments]) == 1
    assert message in capsys.readouterr().err


def test_a_missing_extra_is_named(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "lightning", None)
    assert main(["train", "mvsa", "--quick", "--data-root", str(tmp_path)]) == 1
    assert "needs lightning, which is not installed: pip install 'qmf-fusion[examples]'" in capsys.readouterr().err


@pytest.mark.parametrize("failing", ["No space left on device", "Read-only file system"])
def test_a_disk_that_refuses_is_one_clear_error(failing, sample, tmp_path, monkeypatch, capsys):
    def refuse(path, write):
        raise OSError(28, failing, str(path))

    monkeypatch.setattr("qmf_examples.files.write_atomically", refuse)
    arguments = ["train", "mvsa", "--quick", "--method", "image", "--data-root", str(sample("mvsa"))]
    assert main([*arguments, "--output", str(tmp_path / "runs")]) == 1
    said = capsys.readouterr().err
    assert "best.ckpt: " + failing in said
    assert "Traceback" not in said


def test_an_interrupted_training_says_how_to_go_on(sample, tmp_path, capsys, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("qmf_examples.training.run.train_run", interrupt)
    arguments = ["train", "mvsa", "--quick", "--data-root", str(sample("mvsa")), "--output", str(tmp_path / "runs")]
    assert main(arguments) == 130
    assert capsys.readouterr().err.endswith("what was finished is kept: run it again with --resume to go on\n")


def test_an_interrupt_in_the_middle_of_an_epoch_is_one_line_and_can_be_resumed(sample, tmp_path, capsys, monkeypatch):
    before = signal.getsignal(signal.SIGINT)
    step, seen = TrainingModule.training_step, []

    def interrupted(self, batch, number):
        seen.append(number)
        if len(seen) == 6:  # of four batches an epoch
            raise KeyboardInterrupt
        return step(self, batch, number)

    monkeypatch.setattr(TrainingModule, "training_step", interrupted)
    arguments = ["train", "mvsa", "--quick", "--batch-size", "4", "--output", str(tmp_path / "runs")]
    arguments += ["--data-root", str(sample("mvsa"))]
    try:
        assert main(arguments) == 130
    finally:
        signal.signal(signal.SIGINT, before)  # which Lightning has turned off
    assert capsys.readouterr().err == (
        "qmf-fusion: error: interrupted; what was finished is kept: run it again with --resume to go on\n"
    )
    assert main([*arguments, "--resume"]) == 0, capsys.readouterr().err


def test_an_image_that_vanishes_while_a_process_loads_it_is_one_line(sample, tmp_path, capsys, monkeypatch):
    shutil.copytree(sample("nyud2"), tmp_path / "data")
    gone = tmp_path / "data" / "train" / "office"
    load = paired_batches.load_training

    def load_and_lose(settings, say):
        data = load(settings, say)
        shutil.rmtree(gone)
        return data

    monkeypatch.setattr(paired_batches, "load_training", load_and_lose)
    machine = ["--workers", "1", "--cache", "off"]
    arguments = ["train", "nyud2", "--quick", "--method", "rgb", *machine, "--output", str(tmp_path / "runs")]
    assert main([*arguments, "--data-root", str(tmp_path / "data")]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"qmf-fusion: error: {gone}")
    assert "no such file" in error
    assert len(error.splitlines()) == 1
