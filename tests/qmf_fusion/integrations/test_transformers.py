"""Under Transformers' Trainer: trained from columns, saved, resumed and loaded with everything."""

import pytest
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel, Trainer, TrainingArguments

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion
from qmf_fusion.integrations import IndexedDataset
from qmf_fusion.integrations.transformers import FusionForTrainer, FusionTrainer

pytestmark = pytest.mark.filterwarnings("ignore")


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.EmbeddingBag(9, 3)

    def forward(self, input_ids, attention_mask):
        return self.embed(input_ids, per_sample_weights=None) * attention_mask.any(-1, True)


def build():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = FusionModel({"image": nn.Linear(4, 3), "text": Text()}, fusion="robust", num_classes=3)
    columns = {"image": "pixel_values", "text": ["input_ids", "attention_mask"]}
    return FusionForTrainer(model, QMFLoss(model.fusion, 12), columns)


def rows():
    g = torch.Generator().manual_seed(0)
    return [
        {
            "pixel_values": torch.randn(4, generator=g) + nn.functional.one_hot(torch.tensor(i % 3), 4),
            "input_ids": torch.full((2,), i % 3), "attention_mask": torch.ones(2), "labels": i % 3,
        }
        for i in range(12)
    ]  # fmt: skip


def arguments(folder, epochs=2, **options):
    fixed = {
        "per_device_train_batch_size": 4, "use_cpu": True, "report_to": [], "seed": 1, "disable_tqdm": True,
        "save_strategy": "epoch", "eval_strategy": "epoch", "logging_strategy": "epoch", "remove_unused_columns": False,
    }  # fmt: skip
    return TrainingArguments(str(folder), num_train_epochs=epochs, **{**fixed, **options})


def fit(module, folder, epochs=2, resume=None):
    trainer = FusionTrainer(
        module, arguments(folder, epochs), train_dataset=IndexedDataset(rows()), eval_dataset=rows()
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def same(a, b):
    torch.testing.assert_close(dict(a.state_dict()), dict(b.state_dict()), rtol=0, atol=0)


def test_trains_from_columns_logs_saves_and_resumes(tmp_path):
    module = build()
    trainer = fit(module, tmp_path / "whole")
    assert module.criterion.ranking.trajectory.count.sum() == 2 * 2 * 12  # and none in evaluation
    logged = {key for entry in trainer.state.log_history for key in entry}
    whats = ("weight", "r", "absent", "broken", "p_clean_below_half")
    names = {f"{what}/{name}" for what in whats for name in ("image", "text")}
    assert names | {f"eval_{name}" for name in names} <= logged
    resumed = build()
    (first, _) = sorted((tmp_path / "whole").glob("checkpoint-*"))
    fit(resumed, tmp_path / "rest", resume=str(first))
    same(resumed, module)
    predicted = trainer.predict(rows())
    assert predicted.predictions.shape == (12, 3)


def test_what_would_go_wrong_is_told_at_the_door(tmp_path):
    with pytest.raises(ValueError, match="remove_unused_columns must be False"):
        FusionTrainer(build(), arguments(tmp_path, remove_unused_columns=True, eval_strategy="no"))
    with pytest.raises(ValueError, match="must hold a QMFLoss as a submodule"):
        FusionTrainer(nn.Linear(2, 2), arguments(tmp_path, eval_strategy="no"))
    model = build().model
    with pytest.raises(ValueError, match=r"criterion must be of the model's fusion: QMFLoss\(model.fusion, ...\)"):
        FusionForTrainer(model, QMFLoss(QualityAwareFusion(2), 12))
    with pytest.raises(ValueError, match=r"columns must be of the modalities \['image', 'text'\], got \['image'\]"):
        FusionForTrainer(model, QMFLoss(model.fusion, 12), {"image": "x"})


def test_an_absent_column_is_an_absent_modality():
    module = build().eval()
    batch = {key: torch.stack([torch.as_tensor(row[key]) for row in rows()]) for key in rows()[0]}
    present = torch.rand(12, 2) > 0.5
    present[:, 0] = True
    out = module(**batch, present=present)
    expected = module.model(
        {"image": batch["pixel_values"], "text": {k: batch[k] for k in ("input_ids", "attention_mask")}}, present.T
    )
    assert torch.equal(out["logits"], expected.logits)
    alone = module(pixel_values=batch["pixel_values"])
    assert torch.equal(alone["logits"], module.model({"image": batch["pixel_values"]}).logits)


class Config(PretrainedConfig):
    model_type = "fused"


class Whole(PreTrainedModel):
    """As one's own model holds both."""

    config_class = Config

    def __init__(self, config):
        super().__init__(config)
        self.model = FusionModel({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)}, fusion="robust", num_classes=3)
        self.criterion = QMFLoss(self.model.fusion, 12, start_epoch=2)
        self.post_init()

    def forward(self, a, b, labels=None, index=None):
        out = self.model([a, b])
        loss = None if labels is None else self.criterion(out, labels, index if self.training else None).loss
        return {"loss": loss, "logits": out.logits}


def test_from_pretrained_keeps_everything(tmp_path):
    module = Whole(Config())
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 4, generator=g)
    data = [{"a": x[0, i], "b": x[1, i], "labels": i % 3} for i in range(12)]
    options = {"remove_unused_columns": True, "eval_strategy": "no"}
    trainer = Trainer(module, arguments(tmp_path / "run", **options), train_dataset=IndexedDataset(data))
    trainer.train()
    module.model.fusion.calibrate(module.model(list(x)), torch.arange(12) % 3)
    module.save_pretrained(tmp_path / "saved")
    other, info = Whole.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not any(info.values())
    same(other, module)
    assert other.criterion.ranking.trajectory.count.sum() == 2 * 12
    assert other.model.fusion.calibration.found()
    assert torch.equal(other.eval()(*x)["logits"], module.eval()(*x)["logits"])
    # What no checkpoint holds was left uninitialised where the model was built, and must not be part of the history.
    spare = [name for name, _ in other.named_buffers() if name not in other.state_dict()]
    assert spare == ["criterion.ranking.trajectory.mark"]
    half = Whole.from_pretrained(tmp_path / "saved", dtype=torch.bfloat16)
    assert half.criterion.ranking.trajectory.history.dtype == torch.float64


class Loose(Whole):
    """Whose forward takes whatever comes, as most models' does."""

    def forward(self, a, b, labels=None, index=None, **_):
        return super().forward(a, b, labels, index)


@pytest.mark.parametrize("own", [False, True])
def test_accumulated_gradients_are_those_of_the_mean(own, tmp_path):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(2, 12, 4, generator=g)
    data = [{"a": x[0, i], "b": x[1, i], "labels": i % 3} for i in range(12)]
    moved = []
    for rows_at_once, steps in ((12, 1), (6, 2)):
        torch.manual_seed(0)
        module = Loose(Config()) if own else None
        if module is None:
            model = FusionModel({"a": nn.Linear(4, 3), "b": nn.Linear(4, 3)})
            module = FusionForTrainer(model, QMFLoss(model.fusion, 12))
        before = module.model.heads["a"].weight.detach().clone()
        options = {
            "per_device_train_batch_size": rows_at_once, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0,
            "optim": "sgd", "learning_rate": 1.0, "lr_scheduler_type": "constant", "eval_strategy": "no",
            "save_strategy": "no",
        }  # fmt: skip
        FusionTrainer(module, arguments(tmp_path, 1, **options), train_dataset=IndexedDataset(data)).train()
        moved.append(module.model.heads["a"].weight.detach() - before)
    torch.testing.assert_close(*moved)
