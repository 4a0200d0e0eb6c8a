"""Every public error names its argument, what came and what was expected."""

import numpy as np
import pytest
import torch
from torch import nn

from qmf_fusion import FusionModel, LossTrajectory, QMFLoss, QualityAwareFusion, TrajectoryRankingLoss, functional

X = torch.zeros(3, 4)
Y = torch.tensor([0, 1, 3])
INDEX = torch.arange(3)


def layer(*args, **options):
    return lambda: QualityAwareFusion(*args, **options)


def fuse(logits, present=None, names=2, **options):
    return lambda: QualityAwareFusion(names, **options)(logits, present)


def objective(logits=(X, X), target=Y, kappa=None, **options):
    return lambda: functional.qmf_objective(logits, target, kappa, **options)


def criterion(logits=(X, X), target=Y, index=INDEX, present=None, **options):
    return lambda: QMFLoss(QualityAwareFusion(2), 10, **options)(logits, target, index, present)


def rank(w=X[:2, :3], losses=X[:2, :3], index=INDEX, **options):
    return lambda: TrajectoryRankingLoss(10, 2, **options)(w, losses, index)


def model(inputs, **heads):
    heads = heads or {"a": nn.Identity(), "b": nn.Identity()}
    return lambda: FusionModel(heads)(inputs)


