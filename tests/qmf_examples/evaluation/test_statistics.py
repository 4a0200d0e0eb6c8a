"""The correlation of weight and loss, against NumPy's."""

import numpy as np
import pytest
import torch

from qmf_examples.evaluation.statistics import correlation


def test_it_is_the_mean_of_each_views_correlation():
    rng = np.random.default_rng(0)
    weights, losses = rng.normal(size=(3, 50)), rng.normal(size=(3, 50))
    expected = np.mean([np.corrcoef(w, x)[0, 1] for w, x in zip(weights, losses, strict=True)])
    assert correlation(torch.tensor(weights), torch.tensor(losses)) == pytest.approx(expected, abs=1e-12)


def test_it_leaves_out_views_whose_weights_do_not_vary():
    weights = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]])
    losses = torch.tensor([[1.0, 5.0, 2.0], [1e-9, 2e-9, 3e-9]])
    assert correlation(weights, losses) == pytest.approx(1.0)
    assert correlation(weights[:1], losses[:1]) is None
