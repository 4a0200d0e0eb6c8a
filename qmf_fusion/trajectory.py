"""The loss trajectory ``kappa`` (Eq. 14): the mean of each sample's past unimodal losses, kept with the model."""

from collections.abc import Iterable
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

import qmf_kernels

from .checks import can_look, check_choice, check_count, check_integers
from .precision import KeepsPrecision
from .processes import place_of_process
from .warn import warn_once

RESCALES = ("minmax", None)


class LossTrajectory(KeepsPrecision):
    """Per modality and sample, the sum and the count of the losses recorded so far.

    Sums are float64, so that float32 losses add up exactly, in whatever order. They live in ``state_dict`` and move
    with ``.to()``.

    Args:
        num_samples: N, the size of the training set, at least 1; None for a history of nothing, to ``resize``.
        num_modalities: M, at least 1.
        start_epoch: ``T_s`` of Eq. 14, counted from 1. A sample's own visits stand for epochs: the losses of its first
            ``start_epoch - 1`` visits are not recorded. One that stands in a batch twice has visited twice.
        sampling_count: ``T`` of Eq. 14, at least 1: how many losses of each sample count, the first ones from
            ``start_epoch`` on; None for all. A sample that stands in a batch twice may count once more.

    Raises:
        ValueError: a count below 1.

    Example:
        >>> trajectory = LossTrajectory(num_samples=3, num_modalities=1)
        >>> trajectory.record(torch.tensor([[2.0, 4.0]]), torch.tensor([0, 2]))
        >>> trajectory.kappa(torch.tensor([0, 1, 2]))
        tensor([[0., nan, 1.]], dtype=torch.float64)
    """

    history: Tensor
    low: Tensor
    span: Tensor
    visits: Tensor | None
    mark: Tensor

    def __init__(
        self, num_samples: int | None, num_modalities: int, start_epoch: int = 1, sampling_count: int | None = None
    ) -> None:
        super().__init__()
        num_samples = 0 if num_samples is None else check_count("num_samples", num_samples)
        num_modalities = check_count("num_modalities", num_modalities)
        self.start_epoch = start_epoch = check_count("start_epoch", start_epoch)
        self.sampling_count = None if sampling_count is None else check_count("sampling_count", sampling_count)
        # Sums and counts in one tensor, [2, M, N], for one gather and one scatter a step; counts stay exact to 2^53.
        self.register_buffer("history", torch.zeros(2, num_modalities, num_samples, dtype=torch.float64))
        # The smallest mean loss per modality, over the samples that have one, and the largest's distance from it.
        self.register_buffer("low", torch.full((num_modalities, 1), torch.inf, dtype=torch.float64))
        self.register_buffer("span", torch.ones(num_modalities, 1, dtype=torch.float64))
        self._find_range()
        self.register_buffer("visits", torch.zeros(num_samples, dtype=torch.int64) if start_epoch > 1 else None)
        # What all processes agreed on last, None while that is all there is; each one's own records are the difference.
        # No buffer: a loader that fills buffers without load_state_dict could not know of it.
        self._agreed: Tensor | None = None
        # Of a process that has records of its own, its rank + 1: a buffer that another process overwrites shows by it.
        self.register_buffer("mark", torch.zeros((), dtype=torch.int64), persistent=False)
        self._rows = self._rows_since_sync = 0  # recorded by this process: since it last looked, and since sync()
        self._told: set[str] = set()
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def num_samples(self) -> int:
        return self.history.shape[2]

    @property
    def num_modalities(self) -> int:
        return self.history.shape[1]

    @property
    def total(self) -> Tensor:
        """Sums of the losses recorded, ``[M, N]`` float64."""
        return self.history[0]

    @property
    def count(self) -> Tensor:
        """How many losses are recorded, ``[M, N]`` float64."""
        return self.history[1]

    def check_index(self, index: Tensor, batch: int | None = None) -> Tensor:
        """``index`` as int64 ``[B]``, within the trajectory and on its device; ``batch`` is B, None for any."""
        check_integers("index", index, "dataset")
        if index.dim() != 1 or (batch is not None and batch != len(index)):
            wanted = "B" if batch is None else batch
            raise ValueError(f"index must be [{wanted}], one dataset index per sample, got {tuple(index.shape)}")
        if len(index) == 0:
            raise ValueError("index must not be empty: the batch has no samples")
        if index.device != self.history.device:
            raise ValueError(f"index must be on the trajectory's device {self.history.device}, got {index.device}")
        if can_look(index):
            # Python finds the extremes of a few numbers faster than a call to PyTorch is made.
            values = index.tolist() if len(index) <= 128 else [x.item() for x in torch.aminmax(index)]
            low, high, num = min(values), max(values), self.num_samples
            if low < 0 or high >= num:
                raise IndexError(f"index must be within the trajectory's {num} samples, got {low} to {high}")
        return index.long()

    def record(self, losses: Tensor, index: Tensor) -> None:
        """Add a batch of losses ``[M, B]`` at the dataset indices ``[B]``, repeated ones each counted.

        A loss that is not finite (an absent modality's is NaN) is left out.

        Raises:
            TypeError, ValueError, IndexError: losses of the wrong shape, or an index of the wrong kind, shape or range.
        """
        if losses.dim() != 2 or len(losses) != self.num_modalities:
            raise ValueError(f"losses must be [{self.num_modalities}, B], got {tuple(losses.shape)}")
        self.record_checked(losses.detach(), self.check_index(index, losses.shape[1]))

    def record_checked(self, losses: Tensor, index: Tensor) -> None:
        """``record`` without its checks."""
        self._begin(len(index))
        if self.sampling_count is not None:
            # What is not finite is left out.
            losses = torch.where(self.history[1][:, index] >= self.sampling_count, torch.nan, losses)
        qmf_kernels.record(self.history, self.low, self.span, self.visits, self.start_epoch, losses, index)

    def kappa(self, index: Tensor, rescale: str | None = "minmax") -> Tensor:
        """``kappa`` of the samples ``index`` ``[B]``: ``[M, B]``, NaN where nothing is recorded.

        With ``rescale="minmax"``, scaled per modality to [0, 1] over all samples that have a history (0 where they are
        all equal); with None, the mean losses themselves.

        Raises:
            TypeError, ValueError, IndexError: an index of the wrong kind, shape or range.
        """
        check_choice("rescale", rescale, RESCALES)
        return self.kappa_checked(self.check_index(index), rescale)

    def kappa_checked(self, index: Tensor, rescale: str | None) -> Tensor:
        """``kappa`` without its checks."""
        return qmf_kernels.kappa(self.history, self.low, self.span, index, rescale is not None)

    def past(self, index: Tensor, rescale: str | None, *, ranks: bool, records: bool) -> qmf_kernels.Past:
        """The history for a step of the objective on checked indices, which reads and records in its own launches.

        Such a step knows no ``sampling_count``: with one, it must not record.
        """
        if records:
            self._begin(len(index))
        tensors = (self.history, self.low, self.span, self.visits, index)
        return qmf_kernels.Past(*tensors, self.start_epoch, rescale is not None, ranks, records)

    @torch.no_grad()
    def sync(self, group: dist.ProcessGroup | None = None) -> None:
        """Merge what each process has recorded since the last time, so that all hold the whole history.

        A collective: every process of the group calls it, usually at the end of an epoch. Samples that a sampler gave
        to several processes count as often as they were visited. In a single process it does nothing. ``visits``
        (``start_epoch`` above 1) are merged as the largest, as a sample's visits are its epochs.

        ``DistributedDataParallel`` copies the buffers of what it wraps from its first process into all others at every
        forward, and what those have recorded is lost: leave the history out of it, or pass ``broadcast_buffers=False``.

        A process that finds its buffers overwritten warns of it: here, when the history leaves training mode, or when
        an epoch's samples have been recorded. One that never calls this is told after two such epochs.
        """
        if place_of_process(group)[1] == 1:
            return
        self._look()
        agreed = self.history if self._agreed is None else self._agreed.to(self.history.device)
        added = self.history - agreed
        dist.all_reduce(added, group=group)
        self.history.copy_(agreed + added)
        if self.visits is not None:
            dist.all_reduce(self.visits, op=dist.ReduceOp.MAX, group=group)
        self._agreed, self._rows_since_sync = self.history.clone(), 0
        self.mark.fill_(1 + place_of_process()[0])
        self._find_range()

    def _begin(self, rows: int) -> None:
        """Before this process records ``rows``."""
        rank, processes = place_of_process()
        if processes == 1:
            return
        if self._agreed is None:
            self._agreed = self.history.clone()
            self.mark.fill_(1 + rank)
        if torch.compiler.is_compiling():
            return
        self._rows += rows
        self._rows_since_sync += rows
        if self._rows * processes >= self.num_samples:
            self._look()
        if self._rows_since_sync * processes > 2 * self.num_samples:
            warn_once(
                self._told,
                "sync() was not called in two epochs: each process ranks by the losses that it has seen itself. Call "
                "criterion.ranking.sync() at the end of every epoch, in every process",
            )

    def _look(self) -> None:
        """Warn where another process has overwritten the buffers; waits for a device."""
        if self.mark.is_cuda and torch.cuda.is_current_stream_capturing():
            return
        self._rows = 0
        if self._agreed is None or self.mark.is_meta or int(self.mark) == 1 + place_of_process()[0]:
            return
        # One copy, when the model is wrapped anew, would do no harm; it looks the same from here.
        warn_once(
            self._told,
            "the loss history was overwritten by another process's: leave QMFLoss out of DistributedDataParallel, or "
            "pass broadcast_buffers=False (unless that was constructed anew since)",
        )

    def train(self, mode: bool = True) -> Self:
        """Leaving training mode looks whether another process has overwritten the history.

        Training mode finds the history's range anew, which whoever averages buffers does not average rightly.
        """
        if self.training and not mode:
            self._look()
        if mode and not self.history.is_meta:
            self._find_range()
        return super().train(mode)

    @torch.no_grad()
    def load_sums(self, sums: Any, visits: int | Tensor) -> None:
        """Take over a history that was kept elsewhere, such as the released code's ``History.correctness``.

        Args:
            sums: each sample's losses so far, added up: ``[M, N]``, or M arrays ``[N]``, of NumPy too.
            visits: how many losses that is: one number for every sample that has any, that is a sum other than 0; or
                a tensor ``[N]`` or ``[M, N]``, where 0 is none.

        Raises:
            TypeError, ValueError: sums that are no sequence, or sums or visits of another shape than this trajectory's,
                negative or not finite.

        Example:
            >>> trajectory = LossTrajectory(num_samples=3, num_modalities=2)
            >>> trajectory.load_sums([[2.0, 0.0, 6.0], [4.0, 0.0, 1.0]], visits=2)
            >>> trajectory.kappa(torch.arange(3), rescale=None)
            tensor([[1.0000,    nan, 3.0000],
                    [2.0000,    nan, 0.5000]], dtype=torch.float64)
        """
        shape = self.total.shape
        if not isinstance(sums, Iterable):
            raise TypeError(f"sums must be M rows of N numbers, got {type(sums).__name__}")
        rows = [torch.as_tensor(row, dtype=torch.float64) for row in sums]
        total = torch.stack(rows) if rows and all(row.shape == rows[0].shape for row in rows) else torch.empty(0)
        if total.shape != shape:
            raise ValueError(f"sums must be {tuple(shape)}, got {[tuple(row.shape) for row in rows]}")
        if not isinstance(visits, Tensor):
            visits = torch.where(total != 0, check_count("visits", visits), 0)
        if visits.shape not in (shape, shape[1:]):
            raise ValueError(f"visits must be {tuple(shape)} or {tuple(shape[1:])}, got {tuple(visits.shape)}")
        count = visits.to(total).expand(shape)
        for name, x in (("sums", total), ("visits", count)):
            if not bool(((x >= 0) & (x < torch.inf)).all()):
                raise ValueError(f"{name} must be finite and at least 0")
        self.history.copy_(torch.stack([torch.where(count > 0, total, 0), count]))
        if self.visits is not None:
            most = count.amax(0)
            self.visits.copy_(torch.where(most > 0, most + self.start_epoch - 1, 0))
        self._agreed = None
        self._find_range()

    def resize(self, num_samples: int) -> None:
        """Grow to ``num_samples``, with no history for the new ones; a ValueError for fewer than there are."""
        num_samples = check_count("num_samples", num_samples)
        added = num_samples - self.num_samples
        if added < 0:
            raise ValueError(f"num_samples must be at least the present {self.num_samples}, got {num_samples}")
        for name in ("history", "visits", "_agreed"):
            old = getattr(self, name)
            if old is not None:
                setattr(self, name, torch.cat([old, old.new_zeros(*old.shape[:-1], added)], -1))
        self._find_range()

    def _find_range(self) -> None:
        if self.num_samples:
            qmf_kernels.find_range(self.history, self.low, self.span)

    def extra_repr(self) -> str:
        sizes = f"num_samples={self.num_samples}, num_modalities={self.num_modalities}"
        return f"{sizes}, start_epoch={self.start_epoch}, sampling_count={self.sampling_count}"


def _after_load(trajectory: LossTrajectory, _: object) -> None:
    """A checkpoint holds what all processes agreed on; its range may have been another device's or release's."""
    trajectory._find_range()
    if trajectory.mark.is_meta:  # where the module was built; no checkpoint holds it
        trajectory.mark = torch.zeros_like(trajectory.mark, device=trajectory.history.device)
    trajectory._agreed = None
