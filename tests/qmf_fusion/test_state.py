"""State: there from construction, kept by whoever saves, averages, copies or recomputes; and whose it is."""

import copy
import inspect
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils.checkpoint import checkpoint

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.uncertainty import msp_uncertainty

from .test_mixture import clean_data

NAMES = ["a", "b"]


def heads():
    return {name: nn.Linear(6, 5) for name in NAMES}


def build(**options):
    fusion = QualityAwareFusion(NAMES, **options) if options else QualityAwareFusion.robust(NAMES, 5)
    return FusionModel(heads(), fusion)


def learn(model, calibrate=True):
    """Gather statistics and calibrate."""
    logits, target = clean_data(m=2, dtype=torch.float32)
    criterion = QMFLoss(model.fusion, len(target))
    for index in torch.arange(len(target)).split(60):
        criterion(list(logits[:, index]), target[index], index)
    if calibrate:
        model.fusion.calibrate(logits, target)
    return model


def outputs(model):
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(3))
    out = model(dict.fromkeys(NAMES, 3 * x))
    return torch.cat([out.logits.flatten(), out.weights.flatten()])


KINDS = {
    "fresh": lambda: build(),
    "gathered": lambda: learn(build(), calibrate=False),
    "calibrated": lambda: learn(build()),
    "affine": lambda: build(uncertainty="entropy", combine="probabilities"),
    "affine, calibrated": lambda: learn(build(uncertainty="entropy")),
    "learnable, calibrated": lambda: learn(build(learnable=True)),
}


def empty_like(kind):
    options = {"uncertainty": "entropy", "combine": "probabilities"} if kind == "affine" else {"uncertainty": "entropy"}
    if kind.startswith("learnable"):
        return build(learnable=True)
    return build(**options) if kind.startswith("affine") else build()


def through_state_dict(model, kind, _):
    stream = io.BytesIO()
    torch.save(model.state_dict(), stream)
    stream.seek(0)
    other = empty_like(kind)
    other.load_state_dict(torch.load(stream), strict=True)
    return other


def through_distributed_checkpoint(model, kind, folder):
    dcp = pytest.importorskip("torch.distributed.checkpoint")
    alone = {"no_dist": True} if "no_dist" in inspect.signature(dcp.save).parameters else {}  # else found out by itself
    dcp.save(model.state_dict(), checkpoint_id=folder, **alone)
    other = empty_like(kind)
    state = other.state_dict()
    dcp.load(state, checkpoint_id=folder, **alone)
    other.load_state_dict(state, strict=True)
    return other


def through_safetensors(model, kind, folder):
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_model(model, str(folder / "model.safetensors"))
    other = empty_like(kind)
    assert safetensors.load_model(other, str(folder / "model.safetensors")) == (set(), [])
    return other


def through_meta(model, kind, _):
    with torch.device("meta"):
        other = empty_like(kind)
    other.load_state_dict(model.state_dict(), assign=True)
    assert not any(x.is_meta for x in other.state_dict().values())
    return other


def through_average(model, kind, _):
    average = AveragedModel(empty_like(kind), use_buffers=True)
    for _ in range(3):
        average.update_parameters(model)
    return average.module


WAYS = {
    "state_dict": through_state_dict,
    "torch.distributed.checkpoint": through_distributed_checkpoint,
    "safetensors": through_safetensors,
    "meta device": through_meta,
    "AveragedModel": through_average,
    "deepcopy": lambda model, *_: copy.deepcopy(model),
    "pickle": lambda model, *_: pickle.loads(pickle.dumps(model)),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.filterwarnings("ignore:the weights of")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_nothing_that_was_learned_is_lost(kind, way, tmp_path):
    model = KINDS[kind]()
    other = WAYS[way](model, kind, tmp_path)
    assert other.state_dict().keys() == model.state_dict().keys()
    for name, x in model.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], x, rtol=1e-12, atol=1e-12, msg=name)
    torch.testing.assert_close(outputs(other), outputs(model))
    learn(other)  # and it goes on from there


@pytest.mark.parametrize("kind", ["fresh", "affine"])
def test_state_has_its_final_shape_from_construction(kind):
    model = KINDS[kind]()
    before = {name: (x.shape, x.dtype) for name, x in model.state_dict().items()}
    learn(model)
    assert {name: (x.shape, x.dtype) for name, x in model.state_dict().items()} == before


def test_another_number_of_classes_does_not_load():
    state = QualityAwareFusion.robust(2, 4).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch"):
        QualityAwareFusion.robust(2, 5).load_state_dict(state)
    with pytest.raises(TypeError, match=r"num_classes must be an integer, got 4\.0"):
        QualityAwareFusion.robust(2, 4.0)


