"""Consistency terms against their definitions and by their gradients."""

import pytest
import torch
import torch.nn.functional as F

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_fusion.consistency import consistency_terms

from .test_rules import RULES
from .test_subsets import heads


def definition(fusion, logits, present):
    """Sample by sample."""
    rises, apart = [], []
    for n in range(logits.shape[1]):
        there = present[:, n].nonzero()[:, 0].tolist()
        if len(there) < 2:
            continue
        x = logits[:, n : n + 1]
        full = fusion(x, present=present[:, n]).logits.softmax(-1)
        rise, divergence = 0.0, 0.0
        for m in there:
            less = present[:, n].clone()
            less[m] = False
            partial = fusion(x, present=less).logits.softmax(-1)
            rise += max(0.0, float(partial.max() - full.max()))
            divergence += float(F.kl_div(partial.log(), full, reduction="sum"))
        rises.append(rise)
        apart.append(divergence / len(there))
    return sum(rises) / len(rises), sum(apart) / len(apart)


@pytest.mark.parametrize("rule", ["default", *RULES])
def test_terms_are_the_definitions(rule):
    fusion = QualityAwareFusion(3) if rule == "default" else RULES[rule](3, 4)
    logits = heads()
    present = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    terms = consistency_terms(fusion, logits, present)
    assert [float(t) for t in terms] == pytest.approx(definition(fusion, logits, present), abs=1e-9)


def test_gradients_are_right_and_the_full_answer_is_a_teacher():
    fusion = QualityAwareFusion(2, combine="probabilities")
    rows = [x.clone().requires_grad_() for x in heads(2, 5, 3)]
    assert torch.autograd.gradcheck(lambda *r: consistency_terms(fusion, r).rise, rows)
    sure = torch.tensor([[9.0, 0.0]], requires_grad=True)
    other = torch.tensor([[0.0, 1.0]], requires_grad=True)
    consistency_terms(QualityAwareFusion(2), [sure, other]).disagreement.backward()
    # The answer by the other alone is drawn to the full one, class 0.
    assert other.grad[0, 0] < 0 < other.grad[0, 1]


def trained(factor):
    """The terms after a short training of logits on Eq. 18 and ``factor`` times the terms."""
    logits = [x.clone().requires_grad_() for x in heads(2, 30)]
    fusion = QualityAwareFusion.robust(2, 4)
    criterion = QMFLoss(fusion, 30)
    optimizer = torch.optim.Adam(logits, lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        terms = consistency_terms(fusion, logits)
        loss = criterion(logits, torch.arange(30) % 4, torch.arange(30)).loss
        (loss + factor * (terms.rise + terms.disagreement)).backward()
        optimizer.step()
    return [term.item() for term in consistency_terms(fusion, logits)]


def test_training_on_the_terms_lowers_them():
    without, beside = trained(0), trained(10)
    assert all(0 <= less < more for less, more in zip(beside, without, strict=True))


def test_samples_of_one_modality_and_broken_ones_do_not_count():
    fusion, logits = QualityAwareFusion(2), heads(2, 6)
    broken = logits.clone()
    broken[0, 3:] = torch.nan
    broken.requires_grad_()
    terms = consistency_terms(fusion, broken)
    expected = consistency_terms(fusion, logits[:, :3])
    assert [t.item() for t in terms] == pytest.approx([t.item() for t in expected])
    (terms.rise + terms.disagreement).backward()
    assert bool(torch.isfinite(broken.grad).all())
    alone = consistency_terms(fusion, logits, torch.tensor([True, False]))
    assert [float(t) for t in alone] == [0.0, 0.0]
    single = consistency_terms(QualityAwareFusion(1), logits[:1])
    assert [float(t) for t in single] == [0.0, 0.0]


def test_dense_logits_and_ruled_out_classes():
    fusion = QualityAwareFusion(2, class_dim=1)
    x = heads(2, 12, 4).requires_grad_()
    dense = [v.view(3, 4, 4).movedim(-1, 1) for v in x]
    terms = consistency_terms(fusion, dense)
    flat = consistency_terms(QualityAwareFusion(2), x)
    assert [t.item() for t in terms] == pytest.approx([t.item() for t in flat])
    ruled = heads(2, 3)
    ruled[0, :, 2] = -torch.inf
    assert all(bool(torch.isfinite(t)) for t in consistency_terms(QualityAwareFusion(2), ruled))
    with pytest.raises(TypeError, match="fusion must be"):
        consistency_terms(None, x)


def test_a_sample_whose_modalities_rule_every_class_out_is_left_out():
    inf = torch.inf
    logits = [torch.tensor([[0.0, -inf], [0.0, 1.0]]), torch.tensor([[-inf, 0.0], [1.0, 0.0]]), torch.zeros(2, 2)]
    logits = [x.requires_grad_() for x in logits]
    fusion = QualityAwareFusion(3, alpha=-1.0, beta=1.0)
    terms = consistency_terms(fusion, logits)
    torch.testing.assert_close(terms, consistency_terms(fusion, [x[1:] for x in logits]))
    sum(terms).backward()
    assert all((x.grad[0] == 0).all() and x.grad.isfinite().all() for x in logits)