META = X.to("meta")
CASES = {
    "class_dim's name": (layer(2, class_dim="a"), TypeError, "class_dim must be an integer, got 'a'"),
    "class_dim's number": (layer(2, class_dim=1.0), TypeError, r"class_dim must be an integer, got 1\.0"),
    "class_dim's truth": (
        lambda: QualityAwareFusion.robust(2, 4, class_dim=True),
        TypeError,
        "class_dim must be an integer, got True",
    ),
    "no values to calibrate on": (
        lambda: QualityAwareFusion(2).calibrate([META, META], Y.to("meta")),
        ValueError,
        "logits must hold values, got tensors on the meta device",
    ),
    # QualityAwareFusion(...)
    "modalities 0": (layer(0), ValueError, r"modalities must be at least 1, got 0"),
    "modalities True": (layer(True), TypeError, r"modalities must be a count or a list of names, got True"),
    "modalities float": (layer(2.0), TypeError, r"modalities must be a count .* got 2\.0"),
    "modalities str": (layer("rgb"), TypeError, r"modalities must be a count .* got 'rgb'"),
    "modalities empty": (layer([]), ValueError, r"modalities must be non-empty names, at least one, got \[\]"),
    "modalities unnamed": (layer(["a", ""]), ValueError, r"modalities must be non-empty names, .* got \['a', ''\]"),
    "modalities twice": (layer(["a", "a"]), ValueError, r"modalities must be distinct names, got \['a', 'a'\]"),
    "alpha 0": (layer(2, alpha=0.0), ValueError, r"alpha must be finite and negative, got 0\.0"),
    "alpha one positive": (layer(2, alpha=[-1.0, 0.5]), ValueError, r"alpha must be finite and negative, got \[-1"),
    "alpha nan": (layer(2, alpha=float("nan")), ValueError, r"alpha must be finite and negative, got nan"),
    "alpha inf": (layer(2, alpha=-float("inf")), ValueError, r"alpha must be finite and negative, got -inf"),
    "alpha count": (
        layer(2, alpha=[-1.0] * 3),
        ValueError,
        r"alpha must be .* one per modality \(2\), got shape \(3,\)",
    ),
    "beta": (layer(2, beta=-0.1), ValueError, r"beta must be finite and at least 0, got -0\.1"),
    "robust odds": (
        lambda: QualityAwareFusion.robust(2, 3, odds="a"),
        TypeError,
        r"odds must be a number, a sequence or a tensor of numbers, got 'a'",
    ),
    "robust odds, too many": (
        lambda: QualityAwareFusion.robust(2, 3, odds=[0.1, 0.2, 0.3]),
        ValueError,
        r"odds must be a number or one per modality \(2\), got shape \(3,\)",
    ),
    "robust odds, other names": (
        lambda: QualityAwareFusion.robust(["a", "b"], 3, odds={"a": 0.1, "c": 0.2}),
        ValueError,
        r"odds must hold the modalities \['a', 'b'\] by name, got \['a', 'c'\]",
    ),
    "set_odds": (
        lambda: QualityAwareFusion.robust(2, 3).rule.set_odds([0.3, -1.0]),
        ValueError,
        r"odds must be finite and positive, got \[0.3, -1.0\]",
    ),
    "set_odds' truth": (
        lambda: QualityAwareFusion.robust(2, 3).rule.set_odds(True),
        TypeError,
        "odds must be a number, a sequence or a tensor of numbers, got True",
    ),
    "beta's truth": (
        layer(2, beta={"0": 0.5, "1": True}),
        TypeError,
        r"beta must be a number, a sequence or a tensor of numbers, got \[0.5, True\]",
    ),
    "temperature's truth": (
        layer(2, temperature=torch.tensor([True, True])),
        TypeError,
        r"temperature must be a number, a sequence or a tensor of numbers, got tensor\(\[True, True\]\)",
    ),
    "robust floor": (
        lambda: QualityAwareFusion.robust(2, 3, floor=None),
        TypeError,
        r"floor must be a number, got None",
    ),
    "temperature": (layer(2, temperature=0), ValueError, r"temperature must be finite and positive, got 0"),
    "uncertainty": (layer(2, uncertainty="enrgy"), ValueError, r"uncertainty must be one of .*'energy'.* got 'enrgy'"),
    "learnable alpha": (layer(2, alpha=1.0, learnable=True), ValueError, r"alpha must be finite and negative"),
    # QualityAwareFusion()(...)
    "count": (fuse([X]), ValueError, r"logits must hold 2 modalities \['0', '1'\], got 1"),
    "count, stacked": (fuse(torch.zeros(3, 3, 4)), ValueError, r"logits must hold 2 modalities .*, got 3"),
    "names": (
        fuse({"a": X, "c": X}, names=["a", "b"]),
        ValueError,
        r"logits must hold the modalities \['a', 'b'\] .* got \['a', 'c'\]",
    ),
    "no stack": (fuse(torch.zeros(4)), ValueError, r"logits must be stacked \[M, \*, K\] .* got \(4,\)"),
    "kind": (fuse(3), TypeError, r"logits must be a sequence, a mapping by name or a stacked tensor, got int"),
    "string": (fuse("ab"), TypeError, r"must be a tensor, got str"),
    "not a tensor": (fuse([X, [1.0]]), TypeError, r"logits\[1\] must be a tensor, got list"),
    "integers": (fuse([X, X.long()]), TypeError, r"logits\[1\] must be floating point, got torch\.int64"),
    "integers by name": (
        fuse({"a": X.int(), "b": X}, names=["a", "b"]),
        TypeError,
        r"logits\['a'\] must be floating point, got torch\.int32",
    ),
    "complex": (fuse([X, X + 0j]), TypeError, r"logits\[1\] must be floating point, got torch\.complex64"),
    "classes": (fuse([X, X[:, :3]]), ValueError, r"number of classes: logits\[0\] has 4, logits\[1\] has 3"),
    "classes, class_dim": (
        fuse([torch.zeros(2, 5, 3), torch.zeros(2, 4, 3)], class_dim=1),
        ValueError,
        r"number of classes: logits\[0\] has 5, logits\[1\] has 4",
    ),
    "shapes": (fuse([X, X[:2]]), ValueError, r"agree in shape: logits\[0\] is \(3, 4\), logits\[1\] is \(2, 4\)"),
    "devices": (fuse([X, META]), ValueError, r"on one device: logits\[0\] is on cpu, logits\[1\] on meta"),
    "class_dim": (
        fuse([X, X], class_dim=2),
        ValueError,
        r"logits\[0\] has no class dimension 2: its shape is \(3, 4\)",
    ),
    "scalar": (fuse([X.sum(), X.sum()]), ValueError, r"logits\[0\] has no class dimension -1: its shape is \(\)"),
    "all None": (fuse([None, None]), ValueError, r"logits must hold at least one modality that is not None"),
    "empty batch": (fuse([X[:0], X[:0]]), ValueError, r"logits must not be empty: the shape is \(0, 4\)"),
    "no classes": (fuse([X[:, :0], X[:, :0]]), ValueError, r"logits must not be empty: the shape is \(3, 0\)"),
    "present kind": (fuse([X, X], [True, True]), TypeError, r"present must be a bool tensor, got list"),
    "present dtype": (fuse([X, X], torch.ones(2)), TypeError, r"present must be a bool tensor, got torch\.float32"),
    "present shape": (
        fuse([X, X], torch.ones(3, 2, dtype=torch.bool)),
        ValueError,
        r"present must be \(2, 3\) or its first dimensions, got \(3, 2\)",
    ),
    "present scalar": (fuse([X, X], torch.tensor(True)), ValueError, r"present must be \(2, 3\) .* got \(\)"),
    "present device": (
        fuse([X, X], torch.ones(2, dtype=torch.bool, device="meta")),
        ValueError,
        r"present must be on the logits' device cpu, got meta",
    ),
    "uncertainty's shape": (
        fuse([X, X], uncertainty=lambda x: x),
        ValueError,
        r"uncertainty must return \(3,\) for logits \(3, 4\), got \(3, 4\)",
    ),
    "uncertainty's kind": (
        fuse([X, X], uncertainty=lambda x: 1.0),
        ValueError,
        r"uncertainty must return .* got float",
    ),
    # functional
    "fuse weights": (lambda: functional.fuse([X, X], X), ValueError, r"weights must be \(2, 3\) .* got \(3, 4\)"),
    "fuse nothing": (lambda: functional.fuse([], X), ValueError, r"logits must hold at least one modality, got none"),
    "fusion_weights alpha": (
        lambda: functional.fusion_weights(X, 0.1),
        ValueError,
        r"alpha must be finite and negative, got 0\.1",
    ),
    "fusion_weights beta": (
        lambda: functional.fusion_weights(X, -0.1, [0.0, -1.0, 0.0]),
        ValueError,
        r"beta must be finite and at least 0, got \[0\.0, -1\.0, 0\.0\]",
    ),
    "fusion_weights count": (
        lambda: functional.fusion_weights(X, [-1.0, -1.0]),
        ValueError,
        r"alpha must be a number or one per modality \(3\), got shape \(2,\)",
    ),
    "energy temperature": (
        lambda: functional.energy_score(X, -1.0),
        ValueError,
        r"temperature must be positive, got -1",
    ),
    "ranking form": (lambda: functional.ranking_loss(X, X, form="x"), ValueError, r"form must be one of .* got 'x'"),
    "ranking pairs": (lambda: functional.ranking_loss(X, X, pairs="x"), ValueError, r"pairs must be one of .* got 'x'"),
    "ranking kind": (lambda: functional.ranking_loss([1.0], X), TypeError, r"weights must be a floating .* got list"),
    "ranking dtype": (
        lambda: functional.ranking_loss(X, X.int()),
        TypeError,
        r"kappa must be a floating .* torch\.int32",
    ),
    "ranking shape": (
        lambda: functional.ranking_loss(X, X[:2]),
        ValueError,
        r"weights and kappa .* \(3, 4\) and \(2, 4\)",
    ),
    "ranking dims": (
        lambda: functional.ranking_loss(X[None], X[None]),
        ValueError,
        r"weights and kappa .* \(1, 3, 4\)",
    ),
    "ranking empty": (lambda: functional.ranking_loss(X[:, :0], X[:, :0]), ValueError, r"weights must not be empty"),
    "ranking device": (lambda: functional.ranking_loss(X, META), ValueError, r"kappa must be on .* cpu, got meta"),
    "objective dims": (objective([X[0], X[0]], Y[0]), ValueError, r"logits must be \[B, \*, K\], got \(4,\)"),
    "objective kappa": (objective(kappa=X), ValueError, r"kappa must be \(2, 3\), .* got \(3, 4\)"),
    "objective kappa kind": (objective(kappa=[0.1]), TypeError, r"kappa must be a tensor or None, got list"),
    "objective kappa device": (objective(kappa=X[:2, :3].to("meta")), ValueError, r"kappa must be on .* cpu, got meta"),
    "objective alpha kind": (objective(alpha="x"), TypeError, r"alpha must be a number, a sequence .* got 'x'"),
    "class_weight kind": (objective(class_weight=[1.0]), TypeError, r"class_weight must be a tensor .* got list"),
    "fuse weights kind": (lambda: functional.fuse([X, X], [1.0]), TypeError, r"weights must be a tensor, got list"),
    "layer beta kind": (layer(2, beta="x"), TypeError, r"beta must be a number, a sequence .* got 'x'"),
    "objective alpha": (objective(alpha=1), ValueError, r"alpha must be finite and negative, got 1"),
    "objective temperature": (
        objective(temperature=[1.0, 0.0]),
        ValueError,
        r"temperature must be finite and positive, got \[1\.0",
    ),
    "objective beta": (
        objective(beta=torch.tensor(-1.0)),
        ValueError,
        r"beta must be finite and at least 0, got -1\.0",
    ),
    "objective backend": (objective(backend="cuda"), ValueError, r"backend must be one of .*'torch'.* got 'cuda'"),
    "class_weight": (objective(class_weight=torch.ones(3)), ValueError, r"class_weight must be \[4\], .* got \(3,\)"),
    "label_smoothing": (objective(label_smoothing=1.5), ValueError, r"label_smoothing must be from 0 to 1, got 1\.5"),
    "ranking_weight": (
        objective(ranking_weight=-1),
        ValueError,
        r"ranking_weight must be finite and at least 0, got -1",
    ),
    "ranking_weight nan": (objective(ranking_weight=float("nan")), ValueError, r"ranking_weight must be .* got nan"),
    "form": (objective(form="papers"), ValueError, r"form must be one of .*'margin'.* got 'papers'"),
    "pairs": (objective(pairs="some"), ValueError, r"pairs must be one of .*'adjacent'.* got 'some'"),
    "target kind": (objective(target=[0, 1, 2]), TypeError, r"target must be a tensor, got list"),
    "target dtype": (objective(target=Y.float()), TypeError, r"target must hold class indices .* got torch\.float32"),
    "target bool": (objective(target=Y > 1), TypeError, r"target must hold class indices .* got torch\.bool"),
    "target shape": (objective(target=Y[:2]), ValueError, r"target must have the logits' shape .* \(3,\), got \(2,\)"),
    "target device": (
        objective(target=Y.to("meta")),
        ValueError,
        r"target must be on the logits' device cpu, got meta",
    ),
    "target high": (objective(target=Y + 1), IndexError, r"target must hold classes 0 to 3 .* got values from 1 to 4"),
    "target low": (objective(target=Y - 1), IndexError, r"target must hold classes 0 to 3 .* got values from -1 to 2"),
    # QMFLoss
    "criterion fusion": (lambda: QMFLoss(2, 10), TypeError, r"fusion must be a QualityAwareFusion, got int"),
    "criterion num_samples": (lambda: QMFLoss(QualityAwareFusion(2), 0), ValueError, r"num_samples must be .* got 0"),
    "criterion weight": (criterion(weight=X), ValueError, r"class_weight must be \[K\], .* got \(3, 4\)"),
    "class_weight nan": (
        objective(class_weight=torch.tensor([1.0, 2.0, float("nan"), 1.0])),
        ValueError,
        r"class_weight must be from 0 to 1e30, got nan for class 2",
    ),
    "class_weight complex": (
        objective(class_weight=torch.ones(4) * 1j),
        TypeError,
        r"class_weight .* got torch.complex64",
    ),
    "criterion weight below 0": (
        criterion(weight=torch.tensor([1.0, -0.5, 1.0, 1.0])),
        ValueError,
        r"class_weight must be from 0 to 1e30, got -0.5 for class 1",
    ),
    "criterion weight inf": (criterion(weight=torch.full((4,), float("inf"))), ValueError, r"class_weight .* got inf"),
    "class_weight too large": (
        objective(class_weight=torch.tensor([1.0, 1.0, 1e31, 1.0])),
        ValueError,
        r"class_weight must be from 0 to 1e30, got .*e\+3. for class 2",
    ),
    "criterion weight count": (criterion(weight=X[0, :3]), ValueError, r"class_weight must be \[4\], .* got \(3,\)"),
    "criterion smoothing": (criterion(label_smoothing=-1), ValueError, r"label_smoothing must be .* got -1"),
    "criterion backend": (criterion(backend="x"), ValueError, r"backend must be one of .* got 'x'"),
    "criterion form": (criterion(form="x"), ValueError, r"form must be one of .* got 'x'"),
    "criterion rescale": (
        criterion(rescale="max"),
        ValueError,
        r"rescale must be one of \['minmax', None\], got 'max'",
    ),
    "criterion start_epoch": (criterion(start_epoch=0), ValueError, r"start_epoch must be .* got 0"),
    "criterion sampling": (criterion(sampling_count=0), ValueError, r"sampling_count must be .* got 0"),
    "criterion update": (criterion(update="later"), ValueError, r"update must be one of .* got 'later'"),
    "criterion count": (criterion([X]), ValueError, r"logits must hold 2 modalities .*, got 1"),
    "criterion dims": (criterion([X[0], X[0]]), ValueError, r"logits must be \[B, \*, K\], got \(4,\)"),
    "criterion index": (criterion(index=None), ValueError, r"index must be given in training"),
    "index high": (criterion(index=INDEX + 8), IndexError, r"index must be within the trajectory's 10 .* got 8 to 10"),
    "index low": (criterion(index=INDEX - 1), IndexError, r"index must be within the trajectory's 10 .* got -1 to 1"),
    "index shape": (criterion(index=INDEX[:2]), ValueError, r"index must be \[3\], .* got \(2,\)"),
    "index kind": (criterion(index=[0, 1, 2]), TypeError, r"index must be a tensor, got list"),
    "index dtype": (
        criterion(index=INDEX.float()),
        TypeError,
        r"index must hold dataset indices .* got torch\.float32",
    ),
    # TrajectoryRankingLoss
    "rank form": (rank(form="x"), ValueError, r"form must be one of .* got 'x'"),
    "rank pairs": (rank(pairs="x"), ValueError, r"pairs must be one of .* got 'x'"),
    "rank weights kind": (rank(w=[1.0]), TypeError, r"weights must be a floating point tensor, got list"),
    "rank losses dtype": (rank(losses=X[:2, :3].int()), TypeError, r"losses must be a floating .* got torch\.int32"),
    "rank weights shape": (rank(w=X), ValueError, r"weights must be \[2, B\], .* got \(3, 4\)"),
    "rank losses shape": (rank(losses=X[:2]), ValueError, r"losses must be \[2, B\], .* got \(2, 4\)"),
    "rank empty": (rank(X[:2, :0], X[:2, :0], INDEX[:0]), ValueError, r"weights must not be empty"),
    "index device": (
        criterion(index=INDEX.to("meta")),
        ValueError,
        r"index must be on the trajectory's device cpu, got m",
    ),
    "rank index device": (
        rank(index=INDEX.to("meta")),
        ValueError,
        r"index must be on the trajectory's device cpu, got m",
    ),
    "rank losses device": (
        rank(losses=META[:2, :3]),
        ValueError,
        r"losses must be on the trajectory's device cpu, got meta",
    ),
    "kappa dims": (lambda: LossTrajectory(5, 1).kappa(INDEX[0]), ValueError, r"index must be \[B\], .* got \(\)"),
    "kappa kind": (lambda: LossTrajectory(5, 1).kappa(3), TypeError, r"index must be a tensor, got int"),
    "rank index": (rank(index=INDEX * 9), IndexError, r"index must be within the trajectory's 10 .* got 0 to 18"),
    "trajectory": (lambda: LossTrajectory(5, 0), ValueError, r"num_modalities must be an integer .* got 0"),
    "trajectory bool": (lambda: LossTrajectory(True, 1), ValueError, r"num_samples must be an integer .* got True"),
    "resize float": (
        lambda: LossTrajectory(5, 1).resize(6.0),
        ValueError,
        r"num_samples must be an integer .* got 6\.0",
    ),
    "record": (
        lambda: LossTrajectory(5, 2).record(X[:1, :3], INDEX),
        ValueError,
        r"losses must be \[2, B\], got \(1, 3\)",
    ),
    "kappa empty": (lambda: LossTrajectory(5, 1).kappa(INDEX[:0]), ValueError, r"index must not be empty"),
    "alpha -inf": (objective(alpha=-float("inf")), ValueError, r"alpha must be finite and negative, got -inf"),
    "ranking_weight str": (objective(ranking_weight="x"), TypeError, r"ranking_weight must be a number, got 'x'"),
    "head's name": (lambda: FusionModel({"a.b": nn.Identity()}), ValueError, r"heads must have names.* got 'a\.b'"),
    "trajectory float": (lambda: LossTrajectory(5.0, 1), ValueError, r"num_samples must be an integer .* got 5\.0"),
    # FusionModel
    "no heads": (lambda: FusionModel({}), TypeError, r"heads must be a mapping .* at least one, got \{\}"),
    "heads kind": (
        lambda: FusionModel(nn.Identity()),
        TypeError,
        r"heads must be a mapping from names to modules, or a list",
    ),
    "head kind": (lambda: FusionModel({"a": len}), TypeError, r"heads\['a'\] must be a module, got builtin"),
    "fusion's names": (
        lambda: FusionModel({"a": nn.Identity()}, QualityAwareFusion(["b"])),
        ValueError,
        r"fusion must be of the modalities \['a'\], in this order, got \['b'\]",
    ),
    "fusion and options": (
        lambda: FusionModel({"a": nn.Identity()}, QualityAwareFusion(1), normalize=True),
        ValueError,
        r"options go to the default fusion; with fusion given, got \['normalize'\]",
    ),
    "inputs kind": (model(X), TypeError, r"inputs must be a mapping .* got Tensor"),
    "inputs names": (model({"a": X, "c": X}), ValueError, r"inputs must be named \['a', 'b'\], got also \['c'\]"),
    "inputs empty": (model({}), ValueError, r"at least one modality"),
    "freeze": (
        lambda: FusionModel({"a": nn.Identity()}).freeze("b"),
        ValueError,
        r"names must be among the heads \['a'\], got 'b'",
    ),
    "parameter_groups": (
        lambda: FusionModel({"a": nn.Identity()}).parameter_groups({"b": {}}),
        ValueError,
        r"names must be among the heads \['a'\], got 'b'",
    ),
}


