"""Rows, verdicts and tables, against numbers worked out by hand or by another library."""

import io
import json
import math

import pytest
from rich.console import Console

from qmf_examples.comparison.results import Row, Score, summarise, write_results
from qmf_examples.comparison.tables import report
from qmf_examples.comparison.verdicts import judge
from qmf_examples.models.methods import Method

METHODS = (
    Method("average", role="average"),
    Method("ours"),
)


def answers(accuracy):
    """The first of 100 samples are right."""
    return bytes(n < round(100 * accuracy) for n in range(100))


def scores(method, clean, noisy, correlation=None):
    found = [Score(method, "clean", 0.0, seed, a, correlation, answers(a)) for seed, a in enumerate(clean)]
    return found + [Score(method, "gaussian", 0.5, seed, a, correlation, answers(a)) for seed, a in enumerate(noisy)]


def printed(given):
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report(summarise(given), judge(given, METHODS)))
    return console.export_text()


def test_rows_hold_mean_deviation_and_worst():
    rows = summarise(scores("ours", [0.9, 0.8, 0.7], [0.5, 0.5, 0.2], -0.25))
    assert [(row.condition, row.level) for row in rows] == [("clean", 0.0), ("gaussian", 0.5)]
    assert rows[0].mean == pytest.approx(0.8)
    assert rows[0].std == pytest.approx(0.1)
    assert rows[1].std == pytest.approx(math.sqrt(0.03))
    assert (rows[0].worst, rows[1].worst) == (0.7, 0.2)
    assert rows[0].correlation == -0.25
    assert rows[0].seeds == (0, 1, 2)


def test_a_single_seed_has_no_deviation():
    [row] = summarise([Score("ours", "clean", 0.0, 4, 0.9, None, b"")])
    assert (row.mean, row.std, row.worst, row.correlation, row.seeds) == (0.9, None, 0.9, None, (4,))


def test_the_table_says_where_the_fusion_loses():
    given = scores("average", [0.8, 0.8], [0.8, 0.8]) + scores("ours", [0.95, 0.95], [0.5, 0.5], -0.3)
    [verdict] = judge(given, METHODS)
    assert (
        verdict.sentence()
        == "ours loses to average under 1 of 2 conditions (gaussian 0.5 -30.0 points); wins 1, not distinguishable 0."
    )
    text = printed(given)
    assert "Against the plain average" in text
    assert "paired bootstrap over seeds and test samples" in " ".join(text.split())
    [line] = [line for line in text.splitlines() if "ours" in line and "wins" in line]
    assert line.split() == ["ours", "wins", "15.0", "loses", "30.0", "1", "of", "2"]
    assert "50.0 ± 0.0 (50.0)" in text
    assert "-0.30" in text


def test_a_lead_of_a_sample_is_neither_won_nor_lost():
    given = scores("average", [0.90], [0.80]) + scores("ours", [0.91], [0.79])
    [verdict] = judge(given, METHODS)
    assert verdict.sentence() == "ours loses to average nowhere; wins 0, not distinguishable 2."
    text = printed(given)
    assert "≈ +1.0" in text
    assert "≈ -1.0" in text
    assert "± " in text


def test_results_are_json_without_nan(tmp_path):
    rows = summarise([Score("ours", "clean", 0.0, 4, 0.9, None, b"")])
    write_results(tmp_path / "results.json", {"epochs": 1}, rows, ["ours loses nowhere"])
    content = json.loads((tmp_path / "results.json").read_text())
    assert content["rows"][0]["std"] is None
    assert content["verdicts"] == ["ours loses nowhere"]
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]
    bad = Row("ours", "clean", 0.0, math.nan, None, math.nan, None, (0,), (math.nan,), (None,))
    with pytest.raises(ValueError, match="rows must hold finite accuracies"):
        write_results(tmp_path / "results.json", {}, [bad], [])
    assert json.loads((tmp_path / "results.json").read_text()) == content
