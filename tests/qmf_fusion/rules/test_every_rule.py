"""What is asked of every published rule alike, by name."""

import copy

import hypothesis
import pytest
import torch
from torch import nn
from torch.func import grad, vmap

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, fusion_report, testing
from qmf_fusion.rules import RULES

K = 4
PRIOR = torch.tensor([4.0, 1.0, 2.0, 1.0])


def typical(fusion):
    """Noisy-or with statistics, as ``calibrate`` leaves it."""
    fusion.rule.typical.copy_(torch.tensor([[0.4, 0.1, 1.0]]).expand(fusion.num_modalities, 3))
    return fusion


# Fusions of M modalities.
MAKE = {name: lambda m, k=K, name=name, **of: QualityAwareFusion(m, combine=name, **of) for name in RULES}
MAKE |= {
    "pdf": lambda m, k=K, **of: QualityAwareFusion(m, combine=RULES["pdf"](m, k), **of),
    "a prior": lambda m, k=K, **of: QualityAwareFusion(m, combine=RULES["product_of_experts"](m, PRIOR[:k]), **of),
    "noisy_or, calibrated": lambda m, k=K, **of: typical(QualityAwareFusion(m, combine="noisy_or", **of)),
}
# Beside each, why: what is published does not have the property.
NOT = {
    "rcml": ["permutation"],  # averaged in turn
    "pdf": ["weight_monotonicity"],  # the other modalities' calibration hangs on this one's softmax
    "noisy_or, calibrated": ["single_modality"],  # whose logits are scaled too
}
every_rule = pytest.mark.parametrize("name", MAKE)
some_rules = pytest.mark.parametrize(
    "name", [name if name in ("tmc", "pdf") else pytest.param(name, marks=pytest.mark.slow) for name in MAKE]
)


@pytest.fixture(autouse=True)
def first_weights():
    torch.manual_seed(0)


def batch(n=6, m=3, k=K, seed=0, dtype=torch.float32, shape=()):
    g = torch.Generator().manual_seed(seed)
    x = [2 * torch.randn(n, *shape, k, generator=g).to(dtype) for _ in range(m)]
    return x, torch.randint(k, (n, *shape), generator=g), torch.rand(m, n, *shape, generator=g) > 0.3


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str)
def test_properties(name, dtype):
    few = hypothesis.settings(testing.DEFAULTS, max_examples=12)
    testing.check_all(MAKE[name](3), exclude=NOT.get(name, []), dtype=dtype, settings=few)


@pytest.mark.parametrize(("name", "left_out"), [(name, each) for name, every in NOT.items() for each in every])
def test_what_is_left_out_does_not_hold(name, left_out):
    unshrunk = hypothesis.settings(testing.DEFAULTS, phases=[hypothesis.Phase.generate])
    with pytest.raises(AssertionError):
        getattr(testing, f"check_{left_out}")(MAKE[name](3), settings=unshrunk)


@every_rule
@pytest.mark.parametrize("shape", [(), (2, 3)], ids=["rows", "pixels"])
def test_absent_everywhere_broken_or_alone(name, shape):
    """No modality: logits 0. One row that is not finite: as if it were absent. One that is left: a fusion of it."""
    x, _, mask = batch(shape=shape)
    fusion = MAKE[name](3)
    mask[:, 0] = False
    out = fusion(x, mask)
    assert not out.logits[0].any()
    assert not out.weights[:, 0].any()
    for broken in (torch.nan, torch.inf, -torch.inf):
        spoilt = [v.clone() for v in x]
        for v, there in zip(spoilt, mask, strict=True):
            v[..., 1] = torch.where(there, v[..., 1], broken)
        leaves = [v.requires_grad_() for v in spoilt]
        again = fusion(leaves)
        assert torch.equal(again.logits, out.logits)
        assert torch.equal(again.weights, out.weights)
        assert torch.equal(again.energy, out.energy)
        again.logits.square().sum().backward()
        for v, there in zip(leaves, mask, strict=True):
            assert torch.isfinite(v.grad).all()
            assert not v.grad[~there].any()
        assert not torch.isfinite(fusion.uncertainties(spoilt)[~mask]).any()
    only = fusion(x, torch.tensor([False, True, False]))
    alone = MAKE[name](1)
    if name == "pdf":
        alone.rule.networks[0] = fusion.rule.networks[1]
    torch.testing.assert_close(only.logits, alone([x[1]]).logits)


