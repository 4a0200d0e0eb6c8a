"""Files on a disk that is full, and locks: who holds one, and that a process which was killed does not."""

import os
import signal
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.errors import CommandError
from qmf_examples.files import alone_in, save_checkpoint, write_atomically
from qmf_examples.training.run import load_learner, read_checkpoint

resource = pytest.importorskip("resource", reason="limits of POSIX")
STATE = {"weights": torch.zeros(50_000), "more": torch.ones(1_000), "epoch": 3}
# It holds the folder, and so does the child that it forks unless that lets go; the child outlives it. The child itself
# says that it runs: its parent may be killed before the system has given a new process its first moment.
HOLDER = """
import os, sys, time
from pathlib import Path
from qmf_examples.files import alone_in

with alone_in(Path(sys.argv[1])):
    if os.fork() == 0:
        print(os.getpid(), flush=True)
        time.sleep(60)
        os._exit(0)
    time.sleep(60)
"""


@contextmanager
def full_disk(size):
    """Let no file grow beyond so many bytes, as a disk with no more room would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:  # before the test ends: what pytest says of it may go to a file, too
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# PyTorch makes a RuntimeError of its own of most of them.
@pytest.mark.parametrize("size", [0, 100, 1_000, 5_000, 100_000, 200_000, 205_000])
def test_a_checkpoint_on_a_full_disk_is_the_systems_error_and_leaves_the_old_one(size, tmp_path):
    path = tmp_path / "last.ckpt"
    save_checkpoint(path, {"epoch": 2})
    old = path.read_bytes()
    with full_disk(size), pytest.raises(OSError, match=r"File too large: .*last\.ckpt'"):
        save_checkpoint(path, STATE)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["last.ckpt"]


def test_an_error_of_the_writers_own_stays_what_it_is(tmp_path):
    def fail(file):
        file.write(b"half")
        raise RuntimeError("not of the disk")

    with pytest.raises(RuntimeError, match="not of the disk"):
        write_atomically(tmp_path / "file", fail)


def test_an_interrupt_on_a_full_disk_stays_an_interrupt(tmp_path):
    def fail(file):
        file.raw.write(b"as much as there is room for")
        with pytest.raises(OSError, match="File too large"):
            file.raw.write(b"more")
        raise KeyboardInterrupt

    with full_disk(10), pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "file", fail)


@pytest.mark.parametrize("command", ["train nyud2", "train digits"])
def test_a_disk_that_fills_up_amid_a_training_is_one_line(command, sample, tmp_path, capsys):
    arguments = [*command.split(), "--quick", "--epochs", "1", "--output", str(tmp_path)]
    if "nyud2" in command:
        arguments += ["--method", "rgb", "--limit-batches", "1", "--data-root", str(sample("nyud2"))]
    with full_disk(20_000):
        assert main(arguments) == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("qmf-fusion: error: ")]
    assert len(lines) == 1
    assert lines[0].endswith(": File too large")
    assert list(tmp_path.rglob("*.part")) == []


def test_the_last_good_checkpoint_outlives_a_full_disk(sample, tmp_path, capsys):
    arguments = ["train", "nyud2", "--quick", "--method", "rgb", "--limit-batches", "1"]
    arguments += ["--data-root", str(sample("nyud2")), "--output", str(tmp_path)]
    assert main([*arguments, "--epochs", "1"]) == 0
    run = tmp_path / "rgb" / "seed1"
    before = (run / "last.ckpt").read_bytes()
    with full_disk(20_000):
        assert main([*arguments, "--epochs", "3", "--resume"]) == 1
    assert "File too large" in capsys.readouterr().err
    assert (run / "last.ckpt").read_bytes() == before
    assert load_learner(run)
    assert main([*arguments, "--epochs", "3", "--resume"]) == 0
    assert read_checkpoint(run / "last.ckpt")["epoch"] == 2


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_the_lock_of_a_killed_process_holds_nobody_up(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as holder:
        child = int(holder.stdout.readline())
        try:
            with pytest.raises(CommandError, match=rf"\(process {holder.pid} on .* since "), alone_in(tmp_path):
                pass
            holder.kill()
            holder.wait()
            with alone_in(tmp_path):  # though its child is alive, as a loader's process would be for a while
                os.kill(child, 0)
        finally:
            holder.kill()
            os.kill(child, signal.SIGKILL)


@pytest.mark.parametrize(
    "command",
    [
        ["train", "digits", "--quick"],
        ["bench-robustness", "--quick"],
    ],
)
def test_a_folder_of_results_is_written_by_one_command_at_a_time(command, tmp_path, capsys):
    with alone_in(tmp_path):
        assert main([*command, "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{tmp_path}: another command is writing there" in line
    assert f"(process {os.getpid()} on " in line
    assert os.listdir(tmp_path) == ["run.lock"]
