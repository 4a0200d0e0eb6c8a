"""The kernels' benchmark on a CPU: it runs in the interpreter, checks what it times, and judges by the targets."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from qmf_kernels.benchmarks import contenders, measure, objective, report
from qmf_kernels.benchmarks.plain import plain_objective, reference_step

from ..qmf_fusion import reference

ROOT = Path(__file__).parents[2]
LARGE, SMALL = (next(case for case in objective.CASES if case.kind == kind) for kind in ("large", "small"))
GROWTH = [case for case in objective.CASES if case.kind == "growth"]
CPU = torch.device("cpu")


def tiny(dtype=torch.float64, modalities=3):
    return contenders.Case("tiny", "small", modalities, 6, 5, 9, dtype)


def test_runs_in_the_interpreter(tmp_path):
    pytest.importorskip("triton", minversion="3.6")
    pytest.importorskip("matplotlib")
    names = ["ours", "released", "eager", "copy"]
    command = [sys.executable, "-m", "qmf_kernels.benchmarks.objective", "--device", "cpu", "--repeats", "2"]
    done = subprocess.run(
        [*command, "--cases", "mvsa", "growth-2", "--contenders", *names, "--out", str(tmp_path / "new")],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "failed" not in done.stdout
    assert "nothing judged" in done.stdout
    assert (tmp_path / "new" / "objective-cpu.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "new" / "objective-cpu.json").read_text())
    assert written["torch"] == torch.__version__
    assert written["targets"] == []
    small, growth = written["cases"]
    assert [row["name"] for row in small["rows"]] == names
    assert [row["name"] for row in growth["rows"]] == ["ours", "copy"]
    for row in small["rows"]:
        assert row["failed"] is None
        assert row["device"] > 0
        assert row["bytes_per_second"] == pytest.approx(small["least_bytes"] / row["device"])
        assert row["name"] == "copy" or row["error"] < 1e-5


def test_every_kernel_is_counted_as_ours():
    sources = (ROOT / "kernels" / "qmf_kernels" / "triton_kernels").glob("*.py")
    found = {name for path in sources for name in re.findall(r"^def (\w+_kernel)\(", path.read_text(), re.MULTILINE)}
    assert found == objective.KERNELS


def test_the_reference_is_the_objective():
    problem = contenders.make_problem(tiny(), CPU)
    index = problem.indices[0]
    loss, grads, after = reference_step(problem.logits, problem.target, index, problem.sums)
    low, high = torch.aminmax(problem.sums, dim=1, keepdim=True)
    kappa = ((problem.sums - low) / (high - low))[:, index]
    rows = [x.detach().requires_grad_() for x in problem.logits]
    expected = reference.objective(rows, problem.target, kappa, form="released")["loss"]
    torch.testing.assert_close(loss, expected.item(), rtol=1e-12, atol=0)
    for grad, row in zip(grads, torch.autograd.grad(expected, rows), strict=True):
        torch.testing.assert_close(grad, row, rtol=1e-11, atol=1e-13)
    added = torch.zeros_like(after).index_add(1, index, reference.sample_losses(rows, problem.target))
    torch.testing.assert_close(after, problem.sums + added)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["ours", "released", "eager"])
def test_contenders_compute_the_same(name, dtype):
    make = contenders.contenders("torch")[name]
    # The released formulation takes the margins to float32 whatever the logits are.
    tolerance = 1e-6 if name == "released" and dtype == torch.float64 else objective._TOLERANCE[dtype]
    assert objective.check_step(make, contenders.make_problem(tiny(dtype), CPU)) <= tolerance


def test_later_batches_meet_the_history_of_earlier_ones():
    problem = contenders.make_problem(tiny(), CPU)
    step = contenders.plain(problem, None)
    step.run(0)
    _, _, after = reference_step(problem.logits, problem.target, problem.indices[1], step.sums())
    loss, _ = step.run(1)
    assert loss.item() != plain_objective(problem.logits, problem.target, problem.indices[1], problem.sums).item()
    torch.testing.assert_close(step.sums(), after)


def test_what_computes_something_else_is_not_timed():
    def wrong(problem):
        step = contenders.plain(problem, None)
        return step._replace(run=lambda batch: (step.run(batch)[0] * 1.01, step.run(batch)[1]))

    def broken(problem):
        raise torch.OutOfMemoryError("tried to allocate too much\nand more")

    makers = {"wrong": wrong, "broken": broken, "eager": contenders.contenders(None)["eager"]}
    case = tiny(torch.float32)
    errors = objective.check(case, makers, CPU)
    assert errors["wrong"].startswith("wrong: its error against float64 is")
    assert errors["broken"] == "OutOfMemoryError: tried to allocate too much"
    outcome = objective.run_case(case, makers, 2, CPU, errors)
    assert outcome.rows["wrong"].failed == errors["wrong"]
    assert outcome.rows["wrong"].device is None
    assert outcome.rows["eager"].failed is None
    assert "failed: OutOfMemoryError" in report.table(outcome)


def test_a_failure_while_timing_leaves_the_others():
    calls = []

    def fail(batch):
        calls.append(batch)
        if len(calls) == 2:
            raise RuntimeError("second time")

    times = measure.time_steps({"fails": fail, "works": lambda batch: None}, 4, 3, CPU)
    assert times["fails"] == "RuntimeError: second time"
    assert calls == [0, 1]
    assert len(times["works"].host) == len(times["works"].device) == 4


def test_launches_are_sorted_by_kind_and_owner():
    events = [
        {"cat": "kernel", "name": "forward_kernel"},
        {"cat": "kernel", "name": "forward_kernel"},
        {"cat": "kernel", "name": "vectorized_elementwise_kernel<4>"},
        {"cat": "gpu_memcpy", "name": "Memcpy DtoH"},
        {"cat": "gpu_memset", "name": "Memset"},
        {"cat": "gpu_user_annotation", "name": "Torch-Compiled Region"},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel"},
        {"name": "process_name", "ph": "M"},
    ]
    launches = measure.sort_launches(events, objective.KERNELS)
    assert launches[:3] == (3, 2, 2)
    assert launches.names["forward_kernel"] == 2


def row(name, device, host=None, kernels=3, ours=3, peak=0):
    launches = measure.Launches(kernels, ours, 0, {})
    return report.Row(name, device, device if host is None else host, device, launches, peak, None, None)


def outcome(case, rows, replay=None):
    return report.Outcome(case, {r.name: r for r in rows}, replay)


def large(ours=1.0, copy=0.9, eager=6.0, compiled=(2.0, 1.6), launches=3, share=0.005):
    peak = int(share * 2 * LARGE.modalities * LARGE.batch * LARGE.classes * LARGE.dtype.itemsize)
    rows = [row("ours", ours, ours=launches, peak=peak), row("copy", copy), row("eager", eager)]
    return outcome(LARGE, [*rows, row("compiled", compiled[0]), row("compiled, no graphs", compiled[1])])


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, None),
        ({"copy": 0.84}, "copy's bytes"),
        ({"eager": 4.9}, "as fast as eager"),
        ({"compiled": (2.0, 1.4)}, "torch.compile"),
        ({"launches": 4}, "launches"),
        ({"share": 0.011}, "peak memory"),
    ],
)
def test_large_targets(changed, missed):
    verdicts = report.judge([large(**changed)])
    assert len(verdicts) == 5
    assert [verdict.target for verdict in verdicts if not verdict.met] == [
        verdict.target for verdict in verdicts if missed and missed in verdict.target
    ]
    assert all(verdict.met is not None for verdict in verdicts)
    assert report.verdict_lines(verdicts).count("MISSED") == (missed is not None)


@pytest.mark.parametrize(
    ("released", "replay", "met"),
    [(20.5, (2.9, 1.0), [True, True]), (19.5, (3.1, 1.0), [False, False]), (20.5, None, [True, None])],
)
def test_small_targets(released, replay, met):
    rows = [row("ours", 9.0, host=1.0), row("released", 1.0, host=released)]
    assert [verdict.met for verdict in report.judge([outcome(SMALL, rows, replay)])] == met


def test_a_target_whose_contender_failed_is_not_told():
    failed = report.make_row("released", "RuntimeError: no", None, None, None)
    (ratio, _) = report.judge([outcome(SMALL, [row("ours", 1.0), failed])])
    assert ratio.met is ratio.found is None


def test_growth_targets():
    outcomes = [outcome(case, [row("ours", case.modalities * 1.0)]) for case in GROWTH]
    assert [verdict.met for verdict in report.judge(outcomes)] == [True, True]
    outcomes[-1] = outcome(GROWTH[-1], [row("ours", GROWTH[-1].modalities * 1.2, kernels=4)])
    assert [verdict.met for verdict in report.judge(outcomes)] == [False, False]


def test_medians_and_deciles():
    times = measure.Times([5.0, 1.0, 2.0], [7.0, 9.0, 8.0])
    found = report.make_row("x", times, None, None, None)
    assert (found.device, found.host, found.slow) == (2.0, 8.0, 5.0)


def test_json_holds_every_figure():
    written = json.loads(json.dumps(report.as_json({"device": "x"}, 3, [large()], report.judge([large()]))))
    (case,) = written["cases"]
    assert case["least_bytes"] == 3 * 3 * 65_536 * 1000 * 2
    ours = case["rows"][0]
    assert ours["fraction_of_copy"] == pytest.approx(0.9)
    assert ours["launches"]["ours"] == 3
    assert len(written["targets"]) == 5


def test_pictures_without_matplotlib_say_what_to_install(monkeypatch, tmp_path):
    from qmf_kernels.benchmarks.picture import draw

    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw([large()], "", tmp_path / "x.png")


def test_unknown_cases_are_refused(capsys):
    with pytest.raises(SystemExit):
        objective.main(["--cases", "huge"])
    assert "growth-8" in capsys.readouterr().err
