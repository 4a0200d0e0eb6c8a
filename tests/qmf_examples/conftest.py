"""What tests share: one quick run of the digits job, and a small made-up sample of each of the four data sets."""

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


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """Nothing is kept among the user's own caches."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("caches")))
        yield


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory):
    output = tmp_path_factory.mktemp("quick")
    arguments = ["train", "digits", "--quick", "--epochs", "2", "--seed", "3"]
    stdout = io.StringIO()
    with contextlib.redirect_stdout(stdout):
        code = main([*arguments, "--output", str(output)])
    assert code == 0
    return QuickRun(output, arguments, stdout.getvalue())


@pytest.fixture(scope="session")
def sample(tmp_path_factory):
    """The folder of a sample of the data set of that name, written once; tests that damage it copy it first."""
    written = {}

    def folder(name):
        if name not in written:
            from qmf_examples.data.catalogue import DATA_SETS
            from qmf_examples.prepare.sample import write_sample

            known = DATA_SETS[name]
            counts = {"train": 2 if name == "food101" else 5, "dev": 1, "test": 1 if name == "food101" else 2}
            written[name] = tmp_path_factory.mktemp(name) / "data"
            write_sample(
                known, written[name], per_class={split: counts[split] for split in known.splits}, image_size=32
            )
        return written[name]

    return folder
