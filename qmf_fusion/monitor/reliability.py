"""The monitor: running estimates, three tests for each modality, alarms, and the odds that follow the stream if asked."""

import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from ..checks import Logits, Present, check_count, check_number
from ..fusion import Heads, QualityAwareFusion, check_fusion
from ..precision import KeepsPrecision
from .alarm import ABSENCE, REPETITION, SHIFT, TESTS, Alarm
from .exchangeability import ExchangeabilityTest
from .history import History
from .observed import Events, observe, pair_up, which_features
from .picture import draw
from .ranks import GRID

P_CLEAN = 3  # in ``running``, behind the tests
_BLOCK = 256  # rows at once: comparing a row with those of its block takes the square of it
_LEAST, _MOST = 0.1, 30.0  # what feedback may multiply odds by
_SHARE = 0.01  # the least share of broken rows that is believed


class ReliabilityMonitor(KeepsPrecision):
    """Watch what comes out of a deployed fusion, and raise an alarm for each modality that has changed.

    Of each modality it keeps running estimates of P(clean), of how far its uncertainty has moved from a reference's, of how
    often it repeats its row, and of how often it is absent or not finite. Each of the last three is tested against the
    hypothesis that *the rows of reference and stream are exchangeable*, as independent rows of one distribution are; if
    that holds, the chance that any alarm is ever raised, over all modalities, tests and time, is at most ``alpha``
    (each of the 3 M tests has ``alpha / (3 M)``). Where neighbouring rows are alike, as frames of a video, it does not
    hold: give it one frame every few seconds. See ``exchangeability``, ``e_process`` and ``ranks`` in this folder.

    - ``"shift"``: the rule's uncertainty, for ``robust`` how untypical the row is (upwards), for the others Eq. 9's ``u``
      (both ways). The mean over a sample's positions, where the prediction is dense.
    - ``"repetition"``: rows in pairs, the first with the second, the third with the fourth; equal logits and features.
    - ``"absence"``: rows that do not count, absent, or with logits or features that are not finite.

    It only sees what the fusion returns: nothing is trained, no gradient is kept, no random state is touched. Memory: 1 MB
    a modality, however long it runs. It has only its own state; the fusion is the model's. It watches on its own device, the
    CPU unless moved, and waits for what it is given.

    Args:
        fusion: of a model in evaluation mode.
        alpha: the chance of a false alarm, ever, between 0 and 1.
        memory: running estimates weigh a row of ``memory`` rows ago by 1 / e.
        feedback: let the odds of the rule's mixture follow the stream: what P(clean) says on average of a modality, compared
            with the reference, multiplies its odds, by 0.1 to 30. For a rule with ``set_odds``, as ``robust``. Evidence and
            alarms stay as they are.
        everywhere: where ``torch.distributed`` is initialised, ``update`` is a collective, and each process knows the rows
            of all, in the order of their ranks. False leaves each to its own.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of range; feedback for a rule without odds.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> fusion = QualityAwareFusion(["rgb", "depth"]).eval()
        >>> monitor = ReliabilityMonitor(fusion).fit(torch.randn(2, 200, 4, generator=g))  # held-out rows' logits
        >>> monitor.update(torch.randn(2, 100, 4, generator=g))
        []
        >>> stuck = torch.randn(2, 40, 4, generator=g)
        >>> stuck[1] = stuck[1, 0]
        >>> [(alarm.modality, alarm.test, alarm.since) for alarm in monitor.update(stuck)]
        [('depth', 'repetition', 98)]
    """

    level: Tensor
    running: Tensor
    """``[4, M]``: mean shift (0 as in the reference, 1 if above all, -1 if below), shares repeated and absent, P(clean)."""
    usual: Tensor
    """``[4, M]``: the same of the reference."""
    rows: Tensor
    """int64: of the stream, since ``fit``."""
    samples: Tensor
    """int64: of the reference; 0 before ``fit``."""
    judged: Tensor
    """bool ``[M]``: of which modalities the reference had features."""
    waiting: Tensor
    odds: Tensor
    """``[M]``: the rule's as given."""
    factor: Tensor
    """``[M]``: what feedback multiplies them by."""

    def __init__(
        self,
        fusion: QualityAwareFusion,
        *,
        alpha: float = 0.01,
        memory: int = 100,
        feedback: bool = False,
        everywhere: bool = True,
    ) -> None:
        super().__init__()
        # In a tuple, where nn.Module does not take it for a part of its own.
        self._fusion = (check_fusion(fusion),)
        check_number("alpha", alpha)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        self.memory, self.feedback, self.everywhere = check_count("memory", memory), feedback, everywhere
        if feedback and not hasattr(fusion.rule, "set_odds"):
            raise ValueError(f"feedback must be False for {fusion.rule.kind()}, which has no odds; robust() has")
        num = fusion.num_modalities
        self.shift = ExchangeabilityTest(num, GRID, 0, two_sided=not fusion.rule.gives_p_clean)
        self.repetition = ExchangeabilityTest(num, 2, 1)
        self.absence = ExchangeabilityTest(num, 2, 2)
        self.history = History(len(TESTS) + 1, num)
        state = {"level": torch.tensor(float(alpha)), "running": torch.zeros(4, num), "usual": torch.zeros(4, num)}
        state |= {"odds": torch.ones(num), "factor": torch.ones(num)}
        for name, value in state.items():
            self.register_buffer(name, value.double().cpu())
        for name, shape in (("rows", ()), ("samples", ()), ("waiting", (3, num))):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64, device="cpu"))
        self.register_buffer("judged", torch.zeros(num, dtype=torch.bool, device="cpu"))

    @property
    def fusion(self) -> QualityAwareFusion:
        """The layer, which the model owns."""
        return self._fusion[0]

    @property
    def alpha(self) -> float:
        """The chance of a false alarm, ever."""
        return float(self.level)

    @property
    def threshold(self) -> float:
        """The log of the e-value that raises an alarm, ``log(3 M / alpha)``."""
        return math.log(len(TESTS) * self.fusion.num_modalities / self.alpha)

    def tests(self) -> dict[str, ExchangeabilityTest]:
        """By name."""
        return {SHIFT: self.shift, REPETITION: self.repetition, ABSENCE: self.absence}

    @torch.no_grad()
    def fit(self, given: Heads, *, present: Present | None = None, features: Logits | None = None) -> Self:
        """Take a reference, in place of any before, and start: clean rows, as they come in production, in that order.

        Rows that neither the heads nor ``fusion.calibrate`` have seen: those fit them better than any that will come.
        A few hundred will do; more speak sooner. Of several processes, each is given the same rows.

        Args:
            given: a ``FusionOutput``, or logits ``[N, *, K]`` as the fusion takes them.
            present: as the fusion takes it.
            features: as the fusion takes them.

        Raises:
            TypeError, ValueError: as the fusion raises them; a modality without any row that counts.
            RuntimeError: a fusion in training mode.
        """
        self._check_mode()
        judged = which_features(self.fusion, given, features)
        seen = observe(self.fusion, given, present, features).to(self.level.device, self.level.dtype)
        lacking = [name for name, some in zip(self.fusion.names, seen.counted.any(1).tolist(), strict=True) if not some]
        if lacking:
            raise ValueError(f"the reference must have rows of every modality, got none that counts of {lacking}")
        self.waiting.zero_()
        repeated = pair_up(seen.counted, seen.fingerprint, self.waiting)
        self.waiting.zero_()
        self.shift.fit(seen.score, seen.score >= 0)
        self.repetition.fit(repeated, repeated >= 0)
        self.absence.fit((~seen.counted).long(), torch.ones_like(seen.counted))
        shares = [test.reference[:, 1].double() / test.reference.sum(1) for test in (self.repetition, self.absence)]
        p_clean = self._as_given(seen.p_clean).nanmean(1)
        self.usual.copy_(torch.stack([torch.zeros_like(p_clean), *(s.to(p_clean).nan_to_num() for s in shares), p_clean]))
        if self.feedback:
            self._set_odds(torch.ones_like(self.factor))
            self.odds.copy_(self.fusion.rule.odds)  # type: ignore[arg-type]
        self.running.copy_(self.usual)
        self.history.clear()
        self.rows.zero_()
        self.samples.fill_(seen.counted.shape[1])
        self.judged.copy_(torch.tensor(judged))
        return self

    @torch.no_grad()
    def update(self, given: Heads, *, present: Present | None = None, features: Logits | None = None) -> list[Alarm]:
        """The next rows of the stream, one or many; the alarms that they raise.

        The same rows in batches of any size leave the same state, up to roundings of float64; with ``feedback``, odds
        move between the batches.

        Args:
            given: as ``fit`` takes it.
            present: as ``fit`` takes it.
            features: as ``fit`` takes them.

        Raises:
            TypeError, ValueError: as the fusion raises them; features of other modalities than the reference's.
            RuntimeError: a fusion in training mode, or no reference yet.
        """
        self._check_mode()
        if not int(self.samples):
            raise RuntimeError("fit() this monitor first, on clean held-out rows")
        judged = which_features(self.fusion, given, features)
        if judged != self.judged.tolist():
            kinds = [[n for n, f in zip(self.fusion.names, each, strict=True) if f] for each in (self.judged, judged)]
            raise ValueError(f"features must be of the reference's modalities, {kinds[0]}, got those of {kinds[1]}")
        seen = observe(self.fusion, given, present, features).to(self.level.device, self.level.dtype)
        repeated = pair_up(seen.counted, seen.fingerprint, self.waiting)
        events = Events(seen.counted, seen.score, repeated, self._as_given(seen.p_clean))
        if self.everywhere:
            events = events.gathered()
        before, num = int(self.rows), events.counted.shape[1]
        for start in range(0, num, _BLOCK):
            self._add(events.rows(start, start + _BLOCK))
        if self.feedback:
            self._follow()
        return [alarm for alarm in self.alarms if alarm.raised > before]

    @property
    def alarms(self) -> list[Alarm]:
        """All that were raised and not ``reset``, modality by modality."""
        return [
            Alarm(name, kind, int(test.since[m]), int(test.raised[m]), float(test.peak[m]), self.alpha)
            for m, name in enumerate(self.fusion.names)
            for kind, test in self.tests().items()
            if int(test.raised[m])
        ]

    @torch.no_grad()
    def reset(self, modality: str | int | None = None) -> Self:
        """Start a modality's tests anew after its repair, from the reference on, or by None all modalities'.

        Each start has a chance of a false alarm of its own, for one modality ``alpha / M``.

        Raises:
            ValueError: no such modality.
        """
        names = self.fusion.names
        if modality is not None and modality not in (*names, *range(len(names))):
            raise ValueError(f"modality must be one of {list(names)} or a number below {len(names)}, got {modality!r}")
        for m, name in enumerate(names):
            if modality in (None, name, m):
                for test in self.tests().values():
                    test.restart(m)
                self.running[:, m] = self.usual[:, m]
        if self.feedback and int(self.samples):
            self._follow()
        return self

    def as_dict(self) -> dict[str, float]:
        """Numbers for any logger, by ``"<what>/<modality>"``.

        ``p_clean`` (of a rule that gives it), ``shift``, ``repetition``, ``absence``: the running estimates;
        ``log_e_<test>``: evidence, natural logarithm, 0 at the start; ``alarm``: how many are raised; ``odds``, with
        feedback: what they are multiplied by.
        """
        said: dict[str, float] = {}
        for m, name in enumerate(self.fusion.names):
            if self.fusion.rule.gives_p_clean:
                said[f"p_clean/{name}"] = float(self.running[P_CLEAN, m])
            for n, (kind, test) in enumerate(self.tests().items()):
                said[f"{kind}/{name}"] = float(self.running[n, m])
                said[f"log_e_{kind}/{name}"] = float(test.log_e[m])
            said[f"alarm/{name}"] = float(sum(bool(test.raised[m]) for test in self.tests().values()))
            if self.feedback:
                said[f"odds/{name}"] = float(self.factor[m])
        return said

    def line(self) -> str:
        """One line of text."""
        said, parts = self.as_dict(), []
        for name in self.fusion.names:
            clean = f"P(clean) {said[f'p_clean/{name}']:.2f}, " if f"p_clean/{name}" in said else ""
            shares = ", ".join(f"{kind} {100 * said[f'{kind}/{name}']:.1f} %" for kind in (REPETITION, ABSENCE))
            raised = [alarm.test for alarm in self.alarms if alarm.modality == name]
            alarm = f", ALARM: {', '.join(raised)}" if raised else ""
            parts.append(f"{name}: {clean}shift {said[f'shift/{name}']:+.2f}, {shares}{alarm}")
        return f"row {int(self.rows):,} | " + " | ".join(parts)

    def log(self, logger: Callable[[str], object]) -> None:
        """``line()`` to any logger, as ``monitor.log(logging.info)``."""
        logger(self.line())

    def plot(self, path: str | None = None, title: str | None = None) -> Any:
        """P(clean) and evidence over time; a matplotlib figure, saved at ``path`` if one is given.

        An ImportError says where matplotlib is not installed.
        """
        rows, values = (x.cpu() for x in self.history.points())
        return draw(self.fusion.names, rows, values, self.threshold, self.alarms, path, title)

    def _check_mode(self) -> None:
        if self.fusion.training:
            raise RuntimeError("the fusion is in training mode: a monitor watches a model in evaluation mode, model.eval()")

    def _add(self, events: Events) -> None:
        rows = int(self.rows) + torch.arange(1, events.counted.shape[1] + 1, device=self.rows.device)
        every, found = torch.ones_like(events.counted), []
        given = ((events.score, events.score >= 0), (events.repeated, events.repeated >= 0), (~events.counted, every))
        shown = []
        for test, (values, counted) in zip(self.tests().values(), given, strict=True):
            p, log_e = test.add(values.long(), counted, rows, self.threshold)
            shown.append(1 - 2 * p if test is self.shift else torch.where(counted, values, torch.nan))
            found.append(log_e)
        shown.append(events.p_clean)
        along = self._running(torch.stack([x.to(self.running) for x in shown]))
        self.history.add(rows, torch.stack([*found, along[P_CLEAN]]).movedim(-1, 0))
        self.running.copy_(along[..., -1])
        self.rows += len(rows)

    def _running(self, values: Tensor) -> Tensor:
        """Running means after each row, ``[4, M, B]`` of values ``[4, M, B]``, of which NaN change nothing."""
        known = ~values.isnan()
        keep = torch.where(known, math.exp(-1 / self.memory), 1.0).to(values).log().cumsum(-1)
        # Each value's weight after each later row, [4, M, B, B].
        weight = (keep.unsqueeze(-1) - keep.unsqueeze(-2)).tril().exp().tril()
        gained = (weight * values.nan_to_num().unsqueeze(-2) * known.unsqueeze(-2)).sum(-1)
        return keep.exp() * self.running.unsqueeze(-1) - math.expm1(-1 / self.memory) * gained

    def _as_given(self, p_clean: Tensor) -> Tensor:
        """What P(clean) ``[M, B]`` is at the odds as given, at which feedback cannot feed on itself.

        A modality's odds stand in ``P(clean) = A / (A + odds * B)`` alone.
        """
        factor = self.factor.unsqueeze(1)
        return p_clean * factor / (p_clean * factor + 1 - p_clean)

    def _follow(self) -> None:
        """Odds of what the mixture says of the stream, by what it said of the reference."""
        now, before = ((1 - x[P_CLEAN]).clamp(_SHARE, 1 - _SHARE) for x in (self.running, self.usual))
        self._set_odds((now / (1 - now) * (1 - before) / before).clamp(_LEAST, _MOST))

    def _set_odds(self, factor: Tensor) -> None:
        if int(self.samples):
            self.fusion.rule.set_odds(self.odds * factor)  # type: ignore[operator]
        self.factor.copy_(factor)
