"""The published code's variants, written out again in NumPy and loops, against the options that stand for them."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from qmf_fusion import LossTrajectory, QMFLoss, QualityAwareFusion
from qmf_fusion.functional import ranking_loss

from . import reference

NUM, CLASSES = 24, 4


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[2] / "examples" / "from_released_code.py"
    spec = importlib.util.spec_from_file_location("from_released_code", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def scaled(sums, index):
    """Over all samples, unseen ones at 0; None where that is 0 / 0."""
    low, high = sums.min(), sums.max()
    return None if high == low else (sums[index] - low) / (high - low)


def released_step(leaves, target, index, sums, ranking_weight, detach, record_first):
    """The loss of a batch and, in place, the sums; float64, one modality after the other."""
    w = torch.stack([-0.1 * reference.energy(x) for x in leaves])
    fused = reference.fuse(leaves, w.detach() if detach else w)
    loss = F.cross_entropy(fused, target) + sum(F.cross_entropy(x, target) for x in leaves)
    for m, x in enumerate(leaves):
        own = F.cross_entropy(x, target, reduction="none").detach().numpy()
        if record_first:
            sums[m][index.numpy()] += own
        kappa = scaled(sums[m], index.numpy())
        if kappa is not None:
            pairs = zip(range(len(index)), np.roll(range(len(index)), -1), strict=True)
            hinges = [reference.hinge("released", w[m, i], w[m, j], kappa[i], kappa[j]) for i, j in pairs]
            loss = loss + ranking_weight * sum(hinges) / len(index)
        if not record_first:
            sums[m][index.numpy()] += own
    return loss


@pytest.mark.parametrize("num_modalities", [2, 3])
@pytest.mark.parametrize("code", ["RGB-D", "text-image"])
def test_training_as_released(script, code, num_modalities):
    """Three epochs, in which most batches meet samples that others have not: sums are no multiple of means there."""
    text = code == "text-image"
    g = torch.Generator().manual_seed(0)
    history, sums = script.SummedLosses(NUM, num_modalities), np.zeros((num_modalities, NUM))
    ranked = 0.0
    for _ in range(3):
        for index in torch.randperm(NUM, generator=g).split(8):
            # Large, so that weights differ by more than histories do: only then is this form's hinge above 0.
            logits = 10 * torch.randn(num_modalities, 8, CLASSES, generator=g, dtype=torch.float64)
            target = torch.randint(CLASSES, (8,), generator=g)
            ours, theirs = ([x.clone().requires_grad_() for x in logits] for _ in range(2))
            weight = 1.0 if text else 0.1
            options = {"ranking_weight": weight, "detach_weights": text, "record_first": text}
            out = script.released_objective(ours, target, index, history, **options)
            expected = released_step(theirs, target, index, sums, weight, text, text)
            torch.testing.assert_close(out.loss, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)
            out.loss.backward()
            expected.backward()
            for x, y in zip(ours, theirs, strict=True):
                torch.testing.assert_close(x.grad, y.grad, rtol=1e-10, atol=1e-12)
            ranked += out.ranking_loss.item()
    assert ranked > 0
    torch.testing.assert_close(history.sums, torch.from_numpy(sums), rtol=1e-12, atol=0)


def test_script(script, capsys):
    assert script.main(["--epochs", "1"]) < 10
    assert "mean loss by modality" in capsys.readouterr().out


def test_own_history_ranks_as_sums_do_where_visits_are_equal(script):
    """After whole epochs the means of QMFLoss are the sums divided by one number, which scaling takes out."""
    criterion = QMFLoss(QualityAwareFusion(2), NUM, 0.1, form="released")
    sums = np.random.default_rng(0).random((2, NUM)) + 1
    criterion.ranking.trajectory.load_sums(sums, visits=7)
    index, target = torch.arange(NUM), torch.arange(NUM) % CLASSES
    leaves = list(torch.randn(2, NUM, CLASSES, dtype=torch.float64))
    out = criterion.eval()(leaves, target, index)
    expected = released_step(leaves, target, index, sums, 0.1, False, False)
    torch.testing.assert_close(out.loss, torch.as_tensor(expected), rtol=1e-12, atol=1e-12)


def test_logsumexp_with_an_epsilon():
    """As an uncertainty of one's own, with the published coefficients."""
    fusion = QualityAwareFusion(2, uncertainty=lambda x: -torch.log(x.exp().sum(-1) + 1e-3), alpha=-0.1, beta=0.0)
    logits = torch.randn(2, 6, CLASSES, dtype=torch.float64) - 5
    expected = torch.log(logits.exp().sum(-1) + 1e-3) / 10
    torch.testing.assert_close(fusion(logits).weights, expected, rtol=1e-14, atol=0)


def test_counts_of_correct_answers():
    """Moon et al.'s own history, more is better, and their own sign: ``margin`` of what is not right."""
    g = torch.Generator().manual_seed(0)
    confidence, right = (torch.rand(8, generator=g, dtype=torch.float64) for _ in range(2))
    pairs = [(i, (i + 1) % 8) for i in range(8)]
    hinges = [
        max(0.0, float(-torch.sign(right[i] - right[j]) * (confidence[i] - confidence[j]) + abs(right[i] - right[j])))
        for i, j in pairs
    ]
    got = ranking_loss(confidence, 1 - right, form="margin")
    torch.testing.assert_close(got, torch.tensor(sum(hinges) / 8, dtype=torch.float64))


class TestLoadSums:
    def test_of_numpy_arrays_with_unseen_samples(self):
        sums = [np.array([2.0, 0.0, 6.0]), np.array([4.0, 0.0, 1.0])]
        trajectory = LossTrajectory(3, 2, start_epoch=2)
        trajectory.load_sums(sums, visits=2)
        assert trajectory.count.tolist() == [[2, 0, 2]] * 2
        assert trajectory.visits.tolist() == [3, 0, 3]
        kappa = trajectory.kappa(torch.arange(3))
        assert kappa[:, 1].isnan().all()
        assert kappa[:, 0].tolist() == [0, 1]

    def test_of_visits_per_sample_and_recording_on(self):
        trajectory = LossTrajectory(3, 1)
        trajectory.load_sums(torch.tensor([[2.0, 0.0, 6.0]]), torch.tensor([2, 1, 3]))
        trajectory.record(torch.tensor([[4.0]]), torch.tensor([0]))
        assert trajectory.kappa(torch.arange(3), None).tolist() == [[2, 0, 2]]

    @pytest.mark.parametrize(
        ("sums", "visits", "message"),
        [
            ([[1.0, 2.0]], 1, r"sums must be \(1, 3\)"),
            ([[1.0, 2.0, 3.0]] * 2, 1, r"sums must be \(1, 3\)"),
            ([], 1, "sums must be"),
            ([[1.0, -2.0, 3.0]], 1, "sums must be finite"),
            ([[1.0, 2.0, torch.nan]], 1, "sums must be finite"),
            ([[1.0, 2.0, 3.0]], 0, "visits must be an integer"),
            ([[1.0, 2.0, 3.0]], torch.ones(2), "visits must be"),
            ([[1.0, 2.0, 3.0]], -torch.ones(3), "visits must be finite"),
        ],
    )
    def test_refuses(self, sums, visits, message):
        trajectory = LossTrajectory(3, 1)
        with pytest.raises(ValueError, match=message):
            trajectory.load_sums(sums, visits)
        assert not trajectory.count.any()