KIND = {
    "energy": lambda: QualityAwareFusion(2),
    "msp": lambda: QualityAwareFusion(2, uncertainty="msp"),
    "callable": lambda: QualityAwareFusion(2, uncertainty=msp_uncertainty),
    "probabilities": lambda: QualityAwareFusion(2, combine="probabilities"),
    "normalize": lambda: QualityAwareFusion(2, normalize=True),
    "nonnegative": lambda: QualityAwareFusion(2, nonnegative=True),
    "LogitNorm": lambda: QualityAwareFusion(2, normalize_logits=0.04),
    "LogitNorm 1": lambda: QualityAwareFusion(2, normalize_logits=1),
    "robust": lambda: QualityAwareFusion.robust(2, 5),
    "robust of softmax": lambda: QualityAwareFusion.robust(2, 5, evidential=False),
    "product": lambda: QualityAwareFusion.robust(2, 5, agreement=False),
    "robust LogitNorm": lambda: QualityAwareFusion.robust(2, 5, normalize_logits=0.04),
    "typicality": lambda: QualityAwareFusion.robust(2, 5, typicality_norm=False),
}


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize("wrapped", [False, True])
def test_state_of_another_kind_of_rule_does_not_load(strict, wrapped):
    """Under the same names, the same numbers would mean something else."""

    def build(name):
        return FusionModel(heads(), KIND[name]()) if wrapped else KIND[name]()

    for one in KIND:
        state = build(one).state_dict()
        for other in KIND:
            if one == other:
                assert str(build(other).load_state_dict(state, strict=strict)) == "<All keys matched successfully>"
            else:
                own = re.escape(build(other).get_submodule("fusion" if wrapped else "").rule.kind())
                with pytest.raises(RuntimeError, match=rf"of another kind of fusion, .*, and this one is {own}"):
                    build(other).load_state_dict(state, strict=strict)


def test_state_of_other_modalities_does_not_load():
    state = QualityAwareFusion(["rgb", "depth"]).state_dict()
    QualityAwareFusion(["rgb", "depth"]).load_state_dict(state)
    QualityAwareFusion(2).load_state_dict(state)  # of whatever modalities
    QualityAwareFusion(["rgb", "depth"]).load_state_dict(QualityAwareFusion(2).state_dict())
    with pytest.raises(RuntimeError, match=r"of the modalities \['rgb', 'depth'\], and this one is of \['depth', 'rgb"):
        QualityAwareFusion(["depth", "rgb"]).load_state_dict(state)


def test_tuning_and_training_options_are_no_other_kind():
    for one, other in (
        (QualityAwareFusion(2), QualityAwareFusion(2, detach_weights=True)),
        (QualityAwareFusion.robust(2, 5), QualityAwareFusion.robust(2, 5, odds=0.1, gather=False)),
    ):
        other.load_state_dict(one.state_dict())


