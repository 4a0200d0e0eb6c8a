"""Training with Transformers' Trainer: a module that computes the loss from columns, and a trainer that logs."""

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise ImportError("qmf_fusion.integrations.transformers needs Transformers: pip install transformers") from error

from ..model import FusionModel
from ..objective import QMFLoss
from .monitor import FusionMonitor, criteria_of
from .parallel import leave_history_out


class FusionForTrainer(nn.Module):
    """A model and its criterion in one module, which takes a batch's columns and returns loss and logits.

    Its ``state_dict`` holds both without shared tensors, so that the Trainer saves and resumes everything: weights,
    loss history, statistics, calibration.

    Args:
        model: the ``FusionModel``.
        criterion: of its fusion.
        columns: by modality's name, the column that its head takes, or the columns, as its keyword arguments; by
            default a column of the modality's own name. A modality of which a batch has no column is absent from it.

    The columns ``labels``, ``index`` (see ``IndexedDataset``) and ``present`` (``[B, M]``, as every column has the
    batch first) are the criterion's; the index counts in training alone.

    Raises:
        ValueError: a criterion of another fusion, or columns of other modalities.

    Example:
        >>> import torch
        >>> model = FusionModel({"rgb": nn.Linear(8, 3), "depth": nn.Linear(4, 3)})
        >>> both = FusionForTrainer(model, QMFLoss(model.fusion, 2), {"rgb": "pixel_values", "depth": "depth"})
        >>> out = both(pixel_values=torch.randn(2, 8), depth=torch.randn(2, 4), labels=torch.tensor([0, 2]),
        ...            index=torch.tensor([0, 1]))
        >>> out["logits"].shape
        torch.Size([2, 3])
    """

    accepts_loss_kwargs = False
    """Tells the Trainer to divide the loss, a batch's mean, by the steps that gradients are accumulated over."""

    def __init__(
        self, model: FusionModel, criterion: QMFLoss, columns: Mapping[str, str | Sequence[str]] | None = None
    ) -> None:
        super().__init__()
        if criterion.fusion is not model.fusion:
            raise ValueError("criterion must be of the model's fusion: QMFLoss(model.fusion, ...)")
        columns = {name: name for name in model.names} if columns is None else dict(columns)
        if set(columns) != set(model.names):
            raise ValueError(f"columns must be of the modalities {list(model.names)}, got {list(columns)}")
        self.model, self.criterion, self.columns = model, criterion, columns

    def forward(
        self, labels: Tensor | None = None, index: Tensor | None = None, present: Tensor | None = None, **batch: Any
    ) -> dict[str, Tensor]:
        """``loss``, where there are labels, and fused ``logits``."""
        out = self.model(
            {name: self._input(batch, columns) for name, columns in self.columns.items()},
            None if present is None else present.T,
        )
        if labels is None:
            return {"logits": out.logits}
        losses = self.criterion(out, labels, index if self.training else None)
        return {"loss": losses.loss, "logits": out.logits}

    @staticmethod
    def _input(batch: Mapping[str, Any], columns: str | Sequence[str]) -> Any:
        if isinstance(columns, str):
            return batch.get(columns)
        given = {column: batch[column] for column in columns if column in batch}
        return given or None


class FusionTrainer(Trainer):
    """Transformers' Trainer for a model that holds a ``QMFLoss``, as ``FusionForTrainer`` or a model of one's own does.

    It keeps the processes' loss histories their own and merges them at each epoch's end, and adds what
    ``FusionMonitor`` finds to the logs, as ``weight/rgb`` and ``eval_weight/rgb``. Takes what ``Trainer`` takes;
    ``remove_unused_columns`` must be False for ``FusionForTrainer``, whose columns no signature tells.

    Raises:
        ValueError: a model without a criterion, or with one of another fusion; columns that would be removed.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        model = self.model
        assert isinstance(model, nn.Module)
        self.monitors = [FusionMonitor(criterion).attach() for criterion in criteria_of(model)]
        if isinstance(model, FusionForTrainer) and self.args.remove_unused_columns:
            raise ValueError("remove_unused_columns must be False: TrainingArguments(..., remove_unused_columns=False)")
        if not hasattr(model, "accepts_loss_kwargs"):
            self.model_accepts_loss_kwargs = False  # whatever its forward takes: QMFLoss is a mean over the batch
        leave_history_out(model)
        self.add_callback(_Sync(self.monitors))

    def log(self, logs: dict[str, Any], *args: Any, **options: Any) -> None:
        evaluated = "eval_loss" in logs
        if evaluated or "loss" in logs:
            for monitor in self.monitors:
                found = monitor.compute(training=not evaluated)
                logs.update({f"eval_{name}" if evaluated else name: value for name, value in found.items()})
        super().log(logs, *args, **options)


class _Sync(TrainerCallback):
    def __init__(self, monitors: list[FusionMonitor]) -> None:
        self.monitors = monitors

    def on_epoch_end(self, *_: Any, **__: Any) -> None:
        for monitor in self.monitors:
            monitor.criterion.ranking.sync()
