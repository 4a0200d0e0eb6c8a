"""Calibrating to Theorem 2 (``theory``) on held-out data: what is found, from which data, and Eq. 6 with its way out.

Eq. 5 is ``E(w_m) = w_static_m``, which each rule meets in its own way (``lemma_1``); Eq. 6 ``r(w_m, loss_m) <= 0``.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qmf_kernels.eager.objective import valid_targets

from .correlation_test import judge_correlations
from .logit_norm import normalize_rows
from .precision import KeepsPrecision
from .rows import Features, stack_rows

FITTABLE = ("alpha", "temperature")
SURE = 0.99  # the softmax of the right class from which on a head is sure of it
FEW = 30  # rows of which an able head may be right on all by chance


class Calibration(KeepsPrecision):
    """What ``calibrate`` found for M modalities, ``[M]`` each, in float64: 0 throughout before.

    ``static``: the weights of Eq. 5's right-hand side, which are positive. ``held``: the same where Eq. 6 fails, 0
    where the modality is free.
    """

    static: Tensor
    held: Tensor

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        for name in ("static", "held"):
            # On the CPU whatever the default device, as Eq. 9's constants are.
            self.register_buffer(name, torch.zeros(num_modalities, dtype=torch.float64, device="cpu"))

    def found(self) -> bool:
        """Whether there is a calibration; waits for a device."""
        return bool((self.static > 0).any())

    def set(self, static: Tensor, held: Tensor) -> None:
        self.static.copy_(static)
        self.held.copy_(held)

    def clear(self) -> None:
        self.static.zero_()
        self.held.zero_()

    def extra_repr(self) -> str:
        if self.static.is_meta or not self.found():
            return "none"
        return f"static={[round(v, 4) for v in self.static.tolist()]}"


class CleanData(NamedTuple):
    """Checked held-out data; float64, or float32 where a device has no float64."""

    rows: list[Tensor]  # M of ``[*, K]``, as the rule sees them, with -inf if it takes that; 0 where they do not count
    target: Tensor  # ``[*]``: classes; 0 where none counts
    counted: Tensor  # ``[M, *]`` bool
    losses: Tensor  # ``[M, *]``: each row's unimodal cross-entropy
    features: Features | None = None  # ``[*, D]`` each, where the rule takes some

    def mean(self, values: Tensor) -> Tensor:
        """Each modality's mean of ``[M, *]`` over the rows that count, ``[M]``."""
        dims = tuple(range(1, values.dim()))
        return torch.where(self.counted, values, 0).sum(dims) / self.counted.sum(dims)

    def check_every_modality(self, names: Sequence[str]) -> None:
        missing = [name for name, counted in zip(names, self.counted, strict=True) if not bool(counted.any())]
        if missing:
            raise ValueError(f"logits must hold every modality at least once, got none that counts of {missing}")

    def check_targets(self, names: Sequence[str]) -> None:
        """A ValueError says where -inf rules the target's class out, which no mean and no correlation survives."""
        own = torch.stack(self.rows).gather(-1, self.target.expand(self.counted.shape).unsqueeze(-1)).squeeze(-1)
        lost = ((own == -torch.inf) & self.counted).flatten(1).sum(1).tolist()
        if any(lost):
            rows = {name: n for name, n in zip(names, lost, strict=True) if n}
            raise ValueError(
                f"logits must not be -inf at the target's class, whose loss is infinite, got such rows of {rows}: "
                "leave them out by ignore_index or present, or give finite logits"
            )

    def fitted(self, names: Sequence[str]) -> list[str]:
        """The modalities whose heads are right on all of their rows, at least ``FEW``, as on rows of the training set.

        A ValueError says where all heads are, and sure of every row.
        """
        x = torch.stack(self.rows)
        if x.shape[-1] == 1:  # where nobody can be wrong
            return []
        y = self.target.expand(self.counted.shape).unsqueeze(-1)
        probs = torch.softmax(x, -1)
        own = probs.gather(-1, y).squeeze(-1)
        # A head without an opinion, whose logits are all the same, is not right.
        wrong, unsure = own <= probs.scatter(-1, y, -1).amax(-1), own < SURE
        enough = [int(c.sum()) >= FEW for c in self.counted]
        if all(enough) and not bool((unsure & self.counted).any()):
            raise ValueError(
                "logits must be of held-out data, got heads that are right on every row and sure of it (a softmax of "
                f"{SURE} and more), as on data that they were trained on"
            )
        heads = zip(names, enough, (wrong & self.counted).flatten(1).any(1).tolist(), strict=True)
        return [name for name, many, errs in heads if many and not errs]