@every_rule
@pytest.mark.parametrize(("m", "k"), [(1, 4), (3, 1), (1, 1), (2, 2)])
def test_one_modality_and_one_class(name, m, k):
    x, target, mask = batch(m=m, k=k)
    leaves = [v.requires_grad_() for v in x]
    fusion = MAKE[name](m, k)
    res = QMFLoss(fusion, ranking_weight=0)(leaves, target, present=mask)
    res.loss.backward()
    out = fusion(leaves, mask)
    for value in (res.loss, out.logits, out.weights, *(v.grad for v in leaves)):
        assert torch.isfinite(value).all()
    if m == 1 and name not in ("tmc", "rcml", "noisy_or, calibrated"):
        torch.testing.assert_close(out.logits.log_softmax(-1)[mask[0]], x[0].log_softmax(-1)[mask[0]])


@every_rule
def test_classes_may_lie_anywhere(name):
    x, target, mask = batch(shape=(2, 3))
    moved = [v.movedim(-1, 1) for v in x]
    flat, whole = MAKE[name](3), MAKE[name](3, class_dim=1)
    whole.load_state_dict(flat.state_dict())
    torch.testing.assert_close(whole(moved, mask).logits.movedim(1, -1), flat(x, mask).logits)
    torch.testing.assert_close(whole(moved, mask).weights, flat(x, mask).weights)
    losses = [QMFLoss(f, ranking_weight=0)(v, target, present=mask).loss for f, v in ((flat, x), (whole, moved))]
    torch.testing.assert_close(*losses)


