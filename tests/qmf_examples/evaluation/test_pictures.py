"""Pictures: one style for a method in all of them, that print in black and white tells apart, on a page."""

import contextlib
import itertools

import pytest
import torch
from matplotlib.text import Text

from qmf_examples.comparison import accuracy_plot, robustness_plot, theory
from qmf_examples.comparison.digits import TABLE as DIGITS
from qmf_examples.comparison.figures import Line, Measures
from qmf_examples.comparison.results import Row
from qmf_examples.corruption.conditions import CLEAN, Condition
from qmf_examples.evaluation import paper_figures, pictures
from qmf_examples.evaluation.cells import summarise_runs
from qmf_examples.evaluation.display import PAGE
from qmf_examples.evaluation.report import write_report
from qmf_examples.evaluation.styles import SAME, STYLES, style_of
from qmf_examples.evaluation.testing import NoisePlan
from qmf_examples.evaluation.testing import Tested as Record
from qmf_examples.models.methods import ABLATION, METHODS, RECOMMENDED, ROBUSTNESS
from qmf_examples.training.settings import resolve
from qmf_fusion import QualityAwareFusion, fusion_report

PLAN = NoisePlan(("gaussian", "salt-pepper"), (0.0, 10.0))


@contextlib.contextmanager
def instead_of_files():
    """Figures by their file's name."""
    found = {}
    with pytest.MonkeyPatch.context() as patched:
        for module in (pictures, paper_figures, accuracy_plot, robustness_plot, theory):
            patched.setattr(module, "save_figure", lambda figure, path, *_: found.update({path.name: figure}))
        yield found


@pytest.fixture
def drawn():
    with instead_of_files() as found:
        yield found


@pytest.fixture(scope="module")
def all_figures(tmp_path_factory):
    with instead_of_files() as found:
        draw_all(tmp_path_factory.mktemp("all"))
    return found


def record(method, seed, level, accuracy, **changes):
    run = resolve("nyud2", {"method": method, "seed": seed, "data_root": "x", **changes})
    right = bytes(n < round(100 * accuracy) for n in range(100))
    return Record(run, Condition("gaussian", level), accuracy, 0.1, 0.2, None, None, None, right)


def runs(methods=("rgb", "late", "qmf", "robust"), **changes):
    found = [
        record(m, seed, level, 0.8 - level / 20, **changes) for m in methods for seed in (1, 2) for level in PLAN.levels
    ]
    found += [run._replace(condition=Condition("salt-pepper", run.condition.level)) for run in found]
    weights = [torch.full((2, 5), 0.5) + 1e-9 * torch.arange(5), torch.arange(10.0).view(2, 5) * 1e7]
    return [
        run._replace(weights=weights[0], losses=weights[1], correlation=-0.5)
        if run.settings.method in ("qmf", "robust")
        else run
        for run in found
    ]


def draw_all(tmp_path):
    """Every picture of the evaluation, the digits and the bench."""
    write_report(runs(), PLAN, tmp_path)
    rows = [
        Row(method.label, *c, 0.7, 0.1, 0.6, None, (0, 1), (0.6, 0.8), (None, None))
        for method in DIGITS.methods
        for c in (("clean", 0.0), ("gaussian", 1.0), ("occlusion", 2.0), ("salt-and-pepper", 0.5))
    ]
    units = {"gaussian": "deviation", "occlusion": "side of the square in pixels (of 8)", "salt-and-pepper": "share"}
    accuracy_plot.plot_accuracy(tmp_path / "digits.png", rows, DIGITS.methods, units, "Digits")
    measures = Measures(70.0, 1.0, "clean", 1.0, 1.0, None)
    for name, methods in (("bench.png", ROBUSTNESS.methods), ("ablation.png", ABLATION.methods)):
        lines = [
            Line(m.label, measures, 60.0, {"clean": 70.0, "noise": 60.0}, {}, {"clean": -0.5, "noise": None})
            for m in methods
        ]
        robustness_plot.plot(tmp_path / name, lines, "a set, half of the views damaged, " * 4)


def test_each_method_has_a_style_of_its_own_in_black_and_white():
    every = {method.name for method in (*METHODS.values(), *DIGITS.methods, *ROBUSTNESS.methods, *ABLATION.methods)}
    assert {SAME.get(name, name) for name in every} == set(STYLES)
    for one, other in itertools.combinations(STYLES, 2):
        assert STYLES[one][1:4] != STYLES[other][1:4], f"{one} and {other} look alike"
    assert style_of("of another package") == style_of("of another package")


