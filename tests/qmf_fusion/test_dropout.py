"""Modality dropout: how often, never all, seeded, resumable, off in evaluation."""

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.dropout import ModalityDropout


def model(seed=0, **options):
    return FusionModel(
        {"a": nn.Linear(3, 4), "b": nn.Linear(3, 4), "c": nn.Linear(3, 4)},
        modality_dropout=0.4,
        dropout_seed=seed,
        **options,
    )


def inputs(n=5000):
    return {name: torch.randn(n, 3) for name in "abc"}


def test_rate_and_never_all():
    stays = ModalityDropout(0.4)(torch.ones(3, 20000, dtype=torch.bool))
    assert stays.any(0).all()
    # One of three is dropped with p, but not with the other two: p - p^3 / 3.
    assert stays.double().mean(1) == pytest.approx([1 - (0.4 - 0.4**3 / 3)] * 3, abs=0.015)
    both = (~stays[0] & ~stays[1]).double().mean()
    assert both == pytest.approx(0.4**2 - 2 / 3 * 0.4**3, abs=0.01)
    assert not torch.equal(stays[:, 1:], stays[:, :-1])


def test_an_absent_modality_cannot_be_the_one_that_stays():
    available = torch.rand(3, 1000, generator=torch.Generator().manual_seed(0)) > 0.5
    stays = ModalityDropout(0.9)(available)
    assert not (stays & ~available).any()
    assert torch.equal(stays.any(0), available.any(0))


def test_seeded_resumable_and_off_in_evaluation():
    x, first, same, other = inputs(), model(), model(), model(seed=1)
    state = torch.get_rng_state()
    masks = [first(x).present for _ in range(3)]
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(masks[0], masks[1])
    assert torch.equal(same(x).present, masks[0])
    assert not torch.equal(other(x).present, masks[0])
    same(x)
    resumed = model()
    resumed.load_state_dict(same.state_dict())
    assert torch.equal(resumed(x).present, masks[2])
    first.eval()
    assert first(x).present is None


def test_trains_as_dropping_does():
    net, x = model(fusion=QualityAwareFusion.robust(["a", "b", "c"], 4)), inputs(8)
    out = net(x, torch.tensor([True, True, False]))
    assert not out.present[2].any()
    assert out.present.any(0).all()
    criterion = QMFLoss(net.fusion, 8, ranking_weight=0)
    loss = criterion(out.unimodal_logits, torch.arange(8) % 4, present=out.present).loss
    loss.backward()
    assert torch.isfinite(loss)
    assert net.heads["c"].weight.grad is None or (net.heads["c"].weight.grad == 0).all()


def test_dense_logits_and_compile():
    heads = {"a": nn.Conv2d(3, 5, 1), "b": nn.Conv2d(3, 5, 1)}
    net = FusionModel(heads, modality_dropout=0.5, class_dim=1)
    out = net({name: torch.randn(20, 3, 4, 4) for name in "ab"})
    assert out.present.shape == (2, 20, 4, 4)
    assert (out.present == out.present[..., :1, :1]).all()
    x = inputs(50)
    eager, whole = model(), model()
    step = torch.compile(whole, fullgraph=True, backend="aot_eager")
    for _ in range(2):
        assert torch.equal(step(x).present, eager(x).present)


@pytest.mark.parametrize("p", [-0.1, 1.0])
def test_bad_rate(p):
    with pytest.raises(ValueError, match="modality_dropout"):
        FusionModel({"a": nn.Linear(1, 2)}, modality_dropout=p)


def lowbias32(x):
    """Chris Wellons' hash, in Python's whole numbers."""
    x &= 0xFFFFFFFF
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


@pytest.mark.parametrize("seed", [0, 1, 7, -1, 2**40 + 5])
def test_draws_are_the_documented_hash(seed):
    dropout = ModalityDropout(0.4, seed)
    for call in range(3):
        stay = dropout(torch.ones(3, 17, dtype=torch.bool))
        draws = [[lowbias32((m * 17 + i) ^ lowbias32(call ^ lowbias32(seed))) for i in range(17)] for m in range(3)]
        luckiest = [max(column) for column in zip(*draws, strict=True)]
        expected = [[x >= 0.4 * 2**32 or x == most for x, most in zip(row, luckiest, strict=True)] for row in draws]
        assert stay.tolist() == expected