@every_rule
def test_under_autocast_nothing_is_lowered(name):
    x, target, _ = batch(dtype=torch.bfloat16)
    fusion = MAKE[name](3)
    criterion = QMFLoss(fusion, ranking_weight=0)
    plain = fusion(x), criterion(x, target)
    fusion.load_state_dict(MAKE[name](3).state_dict() if name == "tmc" or name == "rcml" else fusion.state_dict())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = fusion(x), criterion(x, target)
    for before, after in zip(plain, lowered, strict=True):
        assert after.logits.dtype == torch.float32
        torch.testing.assert_close(after.logits, before.logits, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(after.weights, before.weights, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(lowered[1].loss, plain[1].loss)


@every_rule
def test_state_is_whole(name):
    x, _, _ = batch()
    fusion = MAKE[name](3)
    fusion.double()
    if name == "pdf":
        torch.manual_seed(5)
    other = MAKE[name](3).double()
    other.load_state_dict(fusion.state_dict())
    assert torch.equal(other(x).logits, fusion(x).logits)
    with pytest.raises(RuntimeError, match="another kind of fusion"):
        QualityAwareFusion(3).load_state_dict(fusion.state_dict())
    assert torch.equal(copy.deepcopy(fusion)(x).logits, fusion(x).logits)


@every_rule
def test_in_half_precision(name):
    """A model cast to bfloat16 hands on such logits; what a rule computes of them stays in float32."""
    x, target, _ = batch(dtype=torch.bfloat16)
    fusion = MAKE[name](3)
    wide = fusion([v.float() for v in x])
    out = fusion.bfloat16()(x)
    assert out.logits.dtype == torch.float32
    torch.testing.assert_close(out.logits, wide.logits, rtol=0.03, atol=0.03)
    QMFLoss(fusion, ranking_weight=0)([v.requires_grad_() for v in x], target).loss.backward()


@some_rules
def test_compiled_whole(name):
    torch.compiler.reset()
    x, target, mask = batch()
    fusion = MAKE[name](3)
    criterion = QMFLoss(fusion, ranking_weight=0)
    step = torch.compile(
        lambda rows: (criterion(rows, target, present=mask), fusion(rows, mask)), fullgraph=True, backend="aot_eager"
    )
    results = []
    for call in (lambda rows: (criterion(rows, target, present=mask), fusion(rows, mask)), step):
        state = copy.deepcopy(fusion.state_dict())
        leaves = [v.clone().requires_grad_() for v in x]
        res, out = call(leaves)
        res.loss.backward()
        results.append([res.loss.detach(), out.logits.detach(), out.weights.detach(), *(v.grad for v in leaves)])
        fusion.load_state_dict(state)
    torch.compiler.reset()
    torch.testing.assert_close(*results)


@some_rules
def test_exports(name):
    mask = batch()[2]
    model = FusionModel([nn.Linear(5, K) for _ in range(3)], MAKE[name](3)).eval()
    inputs = [torch.randn(6, 5, generator=torch.Generator().manual_seed(m)) for m in range(3)]
    rows = torch.export.Dim("batch")
    shapes = {"inputs": [{0: rows}] * 3, "present": {1: rows}}
    program = torch.export.export(model, (inputs, mask), dynamic_shapes=shapes, strict=False)
    assert "qmf" not in str(program.graph)
    assert "autocast" not in str(program.graph)
    got = program.module()([v[:4] for v in inputs], mask[:, :4])
    wanted = model([v[:4] for v in inputs], mask[:, :4])
    torch.testing.assert_close(list(got[:3]), list(wanted[:3]))


@every_rule
def test_under_torch_func(name):
    """One sample at a time, without a batch dimension: the same logits, and the same slopes as backward."""
    x, _, _ = batch()
    fusion = MAKE[name](3)

    def loss(*rows):
        out = fusion([*rows])
        return (out.logits * torch.linspace(-1, 1, K)).sum() + out.weights.square().sum()

    torch.testing.assert_close(vmap(lambda *rows: fusion([*rows]).logits)(*x), fusion(x).logits)
    leaves = [v.clone().requires_grad_() for v in x]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    torch.testing.assert_close(vmap(grad(loss, (0, 1, 2)))(*x), expected)


@every_rule
def test_no_value_is_looked_at_on_a_device(name):
    """Which the meta device, that has none, would refuse."""
    x, target, mask = batch()
    fusion = MAKE[name](3).to("meta")
    rows = [v.to("meta").requires_grad_() for v in x]
    assert fusion(rows, mask.to("meta")).logits.shape == (6, K)
    criterion = QMFLoss(fusion, ranking_weight=0).to("meta")
    criterion(rows, target.to("meta"), present=mask.to("meta")).loss.backward()
    assert rows[0].grad.is_meta


@every_rule
def test_trains_and_reports(name):
    """With a ranking, as every rule may, and judged by ``fusion_report``."""
    g = torch.Generator().manual_seed(0)
    target = torch.arange(90) % K
    inputs = [torch.eye(K)[target] + s * torch.randn(90, K, generator=g) for s in (0.3, 1.0)]
    model = FusionModel([nn.Linear(K, K) for _ in range(2)], MAKE[name](2))
    criterion = QMFLoss(model.fusion, 90, 0.1)
    optimizer = torch.optim.Adam(model.parameters(), 0.05)
    losses = []
    for _ in range(30):
        loss = criterion(model(inputs), target, torch.arange(90)).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    report = fusion_report(model.eval(), inputs, target, resamples=20)
    assert report.sentence
    assert (report.bound is not None) == (name in ("pdf", "entropy_weights"))


@every_rule
def test_logits_near_the_largest_number_that_float32_holds(name):
    """No NaN, from heads that contradict each other as far as they can; nor from features."""
    x = torch.zeros(3, 4, K)
    x[0] = 3e38 * torch.tensor([1.0, -1.0, 1.0, -1.0])
    x[1, :, 1], x[2, :, 2] = 2e38, -2e38
    fusion = MAKE[name](3)
    cases = [(fusion, None)]
    if name == "pdf":
        wide = QualityAwareFusion(3, combine=RULES["pdf"](3, K, [2, 2, 2]))
        cases.append((wide, 3e38 * torch.tensor([1.0, -1.0]).expand(3, 4, 2)))
    for layer, features in cases:
        leaves = x.clone().requires_grad_()
        criterion = QMFLoss(layer, ranking_weight=0)
        res = criterion(leaves, torch.arange(4), features=features)
        out = layer(leaves, features=features)
        (res.loss + out.logits.clamp(-1, 1).sum()).backward()
        assert torch.isfinite(out.logits).all()
        for value in (out.weights, res.loss, leaves.grad, *(p.grad for p in layer.parameters())):
            assert not torch.isnan(value).any()


@pytest.mark.parametrize("name", [name for name in MAKE if name != "noisy_or, calibrated"])
def test_what_it_learns_is_made_on_the_cpu(name):
    """Whatever the default device: criterion and fusion are moved together."""
    with torch.device("meta"):
        fusion = MAKE[name](3)
    held = dict(fusion.named_buffers())
    assert held
    assert {each.device.type for each in held.values()} == {"cpu"}