@pytest.mark.parametrize(("call", "error", "message"), CASES.values(), ids=CASES)
def test_error_names_the_argument(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_numpys_integers_are_integers():
    for two in (np.int64(2), np.uint8(2)):
        assert QualityAwareFusion(two).num_modalities == 2
        fusion = QualityAwareFusion.robust(two, two, features=[two, None], class_dim=np.int64(-1))
        assert type(fusion.rule.num_classes) is int
        criterion = QMFLoss(fusion, two, start_epoch=two)
        criterion([X[:, :2], X[:, :2]], Y % 2, Y % 2, features=[X[:, :2], None])
        criterion.ranking.resize(np.int64(5))
    with pytest.raises(TypeError, match="num_classes must be an integer"):
        QualityAwareFusion.robust(2, np.bool_(True))


class ReturnsNothing(nn.Module):
    def forward(self, x):
        return {"scores": x}


def test_a_head_that_returns_no_logits():
    with pytest.raises(TypeError, match=r"heads\['a'\] must return logits or an object with \.logits, got dict"):
        FusionModel({"a": ReturnsNothing()})({"a": X})


def test_a_failed_call_records_nothing():
    loss = QMFLoss(QualityAwareFusion(2), 10)
    for target, index in ((Y + 1, INDEX), (Y, INDEX + 8)):
        with pytest.raises(IndexError):
            loss([X, X], target, index)
    assert not loss.ranking.trajectory.history.any()