def test_the_recommended_rule_is_highlighted():
    ours, *others = (STYLES[name] for name in sorted(STYLES, key=lambda name: name != RECOMMENDED))
    assert ours.width > 2 * max(other.width for other in others)
    assert ours.options()["zorder"] > max(other.options()["zorder"] for other in others)


def test_a_method_looks_the_same_in_every_picture(all_figures):
    seen = {}
    for name, figure in all_figures.items():
        for legend in figure.legends:
            for text, line in zip(legend.get_texts(), legend.get_lines(), strict=True):
                look = (line.get_color(), line.get_marker(), line.get_linestyle(), line.get_markerfacecolor())
                seen.setdefault(text.get_text(), {}).setdefault(look, []).append(name)
    assert {name for looks in seen.values() for places in looks.values() for name in places} == {
        *("accuracy.png", "gaps.png", "correlations.png", "digits.png", "bench.png", "ablation.png")
    }
    assert all(len(looks) == 1 for looks in seen.values()), seen
    assert len(seen[RECOMMENDED].popitem()[1]) == 6
    # What is drawn is what the legend says.
    axis = all_figures["bench.png"].axes[0]
    colours = {line.get_color() for line in axis.lines}
    assert colours == {style_of(name).color for name in robustness_plot.SHOWN}


def test_published_curves_are_in_the_legend(tmp_path, drawn):
    pictures.plot_noise(tmp_path / "x.png", summarise_runs(runs()), PLAN, "nyud2")
    (legend,) = drawn["x.png"].legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:4] == ["rgb", "late", "qmf", "robust"]
    assert {"rgb, published", "late, published", "qmf, published"} <= set(names)
    assert "robust, published" not in names


def test_every_picture_fits_a_page_with_all_its_text_and_no_offset(all_figures):
    given = [torch.full((4, 3), 5.0) + 1e-9 * torch.randn(4, 3, generator=torch.manual_seed(0)) for _ in range(6)]
    report = fusion_report(QualityAwareFusion(6), given, torch.arange(4) % 3)
    for m, (weights, losses) in enumerate(report._points):
        report._points[m] = (weights, losses + 1e7)
    figures = {**all_figures, "report": report.plot(title="clean")}
    for name, figure in figures.items():
        figure.draw_without_rendering()
        assert figure.get_figwidth() <= PAGE, name
        ticks = {t for axis in figure.axes for t in (*axis.get_xticklabels(), *axis.get_yticklabels())}
        for text in figure.findobj(Text):
            assert text.get_fontsize() >= 8, f"{name}: {text}"
            if text.get_text() and text not in ticks:  # of ticks, some lie outside of what is shown
                box = text.get_window_extent()
                assert -1 <= box.x0 <= box.x1 <= figure.bbox.x1 + 1, f"{name}: {text}"
                assert -1 <= box.y0 <= box.y1 <= figure.bbox.y1 + 1, f"{name}: {text}"
        for axis in figure.axes:
            assert not axis.xaxis.get_offset_text().get_text(), name
            assert not axis.yaxis.get_offset_text().get_text(), name
            printed = [label.get_text() for label in axis.get_yticklabels() if label.get_text()]
            assert len(set(printed)) == len(printed), f"{name}: {printed}"


@pytest.mark.parametrize(("image_encoder", "said"), [("tiny", True), ("resnet18", False)])
def test_tiny_networks_are_in_every_title(image_encoder, said, tmp_path, drawn, capsys):
    write_report(runs(image_encoder=image_encoder), PLAN, tmp_path)
    assert len(drawn) == 4
    for figure in drawn.values():
        assert ("tiny networks" in figure.get_suptitle()) == said


def test_a_reports_scatter_names_its_damage(tmp_path, drawn):
    logits = [torch.randn(20, 3, generator=torch.manual_seed(m)) for m in range(2)]
    report = fusion_report(QualityAwareFusion(2), logits, torch.arange(20) % 3)
    conditions = (CLEAN, Condition("gaussian", 0.2), Condition("gaussian", 0.8))
    theory.write([theory.LevelReport(condition, report) for condition in conditions], tmp_path, "qmf-paper", 3)
    titles = {name: figure.get_suptitle() for name, figure in drawn.items()}
    assert titles == {
        "theory-qmf-paper-seed3-clean.png": "qmf-paper, seed 3, test split: clean",
        "theory-qmf-paper-seed3-gaussian.png": "qmf-paper, seed 3, test split: gaussian 0.8, half of the views damaged",
    }
