"""One test for every way to fail: do new values still come as those of the reference did?"""

import math

import torch
from torch import Tensor

from ..precision import KeepsPrecision
from .e_process import KAPPAS, Evidence, extend, log_bets
from .ranks import p_values, uniforms


class ExchangeabilityTest(KeepsPrecision):
    """For each of M modalities, evidence against "reference and stream are exchangeable", and when it sufficed.

    A conformal test martingale: each value's rank among the reference and all of the stream so far is a p-value
    (``ranks.py``), on which an e-process bets (``e_process.py``). Rows that do not count are no part of the stream.

    Args:
        num_modalities: M.
        num_values: V, how many different values there are, in an order whose upper end means a fault.
        stream: which random numbers break ties: another for each test.
        two_sided: whether the lower end means one too.
        seed: of those numbers, which is part of the state.
    """

    seed: Tensor
    reference: Tensor
    """int64 ``[M, V]``: how often each value came in the reference."""
    seen: Tensor
    """int64 ``[M, V]``: the same with the stream since ``restart``."""
    steps: Tensor
    """int64 ``[M]``: how many values that is."""
    staked: Tensor
    best: Tensor
    start: Tensor
    log_e: Tensor
    """``[M]``: log of the e-value now."""
    raised: Tensor
    """int64 ``[M]``: the row by which it had reached the threshold; 0 as long as it has not."""
    since: Tensor
    """int64 ``[M]``: the row from which on the evidence was best, when it had."""
    sufficed: Tensor
    """``[M]``: log of the e-value then."""

    def __init__(
        self, num_modalities: int, num_values: int, stream: int, two_sided: bool = False, seed: int = 0
    ) -> None:
        super().__init__()
        self.stream, self.two_sided = stream, two_sided
        self.register_buffer("seed", torch.tensor(seed, dtype=torch.int64, device="cpu"))
        bets = len(KAPPAS) * (2 if two_sided else 1)
        for name, size in (("reference", num_values), ("seen", num_values), ("start", bets)):
            self.register_buffer(name, torch.zeros(num_modalities, size, dtype=torch.int64, device="cpu"))
        for name in ("staked", "best"):
            nothing = torch.full((num_modalities, bets), -torch.inf, dtype=torch.float64, device="cpu")
            self.register_buffer(name, nothing)
        for name in ("log_e", "sufficed"):
            self.register_buffer(name, torch.zeros(num_modalities, dtype=torch.float64, device="cpu"))
        for name in ("steps", "raised", "since"):
            self.register_buffer(name, torch.zeros(num_modalities, dtype=torch.int64, device="cpu"))

    def fit(self, values: Tensor, counted: Tensor) -> None:
        """Take a reference, int64 ``[M, N]`` where bool ``[M, N]``, in place of any before, and start."""
        self.reference.zero_().scatter_add_(1, torch.where(counted, values, 0), counted.long())
        for m in range(len(self.reference)):
            self.restart(m)

    def restart(self, modality: int) -> None:
        """Forget a modality's stream, and with it its evidence and alarm."""
        self.seen[modality] = self.reference[modality]
        for buffer in (self.steps, self.start, self.log_e, self.sufficed, self.raised, self.since):
            buffer[modality] = 0
        self.staked[modality] = self.best[modality] = -torch.inf

    def add(self, values: Tensor, counted: Tensor, rows: Tensor, threshold: float) -> Tensor:
        """The next rows of the stream.

        Args:
            values: int64 ``[M, B]``.
            counted: bool ``[M, B]``.
            rows: the rows' numbers, int64 ``[B]``, from 1 up.
            threshold: the log of the e-value that is enough.

        Returns:
            The log of the e-value after each row, ``[M, B]``.
        """
        after = torch.empty(values.shape, dtype=self.log_e.dtype, device=values.device)
        for m in range(len(values)):
            place = counted[m].nonzero().flatten()
            along = self.log_e[m : m + 1]
            if len(place):
                p = self._p_values(m, values[m, place])
                along = torch.cat([along, self._bet(m, p, rows[place], threshold)])
            after[m] = along[counted[m].cumsum(0)]
            self.log_e[m] = along[-1]
        return after

    def standing(self, values: Tensor, counted: Tensor) -> Tensor:
        """Where values stand in the reference alone, ``[M, B]``: the share below less the share above; NaN for none.

        Not from the p-values: among reference *and stream*, a fault that lasts becomes usual.
        """
        upto = self.reference.cumsum(1)
        values = torch.where(counted, values, 0)
        upto_value = upto.gather(1, values)
        below, above = upto_value - self.reference.gather(1, values), upto[:, -1:] - upto_value
        return torch.where(counted, (below - above).to(self.log_e.dtype) / upto[:, -1:], math.nan)

    def _p_values(self, m: int, values: Tensor) -> Tensor:
        draws = uniforms(
            self.stream * len(self.steps) + m, int(self.steps[m]), len(values), values.device, int(self.seed)
        )
        p = p_values(self.seen[m], values, draws.to(self.log_e.dtype))
        self.seen[m].scatter_add_(0, values, torch.ones_like(values))
        return p

    def _bet(self, m: int, p: Tensor, rows: Tensor, threshold: float) -> Tensor:
        t = self.steps[m] + torch.arange(1, len(p) + 1, device=p.device)
        bets = log_bets(p, self.two_sided)
        before = Evidence(self.staked[m], self.best[m], self.start[m])
        now, log_e = extend(before, bets, t.to(p.dtype), rows)
        reached = log_e >= threshold
        if not int(self.raised[m]) and bool(reached.any()):
            n = int(reached.int().argmax())
            then, _ = extend(before, bets[:, : n + 1], t[: n + 1].to(p.dtype), rows[: n + 1])
            self.raised[m], self.since[m] = rows[n], then.start[then.staked.argmax()]
            self.sufficed[m] = log_e[n]
        self.steps[m] += len(p)
        self.staked[m], self.best[m], self.start[m] = now
        return log_e
