"""A run that is killed resumes to the weights, the trajectory and the results of one that was not, bit for bit."""

import json
import os
import signal
import subprocess
import sys

import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.comparison.digits import TABLE, run_digits
from qmf_examples.comparison.heads import Config
from qmf_examples.errors import CommandError
from qmf_examples.files import write_atomically

CONFIG = {"seeds": (0,), "epochs": 4, "checkpoint_every": 2}
# Killed by the system, without a chance to tidy up: either after epoch 3 of the third of five trainings, between two
# checkpoints, or while a checkpoint is half written. No clock decides.
KILLED = """
import io, os, signal, sys
from pathlib import Path
from qmf_examples.comparison.digits import run_digits
from qmf_examples.comparison.heads import Config
import torch

folder, where = Path(sys.argv[1]), sys.argv[2]
folder.mkdir()


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def progress(name, seed, training, epoch):
    if where == "epoch" and (training, epoch) == ("qmf-paper", 3):
        die()


if where == "write":
    plain = torch.save

    def save(state, file):
        if "qmf-paper" in state["made_with"]["training"] and state["epoch"] == 4:
            whole = io.BytesIO()
            plain(state, whole)
            file.write(whole.getvalue()[: whole.tell() // 2])
            file.flush()
            die()
        plain(state, file)

    torch.save = save

run_digits(Config(seeds=(0,), epochs=4, checkpoint_every=2), folder, progress=progress)
"""


def load(folder):
    return {path.name: torch.load(path, weights_only=True) for path in sorted(folder.glob("*.pt"))}


def assert_bit_equal(found, expected, where=""):
    assert type(found) is type(expected), where
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype, where
        assert torch.equal(found, expected), where
    elif isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key in expected:
            assert_bit_equal(found[key], expected[key], f"{where}.{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for n, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert_bit_equal(a, b, f"{where}[{n}]")
    else:
        assert found == expected, where


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return run_digits(Config(**CONFIG), folder), load(folder)


@pytest.mark.parametrize("where", [pytest.param("epoch", marks=pytest.mark.slow), "write"])
def test_a_killed_run_resumes_bit_equal(where, uninterrupted, tmp_path):
    scores, checkpoints = uninterrupted
    folder = tmp_path / "killed"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(folder), where], env=environment, capture_output=True, text=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    left = load(folder)
    assert len(left) == 3  # of five trainings: it was half-way
    assert left["seed0-qmf-paper.pt"]["epoch"] == 2  # of four: the last whole checkpoint, not the last epoch
    halves = [path.name.partition(".pt.")[0] for path in folder.glob("*.part")]
    assert halves == (["seed0-qmf-paper"] if where == "write" else [])

    reported = []
    resumed = run_digits(Config(**CONFIG), folder, resume=True, progress=lambda *event: reported.append(event[1:]))
    assert resumed == scores
    found = load(folder)
    assert_bit_equal(found, checkpoints)
    # It went on, rather than starting afresh.
    assert [event for event in reported if event[1] == "unimodal"] == [(0, "unimodal", 4)]
    assert [event[2] for event in reported if event[1] == "qmf-paper"] == [2, 3, 4]
    # And what was compared is the trajectory and weights that moved.
    state = found["seed0-qmf-paper.pt"]
    assert (state["learner"]["criterion.ranking.trajectory.history"][1] == 4).all()
    assert state["learner"]["criterion.ranking.trajectory.history"].min() > 0
    weight = "model.heads.pixels.encoder.0.weight"
    assert not torch.equal(state["learner"][weight], left["seed0-qmf-paper.pt"]["learner"][weight])


def test_the_command_resumes_to_the_same_bytes(quick_run, tmp_path):
    for name in os.listdir(quick_run.output / "checkpoints")[::2]:  # every other training is lost
        (tmp_path / "checkpoints").mkdir(exist_ok=True)
        (tmp_path / "checkpoints" / name).write_bytes((quick_run.output / "checkpoints" / name).read_bytes())
    assert main([*quick_run.arguments, "--resume", "--output", str(tmp_path)]) == 0
    assert (tmp_path / "results.json").read_bytes() == (quick_run.output / "results.json").read_bytes()


def test_without_resume_old_checkpoints_are_not_used(uninterrupted, tmp_path):
    (tmp_path / "seed0-unimodal.pt").write_bytes(b"of an earlier run")
    (tmp_path / "seed7-unimodal.pt").write_bytes(b"of an earlier run")
    assert run_digits(Config(**CONFIG), tmp_path) == uninterrupted[0]
    assert not (tmp_path / "seed7-unimodal.pt").exists()


def test_other_settings_and_broken_files_are_refused(quick_run, tmp_path, capsys):
    folder = quick_run.output / "checkpoints"
    with pytest.raises(CommandError, match=r"--resume: .*seed3-unimodal.pt was made with epochs 2, not with epochs 3"):
        run_digits(Config(seeds=(3,), epochs=3), folder, resume=True)
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "seed3-unimodal.pt").write_bytes(b"garbage")
    capsys.readouterr()
    assert main([*quick_run.arguments, "--resume", "--output", str(tmp_path)]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("qmf-fusion: error: --resume: cannot read ")
    assert "run without --resume" in last
    assert not (tmp_path / "results.json").exists()


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "results.json"
    write_atomically(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"ne")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["results.json"]
    write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["results.json"]


def test_two_writers_of_one_file_do_not_meet(tmp_path):
    path = tmp_path / "results.json"

    def slow(file):
        file.write(b"slow")
        write_atomically(path, lambda other: other.write(b"quick"))  # all of the other's write, amid this one
        assert path.read_bytes() == b"quick"
        file.write(b", whole")

    write_atomically(path, slow)
    assert path.read_bytes() == b"slow, whole"
    assert os.listdir(tmp_path) == ["results.json"]


def test_settings_are_recorded_for_comparison():
    plain, qmf = (next(each for each in TABLE.trainings if each.name == name) for name in ("unimodal", "qmf-paper"))
    made = Config(seeds=(0, 1)).made_with(1, qmf)
    assert json.loads(made["training"]) == "qmf-paper"
    assert made == Config(seeds=(1, 2, 3), checkpoint_every=1).made_with(1, qmf)
    assert made != Config(batch_size=64).made_with(1, qmf)
    assert made != Config(seeds=(0, 1)).made_with(1, plain)
