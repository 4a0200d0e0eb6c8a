"""Names that are not UTF-8, on terminals that would rather fail than print them."""

import os
import subprocess
import sys

import pytest

from qmf_examples.cli import main

NAME = os.fsdecode(b"caf\xe9")
COMMAND = [sys.executable, "-c", "import sys; from qmf_examples.cli import main; sys.exit(main())"]


def run(encoding, *arguments):
    environment = {**os.environ, "PYTHONIOENCODING": f"{encoding}:strict", "PYTHONUTF8": "0"}
    done = subprocess.run([*COMMAND, *map(str, arguments)], capture_output=True, env=environment)
    assert b"Traceback" not in done.stderr, done.stderr.decode(errors="replace")
    return done.returncode, done.stdout.decode(encoding), done.stderr.decode(encoding)


@pytest.fixture
def folder(tmp_path):
    try:
        (tmp_path / NAME).mkdir()
    except OSError:
        pytest.skip("this file system takes no names but UTF-8")
    sizes = ["--train", "1", "--test", "1", "--image-size", "16"]
    assert main(["sample", "nyud2", str(tmp_path / NAME / "n"), *sizes]) == 0
    kitchen = tmp_path / NAME / "n" / "train" / "kitchen"
    (kitchen / "kitchen_0000.png").rename(kitchen / f"{NAME}.png")
    (kitchen / f"{NAME} too.png").write_bytes(b"")
    return tmp_path / NAME


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_inspect_names_the_file(folder, encoding):
    code, out, _ = run(encoding, "inspect", "nyud2", "--data-root", folder / "n")
    assert code == 1
    assert "train: 1 cannot be used\n  train/kitchen/caf" in out
    assert " too.png: an empty file: caf" in out
    assert "unless with --skip-bad" in out
    if encoding == "utf-8":
        assert "caf\\udce9 too.png" in out


def test_an_error_names_the_folder(folder):
    code, out, err = run("utf-8", "inspect", "mvsa", "--data-root", folder / "nowhere")
    assert (code, err) == (1, "")
    assert "problem: no file" in out
    code, _, err = run("utf-8", "prepare", "sunrgbd", "--raw", folder / "nowhere", "--out", folder / "out")
    assert (code, err.count("\n")) == (1, 1)
    assert err.endswith("caf\\udce9/nowhere\n")


def test_a_run_trains_on_such_a_folder_and_refuses_to_write_to_one(folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    train = ["train", "nyud2", "--quick", "--skip-bad", "--data-root", f"../{NAME}/n", "--selection", "test"]
    assert main([*train, "--method", "rgb", "--epochs", "1", "--output", "runs"]) == 0, capsys.readouterr().err
    assert main(["evaluate", "runs", "--levels", "0"]) == 0, capsys.readouterr().err
    assert main([*train, "--output", f"../{NAME}/runs"]) == 1
    assert "--output: must be UTF-8, for TensorBoard's files, got '../caf\\udce9/runs'" in capsys.readouterr().err
