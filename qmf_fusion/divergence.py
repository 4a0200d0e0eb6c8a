"""Modalities of which no row counts though some should: said once, where a loss would only fall to 0 in silence."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .trajectory import LossTrajectory
from .warn import warn_user

LOOK_EVERY = 1024  # steps between two looks at what has to be waited for

_ADVICE = (
    "its inputs or logits are not finite. It adds nothing to the loss and learns nothing: its head has probably "
    "diverged. Lower its learning rate, and look for NaN in its inputs and parameters"
)


class RowWatch:
    """Warns once of each modality none of whose rows count.

    In the host's memory every step is looked at; on a device, and in a compiled step, what the loss history has gained
    since the last time, for to look is to wait.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.names = list(names)
        self.said: set[str] = set()
        self.steps = 0  # of those that were not compiled
        self.looked = 0  # how many of them, when the history was looked at last
        self.recorded = [0.0] * len(self.names)  # what it held then
        self.wanted = [False] * len(self.names)  # of which a loss should have been recorded since

    def see(self, counted: Tensor, wanted: Tensor, *, sure: bool = True) -> None:
        """A step's rows in the host's memory, bool ``[M, *]``: which count, and which should (``[*]``: of all).

        If that is not ``sure``, as an absent modality looks the same, it takes a step in which none counts at all.
        """
        some = counted.flatten(1).any(1).tolist()
        if any(some) and not sure:
            return
        rows = wanted.expand(counted.shape).flatten(1).sum(1).tolist()
        for name, there, number in zip(self.names, some, rows, strict=True):
            if number and not there:
                text = f"0 of {number} rows of modality {name!r} count in training step {self.steps}"
                self._say(name, text)

    def look(self, trajectory: LossTrajectory) -> None:
        """What the history has gained; waits for a device."""
        if not any(self.wanted) or trajectory.history.is_meta:
            return
        if trajectory.sampling_count is not None:
            return  # a sample that has all of its losses records no more
        if trajectory.visits is not None and int(trajectory.visits.max()) < trajectory.start_epoch:
            return  # no visit has been one to record
        recorded, before, steps = trajectory.count.sum(1).tolist(), self.recorded, self.steps - self.looked
        since = f" of the last {steps} training steps" if steps else ""
        for name, wanted, now, then in zip(self.names, self.wanted, recorded, before, strict=True):
            if wanted and now == then:
                text = f"no row of modality {name!r} counts{since}, after {int(then)} that did"
                self._say(name, text, " If it was absent from all of them, nothing is wrong")
        self.forget(trajectory)

    def forget(self, trajectory: LossTrajectory) -> None:
        """Take the history as it is, such as after it was loaded, for what there was; waits for a device."""
        if not trajectory.history.is_meta:
            self.recorded = trajectory.count.sum(1).tolist()
        self.looked, self.wanted = self.steps, [False] * len(self.names)

    def count_step(self, trajectory: LossTrajectory, wanted: list[bool] | None = None) -> None:
        """After a step whose losses are recorded, and should be of the modalities ``wanted``: None for all, unseen."""
        every = [True] * len(self.names)
        self.wanted = every if wanted is None else [a or b for a, b in zip(self.wanted, wanted, strict=True)]
        if torch.compiler.is_compiling() or self.steps - self.looked < LOOK_EVERY:
            return
        if not (trajectory.history.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.look(trajectory)

    def _say(self, name: str, what: str, doubt: str = "") -> None:
        if name not in self.said:
            self.said.add(name)
            warn_user(f"{what}: {_ADVICE}.{doubt}" if doubt else f"{what}: {_ADVICE}")