def test_temperature_filled_in_place_is_honoured():
    """In forward, in the loss and compiled, though 1 is not divided by."""
    logits, target = clean_data(m=2, n=20)
    for uncertainty in ("energy", "entropy"):
        fusion, hot = QualityAwareFusion(2, uncertainty=uncertainty), QualityAwareFusion(2, uncertainty=uncertainty)
        compiled = torch.compile(fusion, fullgraph=True, backend="eager")
        assert torch.equal(compiled(logits).weights, fusion(logits).weights)
        expected = QualityAwareFusion(2, uncertainty=uncertainty, temperature=2.0)
        fusion.rule.coefficients.fixed_temperature.fill_(2.0)
        hot.load_state_dict(expected.state_dict())
        for layer in (fusion, hot, compiled):
            torch.testing.assert_close(layer(logits).weights, expected(logits).weights)
        losses = [QMFLoss(layer, 20, 0.0)(logits, target).loss for layer in (fusion, expected)]
        torch.testing.assert_close(*losses)
        assert fusion.temperature.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_of_the_model(reentrant):
    results = []
    for wrap in (False, True):
        model = build()
        model.load_state_dict(learn(build(), calibrate=False).state_dict())
        model.heads.load_state_dict({k: torch.full_like(v, 0.1) for k, v in model.heads.state_dict().items()})
        criterion = QMFLoss(model.fusion, 20)
        x = torch.randn(20, 6, generator=torch.Generator().manual_seed(1)).requires_grad_()

        def run(x, model=model):
            return model(dict.fromkeys(NAMES, x)).unimodal_logits

        unimodal = checkpoint(run, x, use_reentrant=reentrant) if wrap else run(x)
        criterion(unimodal, torch.arange(20) % 5, torch.arange(20)).loss.backward()
        results.append([x.grad, *model.state_dict().values(), *criterion.state_dict().values()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_nothing_is_learned_without_gradients():
    """Which is also what the first of reentrant checkpointing's two forwards is."""
    logits, target = clean_data(m=2, n=20)
    criterion = QMFLoss(QualityAwareFusion.robust(2, 5), 20)
    before = copy.deepcopy([criterion.state_dict(), criterion.fusion.state_dict()])
    with torch.no_grad():
        criterion(logits, target, torch.arange(20))
    for state, now in zip(before, [criterion.state_dict(), criterion.fusion.state_dict()], strict=True):
        torch.testing.assert_close(now, state, rtol=0, atol=0)
    given = logits.requires_grad_()
    checkpoint(lambda x: criterion(x, target, torch.arange(20)).loss, given, use_reentrant=True).backward()
    assert criterion.ranking.trajectory.count.sum() == 40
    assert criterion.fusion.rule.running.measured[0, 0, 0] == 20


class Both(nn.Module):
    """As a LightningModule or a Transformers model holds them."""

    def __init__(self, **options):
        super().__init__()
        self.model = build(**options)
        self.criterion = QMFLoss(self.model.fusion, 8)


@pytest.mark.parametrize("options", [{}, {"learnable": True}], ids=str)
def test_the_model_owns_the_fusion(options, tmp_path):
    both = Both(**options)
    own = set(both.criterion.state_dict())
    assert own == {"ranking.trajectory.history", "ranking.trajectory.low", "ranking.trajectory.span"}
    assert list(both.criterion.parameters()) == []
    assert both.criterion.fusion is both.model.fusion
    pointers = [x.data_ptr() for x in both.state_dict().values()]
    assert len(set(pointers)) == len(pointers)
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(both.state_dict(), str(tmp_path / "both.safetensors"))
    other = Both(**options)
    other.load_state_dict(safetensors.load_file(str(tmp_path / "both.safetensors")), strict=True)
    torch.testing.assert_close(other.state_dict(), both.state_dict())


def test_a_criterion_built_on_the_meta_device_loads():
    both = Both()
    learn(both.model)
    criterion = QMFLoss(both.model.fusion, 8)
    criterion(list(clean_data(m=2)[0][:, :8]), torch.arange(8) % 5, torch.arange(8))
    with torch.device("meta"):
        other = QMFLoss(both.model.fusion, 8)
    other.load_state_dict(criterion.state_dict(), assign=True)
    assert not any(x.is_meta for x in other.buffers())
    assert torch.equal(other.ranking.trajectory.history, criterion.ranking.trajectory.history)


def test_copies_keep_model_and_criterion_together():
    both = Both(learnable=True)
    for other in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert other.criterion.fusion is other.model.fusion
        assert other.model.fusion is not both.model.fusion
    alone = copy.deepcopy(both.criterion)
    assert alone.fusion is not both.model.fusion  # a copy of its own, as of everything that it refers to
    torch.testing.assert_close(alone.fusion.state_dict(), both.model.fusion.state_dict())


def test_a_criterion_on_another_device_says_so():
    x, target = [torch.randn(3, 5) for _ in NAMES], torch.arange(3)
    criterion = QMFLoss(QualityAwareFusion(2), 8)
    criterion.to("meta")
    assert criterion.fusion.alpha.device.type == "cpu"
    with pytest.raises(ValueError, match="criterion must be on its fusion's device cpu, got meta"):
        criterion(x, target, target)
    criterion.fusion.to("meta")
    with pytest.raises(ValueError, match="logits must be on the device of criterion and fusion, meta, got cpu"):
        criterion(x, target, target)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "fresh"])
@pytest.mark.filterwarnings("ignore:the weights of")
def test_timms_average_keeps_everything(kind):
    ema = pytest.importorskip("timm.utils").ModelEmaV3
    both = nn.ModuleDict({"model": KINDS[kind]()})
    both["criterion"] = QMFLoss(both["model"].fusion, 60, start_epoch=2)
    average = ema(both, decay=0.5)
    assert average.module["criterion"].fusion is average.module["model"].fusion
    logits, target = clean_data(m=2, n=60, dtype=torch.float32)
    for _ in range(3):
        both["criterion"](list(logits), target, torch.arange(60))
        average.update(both)
    torch.testing.assert_close(outputs(average.module["model"]), outputs(both["model"]), rtol=0.1, atol=0.1)
    kept, own = (x["model"].fusion.calibration.state_dict() for x in (average.module, both))
    torch.testing.assert_close(dict(kept), dict(own))
    kappa = average.module.train()["criterion"].ranking.kappa(torch.arange(60))
    assert torch.isfinite(kappa).all()
    assert (kappa.min(), kappa.max()) == (0, 1)
