"""Jobs in two processes: the numbers of one process, one voice, and resumption after one of them is killed."""

import contextlib
import json
import os
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.errors import CommandError
from qmf_examples.models.learners import Answer, Learner
from qmf_examples.processes import run_in_processes
from qmf_examples.training.lightning_module import Batches, TrainingModule
from qmf_examples.training.run import read_checkpoint
from qmf_examples.training.settings import QUICK, resolve

ENVIRONMENT = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "OMP_NUM_THREADS": "1"}
DIGITS = ["train", "digits", "--quick", "--epochs", "2", "--seed", "3", "--seeds", "1"]
DDP = ["--devices", "2", "--strategy", "ddp"]
# Each of the two processes that Lightning starts runs this file. The second one dies, without a chance to tidy up, in
# the step of the number given.
DRIVER = """
import os, signal, sys
import torch
from qmf_examples.cli import main
from qmf_examples.training.lightning_module import TrainingModule

torch.set_num_threads(1)
plain_step, steps = TrainingModule.training_step, 0


def training_step(self, batch, n):
    global steps
    steps += 1
    if steps == int(os.environ["DIE_IN_STEP"]) and os.environ.get("LOCAL_RANK") == "1":
        os.kill(os.getpid(), signal.SIGKILL)
    return plain_step(self, batch, n)


TrainingModule.training_step = training_step
sys.exit(main())
"""


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "qmf_examples.cli", *DIGITS, *DDP, "--output", str(folder)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_digits_agree_with_one_process(two_processes, quick_run):
    ours, theirs = (json.loads((f / "results.json").read_text()) for f in (two_processes[0], quick_run.output))
    assert ours["config"] == {**theirs["config"], "seeds": [3], "devices": 2}
    assert len(ours["rows"]) == len(theirs["rows"])
    for row, expected in zip(ours["rows"], theirs["rows"], strict=True):
        assert [row[name] for name in ("method", "condition", "level")] == [
            expected[name] for name in ("method", "condition", "level")
        ]
        # The same samples make each step. Only the ranking compares others: those of one process.
        ranked = row["method"] in ("QMF, paper", "QMF, margin", "QMF, released", "robust")
        assert abs(row["accuracies"][0] - expected["accuracies"][0]) <= (0.03 if ranked else 0.006), row
    for name in ("unimodal", "qmf-paper", "robust"):
        one, two = (
            torch.load(folder / "checkpoints" / f"seed3-{name}.pt", weights_only=True)
            for folder in (quick_run.output, two_processes[0])
        )
        if name == "unimodal":
            for key, weight in one["learner"].items():
                torch.testing.assert_close(two["learner"][key], weight, rtol=1e-3, atol=1e-3)
            continue
        if name == "qmf-paper":
            key = "criterion.ranking.trajectory.history"
            history = two["learner"][key]
            assert (history[1] == 2).all()
            torch.testing.assert_close(history, one["learner"][key], rtol=0.02, atol=0.02)
            continue
        # The robust rule gathers of every sample, whichever process saw it; but each process drops other modalities.
        key = "model.fusion.rule.running.measured"
        torch.testing.assert_close(two["learner"][key][:, 0], one["learner"][key][:, 0], rtol=0.05, atol=0)


def test_one_process_speaks_and_writes(two_processes, quick_run):
    folder, said = two_processes
    assert said.count("Wrote ") == 1
    assert said.count("Correlation of weight and loss") == quick_run.stdout.count("Correlation of weight and loss")
    assert sorted(os.listdir(folder)) == sorted(os.listdir(quick_run.output))
    checkpoints = {path.replace("seed4", "seed3") for path in os.listdir(quick_run.output / "checkpoints")}
    assert set(os.listdir(folder / "checkpoints")) == checkpoints


@pytest.mark.slow
def test_torchrun_gives_the_same_bytes(two_processes, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "-m", "qmf_examples.cli", *DIGITS, "--output", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "results.json").read_bytes() == (two_processes[0] / "results.json").read_bytes()
    assert done.stdout.count("Wrote ") == 1


@pytest.mark.slow
def test_an_error_in_a_process_is_one_line(two_processes, capsys):
    arguments = [*DIGITS, "--devices", "2", "--epochs", "3", "--resume", "--output", str(two_processes[0])]
    assert main(arguments) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "seed3-unimodal.pt was made with epochs 2, not with epochs 3" in line


