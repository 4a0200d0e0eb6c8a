"""Heads that break: the training stops and says so, and neither evaluation nor a comparison gives figures of them."""

import math

import pytest
import torch

from qmf_examples.cli import main
from qmf_examples.comparison.compare import score
from qmf_examples.comparison.digits import TABLE, run_digits
from qmf_examples.comparison.heads import Config, train_heads
from qmf_examples.comparison.prepared import DIGITS, prepare
from qmf_examples.data.digits import load_digits
from qmf_examples.errors import CommandError
from qmf_examples.models.divergence import DivergenceWatch, weights_not_finite
from qmf_examples.models.learners import Answer, Head, LateFusion, QualityAware
from qmf_examples.training.run import train_run
from qmf_examples.training.settings import QUICK, resolve
from qmf_fusion import QualityAwareFusion

NAN, INF = math.nan, math.inf


@pytest.mark.filterwarnings("ignore:.* rows of modality .* count in training step")
@pytest.mark.parametrize(
    ("data_set", "method"),
    [
        ("mvsa", "qmf"),
        ("nyud2", "late"),
        *(pytest.param(*at, marks=pytest.mark.slow) for at in (("mvsa", "bow"), ("nyud2", "robust"), ("nyud2", "tmc"))),
    ],
)
def test_a_training_that_diverges_is_one_line_and_leaves_no_figures(data_set, method, sample, tmp_path, capsys):
    arguments = ["train", data_set, "--quick", "--method", method, "--data-root", str(sample(data_set))]
    assert main([*arguments, "--learning-rate", "1e20", "--output", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"qmf-fusion: error: {method}, seed 1: the training has diverged in epoch 1: ")
    assert "look at the learning rate (1e+20), the precision and the values of the inputs" in line
    run = tmp_path / method / "seed1"
    assert not [name for name in ("finished.json", "best.ckpt", "last.ckpt") if (run / name).exists()]
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "not finished" in capsys.readouterr().err


def test_a_divergence_in_a_later_epoch_leaves_the_last_good_checkpoints(sample, tmp_path):
    layers = [QUICK, {"data_root": str(sample("nyud2")), "method": "qmf", "limit_batches": 2}]
    train_run(resolve("nyud2", *layers, {"epochs": 1}), tmp_path)
    before = [(tmp_path / name).read_bytes() for name in ("best.ckpt", "last.ckpt")]
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    state["optimizer_states"][0]["param_groups"][0]["lr"] = 1e25
    torch.save(state, tmp_path / "last.ckpt")
    refused = pytest.raises(CommandError, match="diverged in epoch 2: ")
    with refused, pytest.warns(UserWarning, match="rows of modality 'rgb' count in training step"):
        train_run(resolve("nyud2", *layers, {"epochs": 2}), tmp_path, resume=True)
    assert (tmp_path / "best.ckpt").read_bytes() == before[0]
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["epoch"] == 0


@pytest.mark.parametrize("value", [NAN, INF])
@pytest.mark.parametrize("which", ["learner.classifier.0.weight", "running_var"])
def test_evaluation_refuses_weights_that_are_not_finite(value, which, sample, tmp_path, capsys):
    layers = [QUICK, {"data_root": str(sample("nyud2")), "method": "rgb", "limit_batches": 1, "epochs": 1}]
    run = tmp_path / "rgb" / "seed1"
    train_run(resolve("nyud2", *layers), run)
    state = torch.load(run / "best.ckpt", weights_only=True)
    name = next(name for name in state["state_dict"] if name.endswith(which))
    state["state_dict"][name].view(-1)[0] = value
    torch.save(state, run / "best.ckpt")
    assert main(["evaluate", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{run / 'best.ckpt'}: weights are not finite: {name.removeprefix('learner.')}; the training has" in line


def test_evaluation_refuses_scores_that_are_not_finite(sample, tmp_path, capsys):
    layers = [QUICK, {"data_root": str(sample("nyud2")), "method": "late", "limit_batches": 1, "epochs": 1}]
    run = tmp_path / "late" / "seed1"
    train_run(resolve("nyud2", *layers), run)
    state = torch.load(run / "best.ckpt", weights_only=True)
    for name in [name for name in state["state_dict"] if "depth.classifier" in name]:
        state["state_dict"][name].fill_(3e38)
    torch.save(state, run / "best.ckpt")
    assert main(["evaluate", str(tmp_path)]) == 1
    assert "late, seed 1, gaussian: logits are finite for no sample of depth (0 of 20)" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore:.* rows of modality .* count in training step")
@pytest.mark.parametrize("epochs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_every_training_of_the_digits_stops(epochs, tmp_path):
    data = prepare(load_digits(), DIGITS, 0)
    config = Config(seeds=(0,), epochs=epochs, learning_rate=1e20, checkpoint_every=1)
    for training in TABLE.trainings:
        with pytest.raises(CommandError, match=rf"{training.name}, seed 0.*(finite for no sample of|are not finite)"):
            score(train_heads(training, data, config, 0), training, TABLE, data, 0)
    with pytest.raises(CommandError, match=r"has diverged in epoch 1: .*; look at the learning rate \(1e\+20\)"):
        run_digits(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


def heads():
    return {name: Head(torch.nn.Identity(), torch.nn.Linear(2, 3)) for name in ("a", "b")}


def test_what_counts_as_broken_for_good():
    learner, fine = LateFusion(heads()), torch.zeros(4, 3)
    watch = DivergenceWatch()

    def problem(*answers, loss=None):
        for answer in answers:
            watch.add(answer, loss)
        return watch.problem(learner)

    one_row = fine.clone()
    one_row[1:] = NAN
    assert problem() is None
    assert problem(Answer(fine, (fine, fine)), loss=torch.tensor(1.0)) is None
    assert problem(Answer(fine, (fine, one_row))) is None  # some samples are bad: what fusion is for
    assert problem(Answer(fine, (fine, fine * NAN)), Answer(fine, (fine, fine))) is None
    assert problem(Answer(fine, (fine, fine + INF))) == "logits are finite for no sample of b (0 of 4)"
    assert problem(Answer(fine, (fine, fine))) is None  # counted anew
    assert problem(Answer(fine * NAN, (fine, fine))) == "the fused scores are finite for none of 4 samples"
    assert problem(Answer(torch.tensor([[0.0, -INF, 0.0]]))) is None  # the logarithm of a probability of 0
    assert problem(Answer(fine), Answer(fine), loss=torch.tensor(NAN)) == "the loss is finite in none of 2 steps"
    absent = torch.tensor([[True] * 4, [False] * 4])
    assert problem(Answer(fine, (fine, fine * NAN), present=absent)) is None  # none was expected
    mixed = torch.tensor([[True] * 4, [False, True, True, True]])
    assert problem(Answer(fine, (fine, one_row), present=mixed)) == "logits are finite for no sample of b (0 of 3)"
    with torch.no_grad():
        learner.heads["a"].classifier.bias[0] = INF
    assert problem(Answer(fine, (fine, fine))) == "weights are not finite: heads.a.classifier.bias"


def test_a_history_that_has_seen_nothing_is_no_broken_weight():
    learner = QualityAware(heads(), 4, {}, QualityAwareFusion(["a", "b"]))
    assert not torch.stack([x.isfinite().all() for x in learner.state_dict().values()]).all()
    assert weights_not_finite(learner) is None


def test_the_report_of_a_digits_run_refuses_broken_weights(quick_run, tmp_path, capsys):
    path = tmp_path / "checkpoints" / "seed3-qmf-paper.pt"
    path.parent.mkdir()
    state = torch.load(quick_run.output / "checkpoints" / path.name, weights_only=True)
    state["learner"]["model.heads.pixels.classifier.0.weight"][0] = NAN
    torch.save(state, path)
    assert main(["report", str(tmp_path), "--seed", "3"]) == 1
    assert "weights are not finite: model.heads.pixels.classifier.0.weight" in capsys.readouterr().err
