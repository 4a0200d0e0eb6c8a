"""The evaluation's measures against independent ones, its tables, files and the paper's figures."""

import itertools
import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from qmf_examples.cli import main
from qmf_examples.corruption.conditions import CERTAIN_AT, PROTOCOLS, Condition
from qmf_examples.evaluation import paper_figures
from qmf_examples.evaluation.cells import measure_robustness, summarise_runs
from qmf_examples.evaluation.damaged_tests import NoisePlan
from qmf_examples.evaluation.paper_figures import plot_correlations, plot_gaps
from qmf_examples.evaluation.published import published_accuracy, published_correlation
from qmf_examples.evaluation.reliability import (
    calibration_error,
    effective_robustness,
    relative_robustness,
    risk_coverage_area,
)
from qmf_examples.evaluation.report import notes, sheets
from qmf_examples.evaluation.testing import Tested as Record
from qmf_examples.training.settings import ABLATION, resolve


@given(st.lists(st.tuples(st.sampled_from([0.1, 0.2, 0.5, 0.9]), st.booleans()), min_size=1, max_size=6))
@settings(max_examples=40, deadline=None)
def test_risk_coverage_is_the_mean_over_orders_of_ties(samples):
    areas = []
    for order in itertools.permutations(samples):
        if all(a[0] >= b[0] for a, b in itertools.pairwise(order)):
            wrong = np.array([not correct for _, correct in order], dtype=float)
            areas.append((wrong.cumsum() / np.arange(1, len(wrong) + 1)).mean())
    confidence, correct = (torch.tensor(x) for x in zip(*samples, strict=True))
    assert abs(risk_coverage_area(confidence, correct) - np.mean(areas)) < 1e-12


def test_calibration_error_against_its_definition():
    generator = torch.Generator().manual_seed(0)
    probabilities = torch.randn(200, 5, generator=generator, dtype=torch.float64).mul(2).softmax(-1)
    target = torch.randint(5, (200,), generator=generator)
    confidence, guess = probabilities.max(-1)
    error = 0.0
    for low in np.arange(15) / 15:
        inside = (confidence > low) & (confidence <= low + 1 / 15)
        if inside.any():
            gap = (guess[inside] == target[inside]).double().mean() - confidence[inside].mean()
            error += inside.double().mean().item() * abs(gap.item())
    assert abs(calibration_error(probabilities, target) - error) < 1e-6


def test_robustness_measures():
    assert relative_robustness([0, 10], [0.8, 0.4]) == pytest.approx(0.6)
    assert relative_robustness([0, 5, 10], [0.7, 0.7, 0.7]) == pytest.approx(0.7)
    assert effective_robustness([0.9, 0.5], [0.5, 0.1]) == pytest.approx(0.0)
    assert relative_robustness([0], [0.8]) is None
    assert effective_robustness([0.8], [0.7]) is None


def record(method, seed, level, accuracy, **changes):
    run = resolve("nyud2", {"method": method, "seed": seed, "data_root": "x", **changes})
    right = bytes(n < round(100 * accuracy) for n in range(100))
    r = -0.5 if method == "qmf" else None
    return Record(run, Condition("gaussian", level), accuracy, 0.1, 0.2, r, None, None, right)


def test_cells_hold_mean_deviation_and_worst_beside_the_papers():
    tested = [record("qmf", s, level, a - level / 20) for s, a in ((1, 0.7), (2, 0.8)) for level in (0.0, 10.0)]
    tested += [record("late", 1, level, 0.7 - level / 10 / 2) for level in (0.0, 10.0)]
    cell = summarise_runs(tested)[0]
    assert (cell.mean, cell.worst, cell.seeds) == (pytest.approx(0.75), 0.7, (1, 2))
    assert cell.std == pytest.approx(np.std([0.7, 0.8], ddof=1))
    assert (cell.published.mean, cell.published.std, cell.published.worst) == (70.09, 0.97, 68.81)
    assert cell.correlation == -0.5
    measured = {r.method: r for r in measure_robustness(summarise_runs(tested))}
    assert measured["qmf"].relative == pytest.approx(0.5)
    assert measured["qmf"].effective == pytest.approx(0.0)