def test_a_process_that_is_killed_ends_the_others():
    with pytest.raises(CommandError, match=r"process \d of 2 was killed: run it again with --resume to go on"):
        run_in_processes(2, "cpu", signal.raise_signal, signal.SIGKILL)


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["digits", "--devices", "0"], 2, "'--devices'"),
        (["digits", "--devices", "two"], 2, "'--devices'"),
        (["digits", "--devices", "1000"], 2, "'--devices': 1000: there are "),
        (["digits", "--strategy", "bogus"], 2, "'--strategy': 'bogus' must be auto or ddp"),
        (["nyud2", "--data-root", ".", "--devices", "0"], 1, "--devices: must be from 1 to the "),
        (["nyud2", "--data-root", ".", "--devices", "two"], 1, "--devices: must be from 1 to the "),
        (["nyud2", "--data-root", ".", "--devices", "1000"], 1, "--devices: must be from 1 to the "),
        (["nyud2", "--data-root", ".", "--strategy", "bogus"], 1, "--strategy: must be auto, ddp or another of"),
    ],
)
def test_wrong_devices_and_strategies_are_named(arguments, code, said, tmp_path, capsys):
    machine = ["--quick", "--output", str(tmp_path)]
    assert main(["train", *arguments, *machine]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


def test_shares_of_a_batch_must_be_equal(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert main([*DIGITS, "--devices", "3", "--output", str(tmp_path)]) == 2
    assert "'--devices': 3: it must divide the batch of 128" in capsys.readouterr().err


class Echo(Learner):
    """Answers with its input."""

    def forward(self, inputs):
        return Answer(inputs)


def test_samples_are_shared_out_and_repeats_count_once():
    settings = resolve("nyud2", QUICK, {"batch_size": 4})
    one, trained, correct, samples = None, [], 0, 0
    for processes in (1, 2):
        for rank in range(processes):
            batches = Batches(range(7), range(5), torch.tensor, settings)
            place = {"world_size": processes, "global_rank": rank, "current_epoch": 3}
            batches.trainer = SimpleNamespace(**place)
            if processes == 1:
                one = list(batches.train_dataloader().sampler)
                continue
            trained.append(list(batches.train_dataloader().sampler))
            module = TrainingModule(Echo(), settings, 4, 7)
            module.trainer = SimpleNamespace(**place, val_dataloaders=batches.val_dataloader())
            for number, batch in enumerate(batches.val_dataloader()):
                # The first sample is the only one that is answered rightly: a repeat would show.
                scores = torch.nn.functional.one_hot((batch == 0).long(), 4).float()
                module.validation_step({"inputs": scores, "label": torch.ones_like(batch)}, number)
            state = module.accuracy
            correct, samples = correct + int(state.tp), samples + int(state.tp + state.fn)
    assert (correct, samples) == (1, 5)
    assert [sample for pair in zip(*trained, strict=True) for sample in pair] == [*one, one[0]]
    assert sorted(one) == list(range(7))


def train_pair(arguments, die_in_step=0):
    """Run the driver with a process group of its own, so that nothing of it outlives the test."""
    environment = {**ENVIRONMENT, "DIE_IN_STEP": str(die_in_step)}
    command = [sys.executable, *map(str, arguments), *DDP]
    run = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = run.communicate(timeout=200)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
    return run.returncode, said


@pytest.mark.slow
def test_two_processes_that_diverge_say_so_once(sample, tmp_path):
    arguments = ["-m", "qmf_examples.cli", "train", "nyud2", "--quick", "--data-root", sample("nyud2")]
    code, said = train_pair([*arguments, "--learning-rate", "1e20", "--output", tmp_path])
    assert code == 1
    assert said.count("the training has diverged in epoch 1") == said.count("qmf-fusion: error") == 1
    assert not list(tmp_path.rglob("*.ckpt"))


@pytest.mark.slow
def test_a_killed_process_costs_no_more_than_its_epoch(sample, tmp_path):
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER)
    # Of 40 samples each process takes 20: five steps an epoch, and fifteen for each method.
    settings = ["--method", "qmf,robust", "--batch-size", "4", "--limit-batches", "100", "--epochs", "3"]
    lively = ["--accumulate", "2", "--hidden", "16", "--dropout", "0.3", "--warmup", "0.2", "--plateau-patience", "0"]
    common = [driver, "train", "nyud2", "--quick", "--data-root", sample("nyud2"), *settings, *lively, "--output"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert train_pair([*common, whole])[0] == 0
    code, said = train_pair([*common, killed], die_in_step=15 + 8)
    assert code != 0
    assert "Traceback" not in said
    assert (killed / "qmf" / "seed1" / "finished.json").exists()
    assert not (killed / "robust" / "seed1" / "finished.json").exists()
    assert read_checkpoint(killed / "robust" / "seed1" / "last.ckpt")["epoch"] == 0
    assert train_pair([*common, killed, "--resume"])[0] == 0

    for method in ("qmf", "robust"):
        ours, theirs = (folder / method / "seed1" for folder in (killed, whole))
        assert (ours / "finished.json").read_bytes() == (theirs / "finished.json").read_bytes()
        for name in ("last.ckpt", "best.ckpt"):
            found, expected = (read_checkpoint(folder / name) for folder in (ours, theirs))
            assert found["epoch"] == expected["epoch"]
            torch.testing.assert_close(found["state_dict"], expected["state_dict"], rtol=0, atol=0)
    # Every sample was seen once an epoch, by one of the two; of robust, some lack a modality that was dropped.
    state = read_checkpoint(killed / "qmf" / "seed1" / "last.ckpt")["state_dict"]
    history = state["learner.criterion.ranking.trajectory.history"]
    assert sorted(history[1, 0].unique().tolist()) == [0, 3]  # those held out have none
    assert history[1].sum(1).tolist() == [3 * 40] * 2
