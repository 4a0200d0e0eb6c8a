"""The benchmark of consistency terms runs, and the terms reach the training."""

import pytest
import torch

from qmf_examples.benchmarks.consistency import COLUMNS, TERMS, main, with_terms
from qmf_examples.comparison.heads import Config, untrained_heads
from qmf_examples.comparison.prepared import prepare_file
from qmf_examples.data.feature_files import load_npz

from ..comparison.test_robustness import write_features


def test_it_prints_a_row_for_each_rule_and_term(tmp_path, capsys):
    main([str(write_features(tmp_path / "scenes.npz")), "--seeds", "1", "--epochs", "1"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 + 2 * len(TERMS)
    assert all(line.count("|") == len(COLUMNS) + 4 for line in lines)


@pytest.mark.parametrize("rule", ["QMF, paper", "robust"])
def test_the_terms_are_in_the_loss(rule, tmp_path):
    data = prepare_file(load_npz(write_features(tmp_path / "scenes.npz")), 0)
    losses = {}
    for term, weights in TERMS.items():
        learner = untrained_heads(with_terms(rule, *weights), data, Config(hidden=16), 0)
        index = torch.arange(90)
        losses[term] = float(learner.loss(learner(data.train), data.train_labels, index).detach())
    assert losses["rise"] > losses["neither"]
    assert losses["disagreement"] > losses["neither"]