def test_what_the_best_is_not_distinguishable_from_is_marked():
    tested = [record(m, s, 0.0, a) for m, a in (("late", 0.78), ("rgb", 0.5), ("qmf", 0.8)) for s in (1, 2)]
    plan = NoisePlan(("gaussian",), (0.0,))
    cells = summarise_runs(tested)
    late, rgb, qmf = cells
    assert (late.behind.verdict, rgb.behind.verdict, qmf.behind) == ("tie", "worse", None)
    assert (late.behind.points, rgb.behind.points) == (pytest.approx(-2), pytest.approx(-30))
    shown = {row[0]: row[1] for row in sheets(cells, measure_robustness(cells), plan)[0].rows}
    assert [text.endswith("≈") for text in shown.values()] == [True, False, False]
    assert "paired bootstrap over seeds and test samples" in " ".join(notes(tested, cells, plan))
    assert json.dumps([cell.to_dict() for cell in cells], allow_nan=False)
    # Seeds that the best has not, and other samples, cannot be paired.
    for other in (record("late", 3, 0.0, 0.7), record("late", 1, 0.0, 0.7)._replace(right=bytes(50))):
        assert summarise_runs([other, record("qmf", 1, 0.0, 0.8)])[0].behind is None


@pytest.mark.parametrize("draw", [plot_gaps, plot_correlations])
def test_the_papers_figures_are_drawn_or_say_why_not(draw, tmp_path):
    plan = NoisePlan(("gaussian",), (0.0, 10.0))
    tested = [record(m, 1, level, 0.7 - level / 20) for m in ("rgb", "depth", "qmf") for level in plan.levels]
    cells = summarise_runs(tested)
    draw(tmp_path / "full.png", cells, plan, "nyud2")
    draw(tmp_path / "empty.png", [cell for cell in cells if cell.method == "rgb"], plan, "nyud2")
    full, empty = (np.asarray(Image.open(tmp_path / f"{name}.png").convert("L")) for name in ("full", "empty"))
    assert (full < 200).sum() > 2 * (empty < 200).sum() > 0


def test_gaps_are_to_the_best_single_modality(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        paper_figures, "save_figure", lambda figure, *_: drawn.extend(x.get_ydata() for x in figure.axes[0].lines)
    )
    plan = NoisePlan(("gaussian",), (0.0, 10.0))
    accuracies = {"rgb": (0.6, 0.5), "depth": (0.7, 0.3), "qmf": (0.8, 0.4)}
    tested = [record(m, 1, x, a) for m, pair in accuracies.items() for x, a in zip(plan.levels, pair, strict=True)]
    plot_gaps(tmp_path / "x.png", summarise_runs(tested), plan, "nyud2")
    assert list(drawn[0]) == pytest.approx([10, -10])


def test_selection_on_the_test_set_is_said():
    tested = [record("qmf", 1, 0.0, 0.7, selection="test")]
    said = " ".join(notes(tested, summarise_runs(tested), NoisePlan(("gaussian",), (0.0,))))
    assert "chosen on the test set" in said


def test_published_figures():
    # Tables 1 and 5 swap RGB and depth of NYUD2: Table 5 counts, and no worst of the other row comes with it.
    assert published_accuracy("nyud2", "rgb", "gaussian", 0).table == "5"
    assert published_accuracy("nyud2", "rgb", "gaussian", 0).worst is None
    assert published_accuracy("mvsa", "late", "salt-pepper", 10).mean == 55.43
    assert published_accuracy("nyud2", "qmf", "gaussian", 20).table == "2"
    assert published_accuracy("mvsa", "etmc", "gaussian", 0) is None
    ablation = [published_accuracy("nyud2", method, "gaussian", 20) for method in ABLATION]
    assert [(cell.table, cell.mean, cell.worst) for cell in ablation] == [
        ("2", 43.76, 36.85),
        ("2", 47.32, 42.97),
        ("2", 47.46, 42.05),
        ("2", 48.26, 43.73),
    ]
    assert published_accuracy("sunrgbd", "energy", "gaussian", 0) is None
    assert published_correlation("food101", "qmf", 10) == 0.735
    # The paper's "evidence" is Dempster-Shafer theory: what tmc does, and not vacuity of cross-entropy heads.
    assert published_correlation("food101", "tmc", 10) == 0.265
    assert published_correlation("food101", "evidence", 10) is None


@pytest.mark.parametrize(("protocol", "possible"), [("released-2023", True), ("released-2025", False)])
def test_table_6_can_only_come_from_the_code_of_2023(protocol, possible):
    # Whoever is not damaged is answered as on clean data, so that one modality's accuracy falls at most by its share.
    fits = []
    for data_set, modality in (("nyud2", "rgb"), ("nyud2", "depth"), ("sunrgbd", "rgb"), ("food101", "image")):
        for level in (5, 10):
            damaged = 0.5 * min(1, level / CERTAIN_AT[protocol])
            clean, noisy = (published_accuracy(data_set, modality, "salt-pepper", x).mean for x in (0, level))
            fits.append(noisy >= (1 - damaged) * clean - 0.5)
    assert fits == [possible] * 8


