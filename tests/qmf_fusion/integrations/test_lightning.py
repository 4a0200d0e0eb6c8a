"""Under Lightning: everything is logged, saved, averaged and configured."""

import copy

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch import callbacks
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.integrations import IndexedDataset
from qmf_fusion.integrations.lightning import FusionCallback

pytestmark = pytest.mark.filterwarnings("ignore")
NAMES = ("a", "b")


class Lit(pl.LightningModule):
    def __init__(self, fusion: QualityAwareFusion, num_samples: int = 12):
        super().__init__()
        self.model = FusionModel({name: nn.Linear(4, 3) for name in NAMES}, fusion)
        self.criterion = QMFLoss(self.model.fusion, num_samples, start_epoch=2)

    def step(self, batch):
        a, b, y, *index = batch
        return self.criterion(self.model([a, b]), y, *(index if self.training else [])).loss

    def training_step(self, batch, _):
        return self.step(batch)

    def validation_step(self, batch, _):
        self.step(batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


class Wrapping(pl.LightningModule):
    def __init__(self, model: FusionModel):
        super().__init__()
        self.model = model


def data():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(12) % 3
    x = torch.randn(2, 12, 4, generator=g) + nn.functional.one_hot(y, 4)
    return TensorDataset(*x, y)


def fit(module, *added, folder=None, epochs=3, **options):
    trainer = pl.Trainer(
        max_epochs=epochs, accelerator="cpu", callbacks=[FusionCallback(), *added], enable_progress_bar=False,
        enable_model_summary=False, logger=False if folder is None else CSVLogger(folder), log_every_n_steps=1,
        enable_checkpointing=folder is not None, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(module, DataLoader(IndexedDataset(data()), 6), DataLoader(data(), 6), **options)
    return trainer


def robust():
    return QualityAwareFusion.robust(NAMES, 3)


def assert_same(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


def test_everything_is_logged_saved_and_resumed(tmp_path):
    torch.manual_seed(0)
    module = Lit(robust())
    start = copy.deepcopy(module)
    trainer = fit(module, folder=tmp_path)
    logged = trainer.logged_metrics
    expected = {
        f"{stage}/{what}/{name}"
        for stage in ("train", "val")
        for what in ("weight", "r", "absent", "broken", "p_clean_below_half")
        for name in NAMES
    }
    assert expected <= set(trainer.callback_metrics) | set(logged)
    columns = next(iter(tmp_path.glob("**/metrics.csv"))).read_text().splitlines()[0].split(",")
    assert expected <= set(columns)
    assert module.criterion.ranking.trajectory.count.sum() == 2 * 2 * 12  # not at the first visits, nor in validation

    halfway = copy.deepcopy(start)
    fit(halfway, folder=tmp_path / "half", epochs=2)
    (path,) = (tmp_path / "half").glob("**/*.ckpt")
    resumed = copy.deepcopy(start)
    fit(resumed, folder=tmp_path / "rest", ckpt_path=path)
    assert_same(resumed, module)
    with torch.no_grad():
        a, b, y = data().tensors
        module.eval().model.fusion.calibrate(module.model([a, b]), y)
    torch.save(module.state_dict(), tmp_path / "calibrated.pt")
    resumed.load_state_dict(torch.load(tmp_path / "calibrated.pt"))
    assert_same(resumed, module)
    assert resumed.model.fusion.calibration.found()


AVERAGES = {
    "EMA": lambda: callbacks.EMAWeightAveraging(decay=0.5),
    "weights": lambda: callbacks.WeightAveraging(),
    "SWA": lambda: callbacks.StochasticWeightAveraging(swa_lrs=0.01, swa_epoch_start=1),
}


@pytest.mark.parametrize("rule", ["robust", pytest.param("energy", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "average", ["EMA", *(pytest.param(name, marks=pytest.mark.slow) for name in ("weights", "SWA"))]
)
def test_averages_keep_everything(average, rule):
    module = Lit(robust() if rule == "robust" else QualityAwareFusion(NAMES))
    a, b, y = data().tensors
    module.model.fusion.calibrate(module.model([a, b]), y)
    before = copy.deepcopy(module.model.fusion.calibration.state_dict())
    assert before["static"].all()
    fit(module, AVERAGES[average]())
    torch.testing.assert_close(dict(module.model.fusion.calibration.state_dict()), dict(before))
    trajectory = module.train().criterion.ranking.trajectory
    assert (trajectory.count > 0).all()
    kappa = trajectory.kappa(torch.arange(12))
    assert torch.isfinite(kappa).all()
    assert kappa.min() == 0
    assert kappa.max() == 1
    out = module.eval().model([a, b])
    assert torch.isfinite(out.logits).all()
    module.train()
    module.step((a, b, y, torch.arange(12))).backward()


def test_a_module_without_its_criterion_is_told():
    class Loose(Lit):
        def __init__(self, inside):
            super().__init__(robust())
            if inside:
                self.criterion = QMFLoss(QualityAwareFusion(NAMES), 12)
            else:
                self.loss, self.criterion = [self.criterion], None

    with pytest.raises(ValueError, match=r"Loose must hold a QMFLoss as a submodule, self.criterion = .*, got none"):
        fit(Loose(False))
    with pytest.raises(ValueError, match="Loose's criterion must be of a fusion that is in it too, got one of another"):
        fit(Loose(True))


def test_a_configuration_names_the_recommended_rule(tmp_path):
    pytest.importorskip("jsonargparse")
    from lightning.pytorch.cli import LightningCLI

    path = tmp_path / "config.yaml"
    path.write_text("""
model:
  fusion:
    class_path: qmf_fusion.QualityAwareFusion.robust
    init_args: {modalities: [a, b], num_classes: 3, odds: 0.1}
  num_samples: 12
trainer:
  accelerator: cpu
  logger: false
  callbacks:
    - class_path: qmf_fusion.integrations.lightning.FusionCallback
""")
    cli = LightningCLI(Lit, run=False, args=["--config", str(path)], save_config_callback=None)
    assert cli.model.model.fusion.rule.odds.tolist() == [0.1, 0.1]
    assert any(isinstance(each, FusionCallback) for each in cli.trainer.callbacks)

    linear = "{class_path: torch.nn.Linear, init_args: {in_features: 4, out_features: 3}}"
    path.write_text(f"""
model:
  model:
    class_path: qmf_fusion.FusionModel
    init_args:
      heads: {{a: {linear}, b: {linear}}}
      fusion: robust
      num_classes: 3
trainer: {{accelerator: cpu, logger: false}}
""")
    cli = LightningCLI(Wrapping, run=False, args=["--config", str(path)], save_config_callback=None)
    assert cli.model.model.fusion.rule.kind() == robust().rule.kind()
