"""The registry: every method of every table builds, answers what it should, and has a name of its own."""

import pytest
import torch

from qmf_examples.models.feature_heads import feature_heads
from qmf_examples.models.methods import ABLATION, METHODS, ROBUSTNESS, Frozen, Fused, digits_table, oracle
from qmf_examples.training.settings import ABLATION as ABLATION_ROWS
from qmf_examples.training.settings import METHODS as ROWS
from qmf_fusion import QualityAwareFusion
from qmf_fusion.rules import RULES

WIDTHS = {"a": 4, "b": 5}
TABLES = {"digits": digits_table(tuple(WIDTHS)), "robustness": ROBUSTNESS, "ablation": ABLATION}


@pytest.fixture
def views():
    return {name: torch.randn(6, width) for name, width in WIDTHS.items()}


@pytest.mark.parametrize("table", TABLES.values(), ids=list(TABLES))
def test_every_method_trains_and_answers_from_its_heads(table, views):
    labels, index = torch.tensor([0, 1, 2, 0, 1, 2]), torch.arange(6)
    corrupted = torch.tensor([[True, False] * 3, [False, True] * 3])
    learners = {}
    for training in table.trainings:
        learner = learners[training] = training.build(feature_heads(WIDTHS, 3, 6, 8, seed=0, steps=10))
        learner.loss(learner(views), labels, index).backward()
        assert all(p.grad is not None for p in learner.parameters()), training.name
        learner.eval()
    for method in table.methods:
        learner = learners[table.training(method)]
        with torch.no_grad():
            answer = learner(views)
            clean = answer.unimodal_logits
            fused = method.answer(Frozen(answer, corrupted, best=0, clean=clean, labels=labels))
        assert isinstance(fused, Fused)
        assert fused.scores.shape == (6, 3)
        assert fused.scores.isfinite().all()
        assert fused.weights is None or fused.weights.shape == (2, 6)
    shown = [method.label for method in table.methods]
    assert len(set(shown)) == len(shown)
    assert [method.role for method in table.methods].count("oracle") == 1


def test_the_bench_has_every_published_rule(views):
    table = {method.name: method for method in ROBUSTNESS.methods}
    assert set(RULES) <= set(table)
    learner = ROBUSTNESS.heads.build(feature_heads(WIDTHS, 3, 6, 8, seed=0, steps=10)).eval()
    answer, clean, labels = learner(views), torch.randn(2, 9, 3), torch.arange(9) % 3
    given = Frozen(answer, torch.zeros(2, 6), 0, tuple(clean), labels)
    untrained = [name for name in RULES if table[name].training is None]
    assert untrained == ["product_of_experts", "noisy_or", "entropy_weights"]
    for name in untrained:
        fusion = QualityAwareFusion(2, combine=name)
        if name == "noisy_or":  # what entropy is typical is measured on what the heads were trained on
            fusion.calibrate(list(clean), labels)
        expected, got = fusion(given.logits), table[name].answer(given)
        torch.testing.assert_close(got.scores, expected.logits, rtol=0, atol=0)
        torch.testing.assert_close(got.weights, expected.weights, rtol=0, atol=0)
    assert 0 < table["noisy_or"].answer(given).weights.min() < 1


def test_noisy_or_of_heads_that_fit_their_training_set_stays_uncalibrated(views):
    """As linear heads do of a small set: what they say of it is typical of nothing else, which ends no bench."""
    learner = ROBUSTNESS.heads.build(feature_heads(WIDTHS, 3, 6, 8, seed=0, steps=10)).eval()
    labels = torch.arange(60) % 3
    clean = (20 * torch.eye(3)[labels],) * 2
    given = Frozen(learner(views), torch.zeros(2, 6), 0, clean, labels)
    noisy_or = next(method for method in ROBUSTNESS.methods if method.name == "noisy_or")
    fusion = QualityAwareFusion(2, combine="noisy_or")
    with pytest.raises(ValueError, match="held-out data"):
        fusion.calibrate(clean, labels)
    torch.testing.assert_close(noisy_or.answer(given).scores, fusion(given.logits).logits, rtol=0, atol=0)
    with pytest.raises(IndexError):  # any other fault is told
        noisy_or.answer(given._replace(labels=labels + 1))


def test_rules_share_the_heads_of_a_training():
    names = [training.name for training in TABLES["digits"].trainings]
    assert names == ["unimodal", "qmf-no-ranking", "qmf-paper", "qmf-margin", "qmf-released", "logitnorm", "robust"]
    assert len(ROBUSTNESS.trainings) < len(ROBUSTNESS.methods)


def test_every_row_of_the_papers_tables_is_a_trained_method():
    for rows in (*ROWS.values(), ABLATION_ROWS):
        assert all(METHODS[name].training is not None for name in rows)
    assert all(set(RULES) <= set(rows) for rows in ROWS.values())


def test_the_oracle_drops_what_is_corrupted():
    logits = torch.randn(2, 6, 3)
    corrupted = torch.tensor([[True, False] * 3, [False, True] * 3])
    corrupted[:, 5] = True

    class Given:
        pass

    given = Given()
    given.logits, given.corrupted = logits, corrupted
    fused = oracle(given)
    clean = torch.where(corrupted[0].unsqueeze(-1), logits[1], logits[0]).softmax(-1)
    torch.testing.assert_close(fused.scores[:5].softmax(-1), clean[:5])
    torch.testing.assert_close(fused.weights[:, :5], (~corrupted[:, :5]).float())
    torch.testing.assert_close(
        fused.scores[5].softmax(-1), logits[:, 5].softmax(-1).mean(0)
    )  # told that none is clean: all
