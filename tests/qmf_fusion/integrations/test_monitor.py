"""What a monitor says is what one would count by hand."""

import pytest
import torch

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.correlation import pearson
from qmf_fusion.integrations import FusionMonitor

NAMES = ("a", "b")


def batches(dense=False):
    g = torch.Generator().manual_seed(0)
    for _ in range(3):
        logits = 2 * torch.randn(2, 8, 4, generator=g) if not dense else 2 * torch.randn(2, 8, 3, 4, generator=g)
        logits[1, 0] = torch.nan
        present = torch.ones(2, 8, dtype=torch.bool)
        present[0, :2] = False
        yield list(logits), torch.randint(4, logits.shape[1:-1], generator=g), torch.arange(8), present


@pytest.mark.parametrize("rule", ["energy", "robust"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dense", [False, True])
def test_counts_and_correlations(rule, training, dense):
    fusion = QualityAwareFusion(NAMES) if rule == "energy" else QualityAwareFusion.robust(NAMES, 4)
    criterion = QMFLoss(fusion, 8).train(training)
    fusion.train(training)
    weights, own, losses = [], [], []
    with FusionMonitor(criterion) as monitor:
        for logits, target, index, present in batches(dense):
            out = fusion(logits, present)
            scored = criterion(out, target, index)
            weights.append(out.weights.flatten(1))
            own.append(scored.weights.flatten(2).mean(2) if dense else scored.weights)
            losses.append(scored.sample_losses)
        assert monitor.compute(not training) == {}
        found = monitor.compute(training)
    fusion(logits)
    assert monitor.compute(training) == {}  # begun anew, and no longer watching
    weights, own, losses = (torch.cat(x, 1) for x in (weights, own, losses))
    counted = torch.ones(2, 3, 8, dtype=torch.bool)
    counted[0, :, :2] = counted[1, :, 0] = False
    for m, name in enumerate(NAMES):
        rows = counted[m].flatten().repeat_interleave(3 if dense else 1)
        w = weights[m][rows]
        assert found[f"weight/{name}"] == pytest.approx(float(w.mean()), rel=1e-5)
        assert found[f"absent/{name}"] == (0.25 if name == "a" else 0)
        assert found[f"broken/{name}"] == (0 if name == "a" else 0.125)
        some = counted[m].flatten()
        assert found[f"r/{name}"] == pytest.approx(float(pearson(own[m][some], losses[m][some])), abs=1e-6)
        if rule == "robust":
            assert found[f"p_clean_below_half/{name}"] == pytest.approx(float((w < 0.5).float().mean()))
    assert ("p_clean_below_half/a" in found) == (rule == "robust")


def test_what_stands_for_many_is_not_seen():
    fusion = QualityAwareFusion(NAMES)
    with FusionMonitor(QMFLoss(fusion, 8)) as monitor:
        torch.func.vmap(lambda x: fusion(x).logits)(torch.randn(5, 2, 8, 4))
        assert monitor.compute() == {}
