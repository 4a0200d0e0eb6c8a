"""Damage told from weights, against scikit-learn's area under the ROC curve."""

import pytest
import torch

from qmf_examples.evaluation.reliability import damage_detection

sklearn_metrics = pytest.importorskip("sklearn.metrics")


@pytest.mark.parametrize("scale", [1.0, 1e3, 1e-12])
def test_detection_is_the_area_under_the_roc_curve_by_modality(scale):
    generator = torch.Generator().manual_seed(0)
    weights = scale * torch.randn(3, 200, generator=generator).mul(4).round()  # with ties
    damaged = torch.rand(3, 200, generator=generator) < 0.4
    expected = [sklearn_metrics.roc_auc_score(hit, -w) for w, hit in zip(weights, damaged, strict=True)]
    assert damage_detection(weights, damaged) == pytest.approx(sum(expected) / 3)


def test_modalities_that_are_never_or_always_damaged_say_nothing():
    weights = torch.tensor([[0.2, 0.8], [0.5, 0.5], [0.9, 0.1]])
    damaged = torch.tensor([[True, False], [False, False], [True, True]])
    assert damage_detection(weights, damaged) == 1
    assert damage_detection(weights, torch.zeros(3, 2, dtype=torch.bool)) is None
    assert damage_detection(torch.ones(1, 2), damaged[:1]) == 0.5
