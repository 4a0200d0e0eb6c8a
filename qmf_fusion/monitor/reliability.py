"""The monitor: running estimates, three tests for each modality, alarms, and odds that follow the stream if asked."""

import json
import math
from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor

from ..checks import Logits, Present, check_count, check_integer, check_number
from ..fusion import Heads, QualityAwareFusion, check_fusion
from ..precision import KeepsPrecision
from ..warn import warn_user
from .alarm import ABSENCE, REPETITION, SHIFT, TESTS, Alarm
from .exchangeability import ExchangeabilityTest
from .feedback import OddsOfStream
from .history import History
from .observed import Events, Observed, observe, pair_up
from .picture import draw
from .ranks import GRID
from .running import RunningMeans

P_CLEAN = len(TESTS)  # its place in the running means, behind the tests'
_BLOCK = 256  # rows at once: comparing a row with those of its block takes the square of it


class ReliabilityMonitor(KeepsPrecision):
    """Watch what comes out of a deployed fusion, and raise an alarm for each modality that has changed.

    Of each modality it keeps running estimates of P(clean), of how far its uncertainty has moved from a reference's,
    of how often it repeats its row, and of how often it is absent or not finite. Each of the last three is tested
    against the hypothesis that *the rows of reference and stream are exchangeable*, as independent rows of one
    distribution are. If that holds, the chance that any alarm is ever raised, over all modalities, tests and time, is
    at most ``alpha``: each of the 3 M tests has ``alpha / (3 M)``. Where neighbouring rows are alike, as frames of a
    video, it does not hold: give it one frame every few seconds. How the tests work, and their sources:
    ``exchangeability.py``, ``ranks.py`` and ``e_process.py`` beside this file.

    - ``"shift"``: the rule's uncertainty; for ``robust`` how untypical the row is, upwards, for the others Eq. 9's u,
      both ways. Of a dense prediction, a sample's mean over its positions that count.
    - ``"repetition"``: equal logits and features, in pairs of rows, the first with the second, the third with the
      fourth. Of a dense prediction, all of them.
    - ``"absence"``: rows that do not count: absent, or with logits or features that are not finite, or an uncertainty
      that is not a number.

    Nothing is trained, no gradient kept, no random state touched. Memory: 1 MB a modality, however long it runs. It
    has only its own state; the fusion is the model's. It lies on the CPU unless moved, and waits for what it is given;
    a device without float64 (MPS) is refused. ``copy.deepcopy`` and pickles of the monitor alone copy its fusion: take
    ``(model, monitor)`` together.

    Args:
        fusion: of a model in evaluation mode.
        alpha: the chance of a false alarm, ever, between 0 and 1.
        memory: in the running estimates, a row of ``memory`` rows ago weighs 1 / e of the newest.
        feedback: let the odds of the rule's mixture follow the stream (``feedback.py``), within 0.1 to 30 times those
            given, as the rule has them at ``fit``. For a rule that has odds, as ``robust``. Evidence and alarms do
            not depend on it. No other monitor with feedback may watch the same fusion.
        everywhere: where ``torch.distributed`` is initialised, ``update`` is a collective, by which each process knows
            the rows of all, in the order of their ranks. False leaves each to its own. Pairs of successive rows are of
            one process each, and of an odd number the last waits in its process: save each process's state, or give
            even numbers.
        seed: of the random numbers that break ties, 0 to 2**32 - 1, kept in ``state_dict``. Two monitors of one seed
            take the same numbers at the same rows, so that their false alarms are not independent: give each device of
            a fleet its own.

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
    rows: Tensor
    """int64: how many of the stream, since ``fit``."""
    samples: Tensor
    """int64: of the reference; 0 before ``fit``."""
    classes: Tensor
    """int64: K, as in the reference."""
    judged: Tensor
    """bool ``[M]``: of which modalities the reference had features."""
    waiting: Tensor

    @torch.inference_mode(False)  # buffers made under it could never be changed outside
    def __init__(
        self,
        fusion: QualityAwareFusion,
        *,
        alpha: float = 0.01,
        memory: int = 30,
        feedback: bool = False,
        everywhere: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__()
        # In a tuple, where nn.Module does not take it for a part of its own.
        self._fusion = (check_fusion(fusion),)
        check_number("alpha", alpha)
        if not 0 < alpha < 1:
            raise ValueError(f"alpha must be between 0 and 1, got {alpha}")
        if feedback and not fusion.rule.has_odds:
            raise ValueError(f"feedback must be False for {fusion.rule.kind()}, which has no odds; robust() has")
        num, self.feedback, self.everywhere = fusion.num_modalities, feedback, everywhere
        self.memory = check_count("memory", memory)
        if not 0 <= check_integer("seed", seed) < 2**32:
            raise ValueError(f"seed must be from 0 to 2**32 - 1, got {seed}")
        two_sided = not fusion.rule.measures_untypicality
        self.shift = ExchangeabilityTest(num, GRID, 0, two_sided=two_sided, seed=seed)
        self.repetition = ExchangeabilityTest(num, 2, 1, seed=seed)
        self.absence = ExchangeabilityTest(num, 2, 2, seed=seed)
        self.running = RunningMeans((memory, memory / 2, memory, memory), num)  # a pair is two rows
        self.odds = OddsOfStream(num)
        self.history = History(len(TESTS) + 1, num)
        # In the state, so that what was watched is never taken for that of another rate.
        self.register_buffer("level", torch.tensor(float(alpha), dtype=torch.float64, device="cpu"))
        for name in ("rows", "samples", "classes"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64, device="cpu"))
        self.register_buffer("waiting", torch.zeros(3, num, dtype=torch.int64, device="cpu"))
        self.register_buffer("judged", torch.zeros(num, dtype=torch.bool, device="cpu"))
        self.register_load_state_dict_post_hook(_set_odds_of_state)

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

    @property
    def tests(self) -> dict[str, ExchangeabilityTest]:
        """By name."""
        return {SHIFT: self.shift, REPETITION: self.repetition, ABSENCE: self.absence}

    @torch.no_grad()
    def fit(self, given: Heads, *, present: Present | None = None, features: Logits | None = None) -> Self:
        """Take a reference, in place of any before, and start: clean rows, as they come in production, in that order.

        Rows that neither the heads nor ``fusion.calibrate`` have seen: those fit them better than any that will come.
        A few hundred will do; more speak sooner. Of several processes, each is given the same rows.

        Args:
            given: a ``FusionOutput``, of which its weights are made anew, or logits ``[N, *, K]`` as the fusion takes
                them.
            present: as the fusion takes it.
            features: as the fusion takes them.

        Raises:
            TypeError, ValueError: as the fusion raises them; a modality without any row that counts.
            RuntimeError: a fusion in training mode, or a device without float64.
        """
        self._check_mode()
        seen = self._see_reference(given, present, features)
        self.odds.start(self.fusion.rule)
        repeated = pair_up(seen.counted, seen.fingerprint, torch.zeros_like(self.waiting))
        self.waiting.zero_()
        self.shift.fit(seen.score, seen.counted)
        self._tell_of_blindness()
        self.repetition.fit(repeated, repeated >= 0)
        self.absence.fit((~seen.counted).long(), torch.ones_like(seen.counted))
        shares = [test.reference[:, 1] / test.reference.sum(1).clamp_min(1) for test in (self.repetition, self.absence)]
        means = [torch.zeros_like(shares[0]), *shares, seen.p_clean.nanmean(1)]
        self.running.fit(torch.stack([x.to(seen.p_clean) for x in means]))
        self.history.clear()
        self.rows.zero_()
        self.samples.fill_(seen.counted.shape[1])
        self.classes.fill_(seen.classes)
        self.judged.copy_(seen.judged)
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
            TypeError, ValueError: as the fusion raises them; features of other modalities, or other classes, than the
                reference's.
            RuntimeError: a fusion in training mode, no reference yet, or, with ``feedback``, odds that somebody else
                has set meanwhile.
        """
        self._check_mode()
        if not int(self.samples):
            raise RuntimeError("fit() this monitor first, on clean held-out rows")
        if self.feedback:
            self.odds.check(self.fusion.rule)
        seen = self._see(given, present, features, self.odds.ratio(self.fusion.rule))
        if not torch.equal(seen.judged, self.judged):
            kinds = [[n for n, f in zip(self.fusion.names, x, strict=True) if f] for x in (self.judged, seen.judged)]
            raise ValueError(f"features must be of the reference's modalities, {kinds[0]}, got those of {kinds[1]}")
        if seen.classes != int(self.classes):
            raise ValueError(f"logits must have the {int(self.classes)} classes of the reference, got {seen.classes}")
        repeated = pair_up(seen.counted, seen.fingerprint, self.waiting)
        events = Events(seen.counted, seen.score, repeated, seen.p_clean)
        if self.everywhere:
            events = events.gathered()
        before, num = int(self.rows), events.counted.shape[1]
        for start in range(0, num, _BLOCK):
            self._add(events.rows(start, start + _BLOCK))
        self._follow()
        return [alarm for alarm in self.alarms if alarm.raised > before]

    @property
    def alarms(self) -> list[Alarm]:
        """All that were raised and not ``reset``, modality by modality."""
        return [
            Alarm(name, kind, int(test.since[m]), int(test.raised[m]), float(test.sufficed[m]), self.alpha)
            for m, name in enumerate(self.fusion.names)
            for kind, test in self.tests.items()
            if int(test.raised[m])
        ]

    @torch.no_grad()
    def reset(self, modality: str | int | None = None) -> Self:
        """Start a modality's tests anew after its repair, from the reference on, or by None all modalities'.

        Each start has a chance of a false alarm of its own, for one modality ``alpha / M``.

        Raises:
            ValueError: no such modality.
            RuntimeError: as ``update`` raises it for odds.
        """
        names = self.fusion.names
        if self.feedback and int(self.samples):
            self.odds.check(self.fusion.rule)
        if modality is not None and modality not in (*names, *range(len(names))):
            raise ValueError(f"modality must be one of {list(names)} or a number below {len(names)}, got {modality!r}")
        for m, name in enumerate(names):
            if modality in (None, name, m):
                for test in self.tests.values():
                    test.restart(m)
                self.running.restart(m)
                self.waiting[1, m] = 0  # a row of before the repair is no later row's equal
        self._follow()
        return self

    def as_dict(self) -> dict[str, float]:
        """Numbers for any logger, by ``"<what>/<modality>"``.

        ``p_clean`` (of a rule that gives it, at its odds as given), ``shift`` (0 as in the reference, 1 above all of
        it, -1 below), ``repetition`` and ``absence`` (shares): the running estimates. ``log_e_<test>``: evidence,
        natural logarithm, 0 at the start. ``alarm``: how many are raised. ``odds``, with feedback: what they are
        multiplied by.
        """
        said: dict[str, float] = {}
        for m, name in enumerate(self.fusion.names):
            if self.fusion.rule.gives_p_clean:
                said[f"p_clean/{name}"] = float(self.running.now[P_CLEAN, m])
            for n, (kind, test) in enumerate(self.tests.items()):
                said[f"{kind}/{name}"] = float(self.running.now[n, m])
                said[f"log_e_{kind}/{name}"] = float(test.log_e[m])
            said[f"alarm/{name}"] = float(sum(bool(test.raised[m]) for test in self.tests.values()))
            if self.feedback:
                said[f"odds/{name}"] = float(self.odds.factor[m])
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

    def get_extra_state(self) -> Tensor:
        """What the rest of the state belongs to, as text in bytes: the fusion's kind, and what numbers depend on."""
        of_fusion = bytes(self.fusion.get_extra_state().tolist()).decode()
        own = {"memory": self.memory, "feedback": self.feedback}
        return torch.tensor(list(json.dumps([own, of_fusion]).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of a monitor of another kind of fusion, or of another memory or feedback."""
        (given, of_fusion), (own, _) = (json.loads(bytes(x.tolist())) for x in (state, self.get_extra_state()))
        self.fusion.set_extra_state(torch.tensor(list(of_fusion.encode()), dtype=torch.uint8))
        if given != own:
            raise RuntimeError(f"state is of a monitor with {given}, and this one has {own}")

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Look whose state it is before anything of it is taken."""
        if (whose := state_dict.get(prefix + "_extra_state")) is not None:
            self.set_extra_state(whose)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _see(self, *given: Any) -> Observed:
        return observe(self.fusion, *given).to(self.level.device, self.level.dtype)

    def _see_reference(self, given: Heads, present: Present | None, features: Logits | None) -> Observed:
        """At the odds as given, which feedback gives back; after an error they are as before."""
        rule = self.fusion.rule
        own = self.feedback and self.odds.are_set(rule)
        try:
            if own:
                rule.set_odds(self.odds.given)  # type: ignore[operator]
            seen = self._see(given, present, features)
            there = seen.counted.any(1).tolist()
            lacking = [name for name, some in zip(self.fusion.names, there, strict=True) if not some]
            if lacking:
                raise ValueError(f"the reference must have rows of every modality, got none that counts of {lacking}")
        except BaseException:
            if own:
                self.odds.set(rule, self.odds.factor)
            raise
        if rule.feature_widths is not None and not bool(seen.judged.any()):
            warn_user(
                "features are not given, though the rule has widths for some: it sees what is wrong with logits alone. "
                "Pass a whole output, or features="
            )
        return seen

    def _tell_of_blindness(self) -> None:
        """Warn of modalities of whose uncertainty nothing can be seen, as the reference has next to one value of it."""
        different, rows = (self.shift.reference > 0).sum(1), self.shift.reference.sum(1)
        few = (different <= (rows // 10).clamp_max(15)).tolist()
        blind = {name: n for name, n, is_few in zip(self.fusion.names, different.tolist(), few, strict=True) if is_few}
        if blind:
            warn_user(
                f"the uncertainties of the reference have hardly any different values, {blind}: a shift may not be "
                "seen. A rule without statistics needs calibrate() first; values are compared in bfloat16, so "
                "that logits must not all have a large offset"
            )

    def _check_mode(self) -> None:
        if self.fusion.training:
            raise RuntimeError("the fusion is in training mode: a monitor watches a model after model.eval()")
        if self.level.dtype != torch.float64:
            raise RuntimeError("the monitor needs float64, which this device has not: leave it on the CPU")

    def _add(self, events: Events) -> None:
        rows = int(self.rows) + torch.arange(1, events.counted.shape[1] + 1, device=self.rows.device)
        absent, every = (~events.counted).long(), torch.ones_like(events.counted)
        shift = self.shift.add(events.score, events.counted, rows, self.threshold)
        paired = events.repeated >= 0
        repetition = self.repetition.add(events.repeated, paired, rows, self.threshold)
        absence = self.absence.add(absent, every, rows, self.threshold)
        standing = self.shift.standing(events.score, events.counted)
        values = [standing, torch.where(paired, events.repeated, torch.nan), absent, events.p_clean]
        along = self.running.add(torch.stack([x.to(standing) for x in values]))
        self.history.add(rows, torch.stack([shift, repetition, absence, along[P_CLEAN]]).movedim(-1, 0))
        self.rows += len(rows)

    def _follow(self) -> None:
        if self.feedback and int(self.samples):
            repetition = TESTS.index(REPETITION)
            clean = [x[P_CLEAN] * (1 - x[repetition]) for x in (self.running.now, self.running.usual)]
            self.odds.follow(self.fusion.rule, *clean)


def _set_odds_of_state(monitor: ReliabilityMonitor, _: object) -> None:
    """Bring a fusion whose own state is of before, as the model was trained, to where the stream was."""
    if monitor.feedback and int(monitor.samples):
        monitor.odds.set(monitor.fusion.rule, monitor.odds.factor)
