"""What ``robust`` trains on and learns: class weights and ignored targets in its losses and in its statistics."""

import math

import pytest
import torch
import torch.nn.functional as F

from qmf_fusion import QMFLoss, QualityAwareFusion

K = 4
ODDS = 0.3 * (1 + math.exp(-3))  # nothing is untypical of a rule without statistics


def batch(n=12, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(n, K, generator=g, dtype=torch.float64) for _ in range(2)], torch.arange(n) % K


def expected_losses(heads, target, **options):
    """The documented losses, by PyTorch's own cross-entropy."""
    z = [torch.log(1 + torch.log1p(x.exp())) for x in heads]
    fused = sum(torch.log(K * torch.softmax(each, -1) + ODDS) for each in z)
    return F.cross_entropy(fused, target, **options), [F.cross_entropy(each, target, **options) for each in z]


@pytest.mark.parametrize("ignore_index", [-100, 2, 255])
@pytest.mark.parametrize("weight", [None, [1.0, 0.5, 3.0, 0.0]])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.2])
def test_losses_take_class_weights_smoothing_and_ignored_targets(ignore_index, weight, label_smoothing):
    heads, target = batch()
    target[[1, 4, 5]] = ignore_index
    weight = None if weight is None else torch.tensor(weight, dtype=torch.float64)
    options = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    criterion = QMFLoss(QualityAwareFusion.robust(2, K), 100, 0.0, **options)
    out = criterion(heads, target, torch.arange(12))
    fused, unimodal = expected_losses(heads, target, **options)
    torch.testing.assert_close(out.fused_loss, fused)
    torch.testing.assert_close(out.unimodal_losses, torch.stack(unimodal))
    torch.testing.assert_close(out.loss, fused + sum(unimodal))
    everything, _ = expected_losses(
        heads, torch.where(target == ignore_index, 0, target), weight=weight, label_smoothing=label_smoothing
    )
    assert abs(float(fused - everything)) > 1e-3


@pytest.mark.parametrize("ignore_index", [-100, 255])
def test_ignored_targets_count_in_no_statistics(ignore_index):
    heads, target = batch()
    fusions = [QualityAwareFusion.robust(2, K) for _ in range(2)]
    ignored = torch.zeros(12, dtype=torch.bool)
    ignored[[0, 3, 7]] = True
    odd = [torch.where(ignored[:, None], 50.0, x) for x in heads]
    criteria = [QMFLoss(fusion, 100, ignore_index=ignore_index) for fusion in fusions]
    for _ in range(3):
        criteria[0](odd, torch.where(ignored, ignore_index, target), torch.arange(12))
        criteria[1]([x[~ignored] for x in heads], target[~ignored], torch.arange(9))
    ours, theirs = (fusion.rule.running for fusion in fusions)
    torch.testing.assert_close(ours.classes, theirs.classes)
    torch.testing.assert_close(ours.measured, theirs.measured)
    # Three steps of 9 rows in each modality, of which each step's forgets a hundredth of those before.
    assert theirs.measured[:, 0, 0].tolist() == pytest.approx([9 * (1 + 0.99 + 0.99**2)] * 2)
    # A class's own forget 5 % for each sample of it that comes; of the four, 2, 3, 3 and 1 come with every step.
    kept = [n * (1 + 0.95**n + 0.95 ** (2 * n)) for n in (2, 3, 3, 1)]
    assert ours.classes[0, 0, 0].tolist() == pytest.approx(kept)


def test_a_batch_of_ignored_targets_teaches_nothing():
    heads, target = batch()
    fusion = QualityAwareFusion.robust(2, K)
    QMFLoss(fusion, 100)(heads, torch.full_like(target, -100), torch.arange(12))
    assert fusion.rule.statistics() is None