def clean_data(
    rows: list[Tensor],
    target: Tensor,
    present: Tensor | None,
    ignore_index: int,
    logit_norm: float | None,
    likelihood: Callable[[Tensor], Tensor] = lambda x: x,
    features: Features | None = None,
    read: Callable[[list[Tensor], Tensor | None], tuple[Tensor, Tensor]] = stack_rows,
) -> CleanData:
    """Held-out data from what ``check_batch`` returns; losses are of what ``likelihood`` makes of the rows.

    Rows count where the rule's ``read`` counts them. An IndexError says which target is no class.
    """
    if target.is_meta:
        raise ValueError("logits must hold values, got tensors on the meta device")
    wide = torch.float32 if target.device.type == "mps" else torch.float64
    rows = normalize_rows([row.detach().to(wide) for row in rows], logit_norm)
    x, counted = read(rows, present)
    # On the CPU, where a target that is no class raises rather than stops the device.
    valid = valid_targets(target.cpu(), x.shape[-1], ignore_index)
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid.to(target.device)
    target = torch.where(valid, target, 0)
    losses = -torch.log_softmax(likelihood(x), -1).gather(-1, target.expand(counted.shape).unsqueeze(-1)).squeeze(-1)
    return CleanData(list(x), target, counted & valid, losses, features)


def excess(weights: Tensor, static: Tensor, data: CleanData) -> Tensor:
    """What must not correlate with the loss (Eq. 6), ``[M, *]``, of weights and the static rule's, ``[M, *]`` both.

    The weights, where each static one is a constant. Shares of static weights are none where modalities are absent:
    then it is what the weights have over them, and 0 for a modality that has nothing to speak of.
    """
    w, s, c = (x.flatten(1) for x in (weights, static, data.counted))
    low, high = (torch.where(c, s, end) for end in (torch.inf, -torch.inf))
    low, high = low.amin(1, keepdim=True), high.amax(1, keepdim=True)
    more = torch.where(c, w - s, 0)
    more = torch.where(more.abs().amax(1, keepdim=True) <= 1e-6 * high, 0, more)
    return torch.where(low == high, w, more).view_as(weights)


def positive_correlation(weights: Tensor, data: CleanData, confidence: float) -> Tensor:
    """``[M]`` bool: whose weights correlate positively with their loss, by the test of Eq. 6."""
    return judge_correlations(weights, data.losses, data.counted, confidence).sign.to(weights.device) > 0


def hold_until_eq_6(
    calibration: Calibration,
    weigh: Callable[[], Tensor],
    data: CleanData,
    confidence: float,
    static: Tensor | None,
    *,
    together: bool = False,
) -> None:
    """Hold modalities at their static weights until no other's weight correlates positively with its loss.

    ``weigh`` returns the rule's weights ``[M, *]`` of the data as the calibration stands. ``static`` ``[M]`` None means
    the rule's own mean weights, which are new whenever another modality is held. ``together`` holds all or none, as one
    share of a sum cannot stand still while the others move.
    """
    measured = static is None
    if static is None:
        static = torch.ones_like(data.losses.flatten(1)[:, 0])
    held = torch.zeros_like(static)
    while True:
        calibration.set(static, held)
        weights = weigh()
        free = held == 0
        if measured:
            static = torch.where(free, data.mean(weights), held)
        wrong = positive_correlation(weights, data, confidence) & free
        if not bool(wrong.any()):
            break
        held = torch.where(free if together else wrong, static, held)
    calibration.set(static, held)
