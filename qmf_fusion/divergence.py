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
        self.stepped = False  # whether anything should have been recorded since

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
        if not self.stepped or trajectory.history.is_meta:
            return
        if trajectory.visits is not None and int(trajectory.visits.max()) < trajectory.start_epoch:
            return  # no visit has been one to record
        recorded, before, steps = trajectory.count.sum(1).tolist(), self.recorded, self.steps - self.looked
        since = f" of the last {steps} training steps" if steps else ""
        for name, now, then in zip(self.names, recorded, before, strict=True):
            if now == then:
                text = f"no row of modality {name!r} counts{since}, after {int(then)} that did"
                self._say(name, text)
        self.recorded, self.looked, self.stepped = recorded, self.steps, False

    def count_step(self, trajectory: LossTrajectory) -> None:
        """After a step whose losses are recorded."""
        self.stepped = True
        if torch.compiler.is_compiling() or self.steps - self.looked < LOOK_EVERY:
            return
        if not (trajectory.history.is_cuda and torch.cuda.is_current_stream_capturing()):
            self.look(trajectory)

    def _say(self, name: str, what: str) -> None:
        if name not in self.said:
            self.said.add(name)
            warn_user(f"{what}: {_ADVICE}")
