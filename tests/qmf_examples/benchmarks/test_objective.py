"""The benchmark runs, prints a ratio per shape and times the same objective on both sides."""

import json

import pytest
import torch

from qmf_examples.benchmarks.objective import main
from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_kernels.benchmarks.released import LossHistory, released_objective


def test_prints_and_writes_a_ratio_per_shape(tmp_path, capsys):
    threads = torch.get_num_threads()
    try:
        main(["--shapes", "2,4,3,9", "1,5,2,5", "--repeats", "2", "--threads", "1", "--json", str(tmp_path / "b.json")])
    finally:
        torch.set_num_threads(threads)
    head, _, *rows = capsys.readouterr().out.splitlines()
    assert f"torch {torch.__version__}" in head
    assert "threads 1" in head
    written = json.loads((tmp_path / "b.json").read_text())
    assert [row["shape"] for row in written["rows"]] == [[2, 4, 3, 9], [1, 5, 2, 5]]
    for line, row in zip(rows, written["rows"], strict=True):
        expected = row["seconds"]["released"] / row["seconds"]["eager"]
        assert row["ratios"] == {"eager": pytest.approx(expected)}
        assert line.endswith(f"x{expected:.2f}")


@pytest.mark.parametrize("shape", ["2,4,3", "2,4,3,3", "0,4,3,9", "a,b,c,d"])
def test_refuses_shapes_that_are_none(shape, capsys):
    with pytest.raises(SystemExit):
        main(["--shapes", shape])
    assert "M,B,K,N" in capsys.readouterr().err


def test_both_sides_compute_the_same_loss():
    torch.manual_seed(0)
    logits, target, index = [torch.randn(8, 4) for _ in range(2)], torch.randint(4, (8,)), torch.randperm(20)[:8]
    histories = [LossHistory(20) for _ in range(2)]
    for history in histories:
        history.sums = torch.rand(20, dtype=torch.float64).numpy()
    ours = QMFLoss(QualityAwareFusion(2), 20, form="released")
    ours.ranking.trajectory.record(torch.stack([torch.from_numpy(h.sums) for h in histories]), torch.arange(20))
    for _ in range(2):
        expected = released_objective(logits, target, index, histories)
        torch.testing.assert_close(ours(logits, target, index).loss, expected)
        # The released code keeps sums, ours means: the same once every sample has been visited equally often.
        rest = torch.tensor([i for i in range(20) if i not in index.tolist()])
        losses = torch.rand(2, len(rest))
        ours.ranking.trajectory.record(losses, rest)
        for history, row in zip(histories, losses, strict=True):
            history.update(rest, row)
