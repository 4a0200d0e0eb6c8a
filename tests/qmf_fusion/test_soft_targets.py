"""Targets that are probabilities, in QMFLoss as in torch.nn.CrossEntropyLoss."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.functional import qmf_objective

RULES = {
    "energy": lambda dim: QualityAwareFusion(2, class_dim=dim),
    "normalize": lambda dim: QualityAwareFusion(2, normalize=True, class_dim=dim),
    "probabilities": lambda dim: QualityAwareFusion(2, combine="probabilities", class_dim=dim),
    "robust": lambda dim: QualityAwareFusion.robust(2, 5, class_dim=dim),
}


def batch(dense=False, dtype=torch.float32):
    g = torch.Generator().manual_seed(1)
    shape = (6, 5, 4) if dense else (6, 5)
    logits = [(3 * torch.randn(shape, generator=g)).to(dtype).requires_grad_() for _ in range(2)]
    return logits, torch.softmax(2 * torch.randn(shape, generator=g), 1).to(dtype), torch.arange(6)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_cross_entropies_are_those_of_pytorch(rule, dense, weighted):
    logits, target, index = batch(dense)
    weight = torch.tensor([1.0, 0.5, 2.0, 0.0, 1.5]) if weighted else None
    fusion = RULES[rule](1 if dense else -1)
    out = QMFLoss(fusion, 6, weight=weight, label_smoothing=0.1)(logits, target, index)
    expected = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    rows = [fusion.rule.likelihood(x.movedim(1, -1)).movedim(-1, 1) for x in logits]
    torch.testing.assert_close(out.unimodal_losses, torch.stack([expected(x, target) for x in rows]))
    torch.testing.assert_close(out.fused_loss, expected(out.logits, target))
    plain = torch.stack([F.cross_entropy(x, target, reduction="none").flatten(1).mean(1) if dense else
                         F.cross_entropy(x, target, reduction="none") for x in rows])  # fmt: skip
    torch.testing.assert_close(out.sample_losses, plain)
    torch.testing.assert_close(out.loss, out.fused_loss + out.unimodal_losses.sum())  # no history yet
    out.loss.backward()
    assert all(torch.isfinite(x.grad).all() and x.grad.abs().sum() > 0 for x in logits)


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("update", ["after", "before"])
@pytest.mark.parametrize("count", [None, 1])
def test_one_hot_is_as_its_classes(rule, update, count):
    """Losses, gradients, ranking, history and statistics, with rows that are absent and rows that are broken."""
    results = []
    for soft in (False, True):
        fusion = RULES[rule](-1)
        criterion = QMFLoss(fusion, 6, update=update, sampling_count=count)
        present = torch.tensor([[True] * 6, [True, False] * 3])
        target = torch.tensor([0, 3, 1, 4, 4, 2])
        for step in range(3):
            logits, _, index = batch(dtype=torch.float64)
            with torch.no_grad():
                logits[0][4] = torch.nan
                logits[1] *= 1 + step
            given = F.one_hot(target, 5).double() if soft else target
            out = criterion(logits, given, index, present)
            out.loss.backward()
        results.append([*out, *(x.grad for x in logits), *criterion.buffers(), *fusion.buffers()])
    assert results[0][3] > 0
    torch.testing.assert_close(*results, equal_nan=True)


def test_of_the_stateless_form():
    logits, target, _ = batch()
    kappa = torch.rand(2, 6)
    out = qmf_objective(logits, target, kappa, label_smoothing=0.2)
    hard = qmf_objective(logits, target.argmax(-1), kappa)
    torch.testing.assert_close(out.ranking_loss, hard.ranking_loss)
    torch.testing.assert_close(out.fused_loss, nn.CrossEntropyLoss(label_smoothing=0.2)(out.logits, target))


def test_a_class_that_is_ruled_out_and_has_no_share_is_no_loss():
    logits = [torch.tensor([[0.0, 1.0, -torch.inf]]).requires_grad_() for _ in range(2)]
    out = QMFLoss(QualityAwareFusion(2), 1)(logits, torch.tensor([[0.3, 0.7, 0.0]]), torch.tensor([0]))
    out.loss.backward()
    torch.testing.assert_close(out.unimodal_losses, F.cross_entropy(
        torch.tensor([[0.0, 1.0]]), torch.tensor([[0.3, 0.7]])).expand(2).detach())  # fmt: skip
    assert torch.isfinite(logits[0].grad).all()


def test_ignore_index_does_not_apply_and_robust_counts_the_likeliest_class():
    logits, target, index = batch()
    fusion = RULES["robust"](-1)
    likeliest = int(target.argmax(-1)[0])
    QMFLoss(fusion, 6, ignore_index=likeliest)(logits, target, index)
    counts = fusion.rule.running.classes[0, 0, 0]
    assert counts.tolist() == torch.bincount(target.argmax(-1), minlength=5).tolist()


def test_gradients_reach_a_teacher():
    logits, target, index = batch()
    target = target.requires_grad_()
    QMFLoss(QualityAwareFusion(2), 6)(logits, target, index).loss.backward()
    assert target.grad.abs().sum() > 0


def test_compiles():
    logits, target, index = batch()
    criterion = QMFLoss(RULES["robust"](-1), 6)
    expected = QMFLoss(RULES["robust"](-1), 6)(logits, target, index)
    got = torch.compile(criterion, fullgraph=True, backend="eager")(logits, target, index)
    torch.testing.assert_close(tuple(got), tuple(expected))
    assert criterion.ranking.trajectory.count.sum() == 12


MULTI_HOT = torch.tensor([[1, 0, 1, 0, 0], [0, 1, 0, 0, 0]])
REFUSED = {
    "multi-hot, floating": (MULTI_HOT.float(), ValueError, "of sum 1 .*multi-hot is out of scope.*sums from 1 to 2"),
    "multi-hot, integers": (MULTI_HOT, ValueError, r"target.argmax .* several labels a sample \(multi-hot\) are out"),
    "multi-hot, bool": (MULTI_HOT.bool(), ValueError, r"several labels a sample \(multi-hot\) are out of scope"),
    "regression": (torch.rand(2), TypeError, r"regression is out of scope, .* the logits' shape \(2, 5\)"),
    "negative": (torch.tensor([[1.5, -0.5, 0, 0, 0]] * 2), ValueError, "at least 0"),
}  # fmt: skip


@pytest.mark.parametrize(("target", "error", "message"), REFUSED.values(), ids=REFUSED)
def test_targets_out_of_scope_are_refused_at_the_door(target, error, message):
    logits = [torch.randn(2, 5) for _ in range(2)]
    with pytest.raises(error, match=message):
        QMFLoss(QualityAwareFusion(2), 2)(logits, target, torch.arange(2))
    with pytest.raises(error, match=message):
        qmf_objective(logits, target, None)


def test_calibration_takes_classes():
    fusion, logits = QualityAwareFusion(2), torch.randn(2, 40, 5)
    with pytest.raises(
        TypeError, match=r"target must hold class indices here, got torch\.float32 of the logits' shape"
    ):
        fusion.calibrate(logits, torch.softmax(torch.randn(40, 5), -1))


def test_one_class_warns():
    with pytest.warns(UserWarning, match="one class, of which the softmax is always 1") as caught:
        QMFLoss(QualityAwareFusion(2), 3)([torch.randn(3, 1)] * 2, torch.zeros(3, dtype=torch.long), torch.arange(3))
    assert [w.filename for w in caught] == [__file__]