def test_the_other_columns_agree_with_the_one_code_there_is():
    # Half of the images are damaged at any strength, and the same half of the words goes in both tables.
    for data_set, modality in (("nyud2", "rgb"), ("nyud2", "depth"), ("sunrgbd", "rgb"), ("food101", "image")):
        for level in (5, 10):
            clean, noisy = (published_accuracy(data_set, modality, "gaussian", x).mean for x in (0, level))
            assert noisy >= 0.5 * clean - 0.5
    for level in (5, 10):
        cells = [published_accuracy("food101", "bert", noise, level) for noise in ("gaussian", "salt-pepper")]
        assert abs(cells[0].mean - cells[1].mean) <= 0.1


def test_a_published_column_made_otherwise_is_marked():
    columns = {}
    for protocol in PROTOCOLS:
        plan = NoisePlan(("gaussian", "salt-pepper"), (0.0, 10.0), protocol)
        tested = [record("qmf", 1, level, 0.7) for level in plan.levels]
        tested += [r._replace(condition=Condition("salt-pepper", r.condition.level)) for r in tested]
        cells = summarise_runs(tested)
        made = sheets(cells, measure_robustness(cells), plan)
        columns[protocol] = [[x for x in made[n].header if "paper" in x] for n in (0, 2)]
        said = " ".join(notes(tested, cells, plan))
        assert ("Not comparable" in said) == (protocol != "released-2023")
    plain, marked = ["paper", "paper"], ["paper", "paper, not comparable"]
    assert columns == {
        "released-2023": [plain, plain],
        "released-2025": [plain, marked],
        "clean": [marked, marked],
    }


@pytest.fixture(scope="module")
def runs(sample, tmp_path_factory):
    output = tmp_path_factory.mktemp("runs")
    arguments = ["train", "mvsa", "--quick", "--data-root", str(sample("mvsa")), "--limit-batches", "2"]
    assert (
        main([*arguments, "--epochs", "1", "--method", "bert,late,tmc,qmf", "--seeds", "2", "--output", str(output)])
        == 0
    )
    return output


@pytest.mark.parametrize("protocol", ["clean", "released-2023"])
def test_evaluate_prints_and_writes(protocol, runs, tmp_path, capsys):
    results = []
    for place in ("a", "b"):
        arguments = ["evaluate", str(runs), "--levels", "0,10", "--protocol", protocol]
        assert main([*arguments, "--output", str(tmp_path / place)]) == 0
        results.append((tmp_path / place / "results.json").read_bytes())
    assert results[0] == results[1]
    content = json.loads(results[0])
    assert (content["schema"], content["kind"], content["unit"]) == (1, "evaluation", "fraction")
    assert len(content["cells"]) == 4 * 2 * 2
    clean = {(c["method"], c["noise"]): c["mean"] for c in content["cells"] if c["level"] == 0}
    assert clean["qmf", "gaussian"] == clean["qmf", "salt-pepper"]
    by_method = {c["method"]: c for c in content["cells"]}
    assert by_method["bert"]["correlation"] is None
    assert -1 <= by_method["tmc"]["correlation"] <= 1
    assert by_method["qmf"]["published"]["mean"] == 0.6041
    assert by_method["qmf"]["seeds"] == [1, 2]
    out = capsys.readouterr().out
    assert "Tiny networks" in out
    assert "78.07 ± 1.10 (76.30)" in out
    text = (tmp_path / "a" / "results.md").read_text()
    assert sum(line.startswith("| qmf |") for line in text.splitlines()) == 5  # accuracy, measures; twice; pairs
    for name in ("accuracy.png", "weights.png", "gaps.png", "correlations.png"):
        assert Image.open(tmp_path / "a" / name).size[0] > 200


def test_batch_size_changes_no_figure(runs, tmp_path):
    found = []
    for size in ("1", "5"):
        arguments = ["evaluate", str(runs / "late" / "seed1"), "--levels", "0,10", "--batch-size", size]
        assert main([*arguments, "--output", str(tmp_path / size)]) == 0
        found.append([c["mean"] for c in json.loads((tmp_path / size / "results.json").read_text())["cells"]])
    assert found[0] == found[1]


def test_evaluate_refuses_what_makes_no_table(runs, tmp_path, capsys):
    for arguments, message in (
        (["--noise", "fog"], "--noise must be of gaussian, salt-pepper; got 'fog'"),
        (["--levels", "a"], "--levels must be numbers"),
        (["--levels", "0,nan,5"], "--levels must lie between 0 and 100, got '0,nan,5'"),
        (["--levels", "20"], "--levels: level must be from 0 to 10"),
        (["--protocol", "new"], "--protocol must be one of released-2023, released-2025, clean"),
        (["--data-root", str(tmp_path)], "no file"),
    ):
        assert main(["evaluate", str(runs), "--output", str(tmp_path / "out"), *arguments]) == 1
        assert message in capsys.readouterr().err
