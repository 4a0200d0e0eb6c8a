"""One quick run of the digits job, shared by the tests that look at what it leaves behind."""

import contextlib
import io
from pathlib import Path
from typing import NamedTuple

import pytest

from qmf_examples.cli import main


class QuickRun(NamedTuple):
    output: Path
    arguments: list[str]
    stdout: str


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("quick")
    arguments = ["train", "digits", "--quick", "--epochs", "2", "--seed", "3"]
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main([*arguments, "--output", str(output)])
    assert code == 0
    return QuickRun(output, arguments, stdout.getvalue())
