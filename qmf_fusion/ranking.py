"""The ranking loss with its memory (Eq. 14 to 17): weights should order samples as their loss histories do."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from qmf_kernels import FORMS, PAIRS

from . import functional
from .checks import check_choice, check_floating
from .trajectory import RESCALES, LossTrajectory

UPDATES = ("after", "before")


class TrajectoryRankingLoss(nn.Module):
    """Score a batch's weights against the losses of past visits, and remember this batch's losses.

    Args:
        num_samples: N, the size of the training set; None for none, to ``resize``.
        num_modalities: M.
        form: ``"paper"``, ``"margin"`` or ``"released"``; see ``functional.ranking_loss``.
        pairs: ``"adjacent"`` or ``"all"``.
        rescale: ``"minmax"`` scales kappa to [0, 1] over the samples seen so far, per modality; None leaves the losses.
        start_epoch: ``T_s`` of Eq. 14, counted from 1, in a sample's own visits.
        sampling_count: ``T`` of Eq. 14, how many losses of a sample count; None for all.
        update: when this batch's losses enter kappa. ``"after"`` it is scored: kappa holds past visits alone, as in the
            released RGB-D code. ``"before"``: kappa holds this visit too, as in the paper's Algorithm 1 and the
            released text-image code.

    A sample without a history is in no pair that counts.

    Raises:
        ValueError: an option out of the above.

    Example:
        >>> rank = TrajectoryRankingLoss(num_samples=4, num_modalities=1)
        >>> index, losses = torch.tensor([0, 1]), torch.tensor([[0.2, 2.0]])
        >>> rank(torch.tensor([[0.1, 0.5]]), losses, index)  # nothing to compare with yet
        tensor(0.)
        >>> rank(torch.tensor([[0.1, 0.5]]), losses, index)  # the harder sample weighs more
        tensor(1.4000)
    """

    def __init__(
        self,
        num_samples: int | None,
        num_modalities: int,
        form: str = "paper",
        pairs: str = "adjacent",
        rescale: str | None = "minmax",
        start_epoch: int = 1,
        sampling_count: int | None = None,
        update: str = "after",
    ) -> None:
        super().__init__()
        check_choice("form", form, FORMS)
        check_choice("pairs", pairs, PAIRS)
        check_choice("rescale", rescale, RESCALES)
        check_choice("update", update, UPDATES)
        self.form, self.pairs, self.rescale, self.update = form, pairs, rescale, update
        self.trajectory = LossTrajectory(num_samples, num_modalities, start_epoch, sampling_count)

    @property
    def num_samples(self) -> int:
        return self.trajectory.num_samples

    def resize(self, num_samples: int) -> None:
        """Grow the trajectory to ``num_samples`` without losing history."""
        self.trajectory.resize(num_samples)

    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge the histories of all processes, usually at the end of an epoch; see ``LossTrajectory.sync``."""
        self.trajectory.sync(group)

    def kappa(self, index: Tensor) -> Tensor:
        """Eq. 14 for the samples ``index``, ``[M, B]``, scaled as ``rescale`` says; NaN without a history."""
        return self.trajectory.kappa(index, self.rescale)

    def forward(self, weights: Tensor, losses: Tensor, index: Tensor) -> Tensor:
        """The ranking loss of a batch, a scalar; in training mode, with gradients on, its losses are recorded.

        Args:
            weights: ``[M, B]``, floating point.
            losses: ``[M, B]``, each sample's loss in each modality; no gradient flows into them.
            index: int ``[B]``, dataset indices from 0 to N - 1.

        Raises:
            TypeError, ValueError, IndexError: arguments of the wrong kind, shape, dtype or range.
        """
        num, device = self.trajectory.num_modalities, self.trajectory.history.device
        for name, x in (("weights", weights), ("losses", losses)):
            check_floating(name, x)
            if x.dim() != 2 or len(x) != num or x.shape != weights.shape:
                raise ValueError(f"{name} must be [{num}, B], the same B for both, got {tuple(x.shape)}")
            if x.device != device:
                raise ValueError(f"{name} must be on the trajectory's device {device}, got {x.device}")
        if weights.shape[1] == 0:
            raise ValueError("weights must not be empty: the batch has no samples")
        index = self.trajectory.check_index(index, weights.shape[1])
        learns = self.training and torch.is_grad_enabled()
        if learns and self.update == "before":
            self.trajectory.record_checked(losses.detach(), index)
        # A modality that is absent from a sample, or broken, has no finite loss there and takes part in no pair.
        kappa = torch.where(torch.isfinite(losses), self.trajectory.kappa_checked(index, self.rescale), torch.nan)
        loss = functional.ranking_loss(weights, kappa, form=self.form, pairs=self.pairs)
        if learns and self.update == "after":
            self.trajectory.record_checked(losses.detach(), index)
        return loss

    def extra_repr(self) -> str:
        return f"form={self.form!r}, pairs={self.pairs!r}, rescale={self.rescale!r}, update={self.update!r}"
