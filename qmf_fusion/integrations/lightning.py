"""A Lightning callback that synchronises, checks and logs."""

from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("qmf_fusion.integrations.lightning needs Lightning: pip install lightning") from error

from .monitor import FusionMonitor, criteria_of
from .parallel import leave_history_out


class FusionCallback(Callback):
    """For a LightningModule that holds a ``FusionModel`` and a ``QMFLoss`` (``self.criterion = QMFLoss(...)``).

    - Keeps each process's loss history its own under DDP, whose copies of buffers would overwrite it, if the criterion
      is there when ``setup`` is called (built in ``__init__``); and merges the histories before each validation and at
      each epoch's end, so that a checkpoint holds the whole.
    - Checks that the criterion is in the module, which puts it into training and evaluation mode with the model and
      into checkpoints, and that its fusion is, whose weights it trains.
    - Logs what ``FusionMonitor`` finds, as ``train/weight/rgb``, ``val/r/depth`` and so on, at each epoch's end, to
      whatever loggers the trainer has.

    Args:
        log: False leaves the logging out.

    Raises:
        ValueError: at the start of a fit, a validation or a test, where the checks fail.

    Example:
        >>> trainer = Trainer(callbacks=[FusionCallback()], logger=False, barebones=False)  # doctest: +SKIP
    """

    def __init__(self, log: bool = True) -> None:
        self.log = log
        self._monitors: list[FusionMonitor] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        leave_history_out(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        for monitor in self._monitors:
            monitor.detach()
        self._monitors = []

    def _start(self, pl_module: LightningModule) -> None:
        if not self._monitors:
            self._monitors = [FusionMonitor(criterion) for criterion in criteria_of(pl_module)]
            for monitor in self._monitors if self.log else []:
                monitor.attach()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)
        if trainer.training:
            self._sync()  # before a checkpoint that this validation may lead to

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start(pl_module)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._sync()
        self._log(pl_module, "train")

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "val", show=not trainer.sanity_checking)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._log(pl_module, "test")

    def _sync(self) -> None:
        for monitor in self._monitors:
            monitor.criterion.ranking.sync()

    def _log(self, pl_module: LightningModule, stage: str, show: bool = True) -> None:
        for number, monitor in enumerate(self._monitors if self.log else []):
            found: dict[str, Any] = monitor.compute(training=stage == "train")
            stem = stage if len(self._monitors) == 1 else f"{stage}/{number}"
            if show:
                pl_module.log_dict({f"{stem}/{name}": value for name, value in found.items()})
