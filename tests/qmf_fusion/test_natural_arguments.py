"""What one has at hand is taken: the model's whole output, lists, mappings by name; and errors say whose they are."""

import copy

import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, fusion_report

NAMES = ("rgb", "depth")


class Head(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.last = nn.Linear(6, 8), nn.Linear(8, 4)

    def forward(self, x):
        features = self.encoder(x)
        return self.last(features), features


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return FusionModel(
            {"rgb": Head(), "depth": nn.Linear(6, 4)},
            QualityAwareFusion.robust(NAMES, 4, features={"rgb": 8, "depth": None}),
        )


def data(n=80):
    g = torch.Generator().manual_seed(1)
    target = torch.randint(4, (n,), generator=g)
    x = torch.randn(2, n, 6, generator=g) + nn.functional.one_hot(target, 6)
    return dict(zip(NAMES, x, strict=True)), target, torch.rand(2, n, generator=g) > 0.2


def same(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


@pytest.mark.parametrize("masked", [False, True])
def test_the_whole_output_brings_presence_and_features_along(masked):
    inputs, target, present = data()
    present = present if masked else None
    index, models, criteria = torch.arange(80), [build(), build()], []
    for whole, model in zip((False, True), models, strict=True):
        criterion = QMFLoss(model.fusion, 80)
        criteria.append(criterion)
        out = model(inputs, present)
        if whole:
            loss = criterion(out, target, index).loss
        else:
            loss = criterion(out.unimodal_logits, target, index, out.present, out.features).loss
        loss.backward()
        model.eval()
        out = model(inputs, present)
        assert torch.equal(model.fusion(out).logits, out.logits)
        if whole:
            model.fusion.calibrate(out, target)
            u = model.fusion.uncertainties(out)
        else:
            model.fusion.calibrate(out.unimodal_logits, target, present=out.present, features=out.features)
            u = model.fusion.uncertainties(out.unimodal_logits, out.features)
        assert (torch.nan_to_num(u) > 0).any()
    same(*models)
    same(*criteria)
    assert models[0].fusion.rule.running.features.any()


def test_a_report_takes_the_model_and_its_inputs():
    inputs, target, present = data()
    model = build()
    model.heads["rgb"].eval()
    model.fusion.calibrate(model(inputs), target)
    modes = [m.training for m in model.modules()]
    report = fusion_report(model, inputs, target, present=present, resamples=20)
    assert [m.training for m in model.modules()] == modes
    out = copy.deepcopy(model).eval()(inputs, present)
    for other in (
        fusion_report(model, out, target, resamples=20),
        fusion_report(model.fusion, out, target, resamples=20),
        fusion_report(model.fusion, out.unimodal_logits, target, present=present, features=out.features, resamples=20),
        fusion_report(model, list(inputs.values()), target, present=present, resamples=20),
    ):
        assert other.to_dict() == report.to_dict()


def test_heads_and_inputs_as_lists():
    inputs, _, _ = data(5)
    named = build()
    for heads in (list(named.heads.values()), nn.ModuleList(named.heads.values()), named.heads):
        model = FusionModel(heads, named.fusion)
        assert model.names == NAMES
        assert torch.equal(model(list(inputs.values())).logits, named(inputs).logits)
    assert FusionModel([nn.Linear(6, 4), nn.Linear(6, 4)]).names == ("0", "1")
    with pytest.raises(ValueError, match=r"heads must be 2, of the fusion's modalities \['rgb', 'depth'\], got 1"):
        FusionModel([nn.Linear(6, 4)], named.fusion)
    with pytest.raises(TypeError, match=r"inputs must be a mapping from modalities' names .* got list of 1"):
        named([inputs["rgb"]])


def test_the_recommended_rule_by_its_name():
    model = FusionModel({"a": nn.Linear(6, 4), "b": nn.Linear(6, 4)}, fusion="robust", num_classes=4, odds=0.1)
    assert model.fusion.rule.kind() == QualityAwareFusion.robust(["a", "b"], 4).rule.kind()
    assert model.fusion.rule.odds.tolist() == [0.1, 0.1]
    assert model.fusion.names == ("a", "b")
    with pytest.raises(TypeError, match="num_classes must be given with fusion='robust'"):
        FusionModel({"a": nn.Linear(6, 4)}, "robust")
    for wrong in ("strong", 3):
        with pytest.raises((TypeError, ValueError), match="fusion must be a QualityAwareFusion, 'robust' or None, got"):
            FusionModel({"a": nn.Linear(6, 4)}, wrong)


def test_masks_by_name():
    inputs, target, present = data(10)
    model, by_name = build(), dict(zip(NAMES, present, strict=True))
    torch.testing.assert_close(model(inputs, by_name), model(inputs, present), rtol=0, atol=0, equal_nan=True)
    logits = model(inputs).unimodal_logits
    assert torch.equal(model.fusion(logits, by_name).logits, model.fusion(logits, present).logits)
    loss = QMFLoss(model.fusion, ranking_weight=0.0)
    found = [loss(logits, target, present=mask, features=[None, None]).loss for mask in (present, by_name)]
    assert torch.equal(*found)
    for wrong, error, message in (
        ({"rgb": present[0]}, ValueError, r"present must hold the modalities \['rgb', 'depth'\] by name, got \['rgb'"),
        ({"rgb": True, "depth": present[1]}, TypeError, r"present\['rgb'\] must be a bool tensor, .* got bool"),
        ({"rgb": present[0], "depth": present[1, :3]}, ValueError, "present must hold masks of one shape on one dev"),
    ):
        for call in (model, model.fusion):
            with pytest.raises(error, match=message):
                call(inputs if call is model else logits, wrong)


def test_weights_by_name():
    fusion = QualityAwareFusion(NAMES, alpha={"depth": -0.3, "rgb": -0.1}, temperature={"rgb": 2.0, "depth": 1.0})
    assert fusion.alpha.tolist() == [-0.1, -0.3]
    assert fusion.temperature.tolist() == [2.0, 1.0]
    logits, target = torch.randn(2, 60, 4), torch.randint(4, (60,))
    static = {"depth": 0.4, "rgb": 0.6}
    fusion.calibrate(logits, target, static)
    torch.testing.assert_close(fusion(logits).weights.mean(1), torch.tensor([0.6, 0.4]), rtol=0, atol=1e-5)
    report = fusion_report(fusion, logits, target, static, resamples=20)
    assert [m.static_weight for m in report.modalities] == pytest.approx([0.6, 0.4])
    with pytest.raises(ValueError, match=r"alpha must hold the modalities \['rgb', 'depth'\] by name, got \['rgb'\]"):
        QualityAwareFusion(NAMES, alpha={"rgb": -0.1})


def test_an_exception_in_a_head_names_it():
    inputs, _, _ = data(5)
    inputs["depth"] = inputs["depth"][:, :3]
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes") as caught:
        build()(inputs)
    assert caught.value.__notes__ == ["in FusionModel's heads['depth']"]


def test_without_a_ranking_no_samples_need_be_counted():
    inputs, target, _ = data(10)
    model = build()
    criterion = QMFLoss(model.fusion, ranking_weight=0.0)
    out = model(inputs)
    counted = QMFLoss(model.fusion, 10, 0.0)(out, target, torch.arange(10))
    torch.testing.assert_close(criterion(out, target).loss, counted.loss)
    assert torch.equal(criterion(out, target, torch.arange(10) + 10**9).loss, criterion(out, target).loss)
    criterion.eval()
    copy.deepcopy(criterion).load_state_dict(criterion.state_dict())
    criterion.ranking.resize(10)
    criterion.ranking_weight = 0.1
    criterion.train()(out, target, torch.arange(10)).loss.backward()
    assert criterion.ranking.trajectory.count.sum() == 20
    late = QMFLoss(model.fusion, ranking_weight=0.0)
    late.ranking_weight = 0.1
    for call in (lambda: QMFLoss(model.fusion), lambda: late(out, target, torch.arange(10))):
        with pytest.raises(ValueError, match="num_samples must be given, the size of the training set, where ranking_"):
            call()


def test_compiles_as_it_is_called():
    inputs, target, _ = data(10)
    for criterion_of in (lambda f: QMFLoss(f, 10), lambda f: QMFLoss(f, ranking_weight=0.0)):
        model = build()
        criterion = criterion_of(model.fusion)

        def step(inputs, target, index, model=model, criterion=criterion):
            return criterion(model(inputs), target, index).loss

        with torch.no_grad():
            expected = step(inputs, target, torch.arange(10))
        got = torch.compile(step, fullgraph=True, backend="eager")(inputs, target, torch.arange(10))
        torch.testing.assert_close(got, expected)
