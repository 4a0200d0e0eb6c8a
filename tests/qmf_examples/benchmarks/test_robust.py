"""The benchmark of ``robust`` runs and prints its table."""

import pytest

from qmf_examples.benchmarks import robust


def test_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    robust.main(["--repeats", "1", "--shapes", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 64, 10 |")
    assert lines[2].count("(") == 2
    assert len(lines) == 3


def test_times_every_rule() -> None:
    times = robust.time_shape(4, 3, repeats=1)
    assert set(times) == {"default", "robust"}
    assert all(value > 0 for pair in times.values() for value in pair)
