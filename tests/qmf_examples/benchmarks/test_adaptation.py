"""The benchmark of test-time adaptation: its streams, and a row of the table and of the file for each condition."""

import json
from functools import partial

import pytest
import torch

from qmf_examples.benchmarks import adaptation
from qmf_examples.benchmarks.adaptation import (
    AS_TRAINED,
    COLUMNS,
    CONDITIONS,
    DIGITS_DAMAGES,
    DIGITS_RULES,
    VARIANTS,
    answers,
    main,
    of_digits,
    streams_of,
)
from qmf_examples.errors import CommandError
from qmf_fusion.adaptation import TestTimeAdaptation


def test_streams_replace_what_the_condition_says():
    qmf, robust = of_digits(seeds=1, epochs=1)
    num = len(qmf.target)
    for condition in CONDITIONS:
        streams = list(streams_of(qmf, condition))
        assert len(streams) == (1 if condition.startswith("clean") else 4 * len(DIGITS_DAMAGES))
        for n, stream in enumerate(streams):
            assert stream.order.sort().values.tolist() == list(range(num))
            labels = qmf.target[stream.order]
            assert torch.equal(labels, labels.sort().values) == condition.endswith("by class")
            shares = stream.replaced.double().mean(1)
            share = {"clean": 0.0, "half": 0.5}.get(condition[:5].strip(" ,"), 1.0)
            expected = torch.zeros(4, dtype=torch.float64)
            if streams[1:]:
                expected[n % 4] = share
            torch.testing.assert_close(shares, expected, atol=0.05, rtol=0)
    assert (qmf.name, robust.name) == DIGITS_RULES
    stream = next(streams_of(qmf, "one damaged"))  # noise on the pixels
    rows = [qmf.damaged["noise"].unimodal_logits[0], *qmf.clean.unimodal_logits[1:]]
    expected = (qmf.fusion(rows).logits.argmax(-1) == qmf.target).double()
    assert answers(qmf, stream, 64, None).right.tolist() == expected.tolist()
    assert answers(qmf, stream, 64, partial(TestTimeAdaptation, lr=1e-9)).right.tolist() == expected.tolist()
    assert answers(qmf, stream, 64, partial(TestTimeAdaptation, lr=10.0)).right.tolist() != expected.tolist()


@pytest.mark.slow
def test_it_prints_and_writes_a_row_for_each_condition_and_variant(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(adaptation, "DIGITS_DAMAGES", {"noise": 2.0})
    main(["--seeds", "2", "--epochs", "1", "--batch-sizes", "512", "1024", "--output", str(tmp_path / "x.json")])
    lines = capsys.readouterr().out.splitlines()
    records = json.loads((tmp_path / "x.json").read_text())["records"]
    assert len(records) == len(lines) - 2 == 2 * len(CONDITIONS) * (len(VARIANTS) + 1)
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert {record["variant"] for record in records} == set(VARIANTS)
    assert all(set(record["log_loss"]) == {AS_TRAINED, record["variant"]} for record in records)


def test_no_runs_are_one_error(tmp_path):
    with pytest.raises(CommandError, match="no runs in"):
        main([str(tmp_path)])
