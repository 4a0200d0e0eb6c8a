"""What ``--quick`` trains has learned something of what ``sample`` writes, the recommended rule too."""

import json

import pytest

from qmf_examples.cli import main
from qmf_examples.data.catalogue import DATA_SETS

FEW = "late,qmf,robust"


@pytest.mark.parametrize(
    ("name", "methods", "least"),
    [
        ("nyud2", "robust", 0.5),
        pytest.param("nyud2", f"rgb,depth,concat,{FEW}", 0.2, marks=pytest.mark.slow),
        pytest.param("mvsa", f"bert,image,concatbert,{FEW}", 0.55, marks=pytest.mark.slow),
        pytest.param("sunrgbd", FEW, 0.3, marks=pytest.mark.slow),
    ],
)
def test_methods_are_well_above_chance_on_a_sample(name, methods, least, tmp_path, capsys):
    assert main(["sample", name, str(tmp_path / "data"), "--image-size", "36"]) == 0
    runs = str(tmp_path / "runs")
    options = ["--quick", "--method", methods, "--data-root", str(tmp_path / "data")]
    assert main(["train", name, *options, "--output", runs]) == 0
    assert main(["evaluate", runs, "--levels", "0", "--noise", "gaussian", "--output", str(tmp_path / "tested")]) == 0
    cells = json.loads((tmp_path / "tested" / "results.json").read_text())["cells"]
    accuracies = {cell["method"]: cell["mean"] for cell in cells}
    assert set(accuracies) == set(methods.split(","))
    assert least > 1.5 / len(DATA_SETS[name].classes)
    assert min(accuracies.values()) > least, accuracies
