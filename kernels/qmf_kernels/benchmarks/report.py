"""What was measured, as a table, as verdicts on the targets, and as JSON."""

import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from .contenders import COMPILED, COPY, EAGER, OURS, RELEASED, Case
from .measure import Launches, Times

COPY_FRACTION, OVER_EAGER, OVER_COMPILED, OVER_RELEASED = 0.85, 5.0, 1.5, 20.0
REPLAY, PEAK, GROWTH, LAUNCHES = 3.0, 0.01, 1.15, 3


class Row(NamedTuple):
    """One contender in one case; None where it failed, or where a CPU has no such figure."""

    name: str
    device: float | None  # median seconds of a step with the queue full
    host: float | None  # median seconds until the host knows that a step is done
    slow: float | None  # the ninth decile of ``device``
    launches: Launches | None
    peak: int | None  # bytes above inputs and gradients
    error: float | None  # largest error of the check, relative to the largest value
    failed: str | None


class Outcome(NamedTuple):
    """One case."""

    case: Case
    rows: dict[str, Row]
    replay: tuple[float, float] | None  # seconds: a step's CUDA graph, and three empty launches'

    def seconds(self, name: str, host: bool = False) -> float | None:
        row = self.rows.get(name)
        return None if row is None else row.host if host else row.device


class Verdict(NamedTuple):
    """A target, what was found, and whether that meets it; None where it could not be told."""

    case: str
    target: str
    found: float | None
    met: bool | None


def make_row(name: str, times: Times | str, launches: Launches | None, peak: int | None, error: float | None) -> Row:
    if isinstance(times, str):
        return Row(name, None, None, None, launches, peak, error, times)
    device = sorted(times.device)
    slow = device[min(len(device) - 1, int(0.9 * len(device)))]
    return Row(name, statistics.median(device), statistics.median(times.host), slow, launches, peak, error, None)


def least_bytes(case: Case) -> int:
    """The logits read twice, their gradients written once."""
    return 3 * case.modalities * case.batch * case.classes * case.dtype.itemsize


def judge(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Every target that the cases answer to."""
    verdicts = []
    for outcome in outcomes:
        if outcome.case.kind == "large":
            verdicts += _judge_large(outcome)
        elif outcome.case.kind == "small":
            verdicts += _judge_small(outcome)
    return verdicts + _judge_growth([outcome for outcome in outcomes if outcome.case.kind == "growth"])


def _judge_large(outcome: Outcome) -> list[Verdict]:
    name, ours = outcome.case.name, outcome.seconds(OURS)
    compiled = [s for n in outcome.rows if n.startswith(COMPILED) and (s := outcome.seconds(n)) is not None]
    row = outcome.rows.get(OURS)
    peak = None if row is None or row.peak is None else row.peak / (least_bytes(outcome.case) * 2 / 3)
    launches = None if row is None or row.launches is None else float(row.launches.ours)
    return [
        _at_least(name, "of the copy's bytes per second", _ratio(outcome.seconds(COPY), ours), COPY_FRACTION),
        _at_least(name, "times as fast as eager", _ratio(outcome.seconds(EAGER), ours), OVER_EAGER),
        _at_least(name, "times as fast as torch.compile", _ratio(min(compiled, default=None), ours), OVER_COMPILED),
        _at_most(name, "of inputs and gradients in peak memory above them", peak, PEAK),
        _at_most(name, "launches of ours", launches, LAUNCHES),
    ]


def _judge_small(outcome: Outcome) -> list[Verdict]:
    name = outcome.case.name
    ratio = _ratio(outcome.seconds(RELEASED, host=True), outcome.seconds(OURS, host=True))
    replay = None if outcome.replay is None else outcome.replay[0] / outcome.replay[1]
    return [
        _at_least(name, "times as fast as the released formulation, host included", ratio, OVER_RELEASED),
        _at_most(name, "times three empty launches in a graph's replay", replay, REPLAY),
    ]


def _judge_growth(outcomes: Sequence[Outcome]) -> list[Verdict]:
    """Seconds per byte, against the smallest M's; and the launches."""
    found = [(o, s) for o in outcomes if (s := o.seconds(OURS)) is not None]
    if len(found) < 2:
        return []
    costs = [seconds / least_bytes(outcome.case) for outcome, seconds in found]
    launches = [row.launches.kernels for o, _ in found if (row := o.rows[OURS]).launches is not None]
    name = f"{found[0][0].case.name} to {found[-1][0].case.name}"
    more = float(max(launches) - launches[0]) if launches else None
    return [
        _at_most(name, "times the seconds per byte of the first", max(costs) / costs[0], GROWTH),
        _at_most(name, "more launches than the first", more, 0),
    ]


def _ratio(above: float | None, below: float | None) -> float | None:
    return None if above is None or below is None else above / below


def _at_least(case: str, what: str, found: float | None, wanted: float) -> Verdict:
    return Verdict(case, f"at least {wanted:g} {what}", found, None if found is None else found >= wanted)


def _at_most(case: str, what: str, found: float | None, wanted: float) -> Verdict:
    return Verdict(case, f"at most {wanted:g} {what}", found, None if found is None else found <= wanted)


# As text


def table(outcome: Outcome) -> str:
    """A line per contender."""
    case = outcome.case
    dtype = str(case.dtype).removeprefix("torch.")
    lines = [f"{case.name}: M={case.modalities} B={case.batch} K={case.classes} N={case.samples} {dtype}"]
    columns = ("device", "90 %", "host", "x ours", "of copy", "launches", "ours", "copies", "peak", "error")
    lines.append(f"  {'':24}" + "".join(f"{column:>12}" for column in columns))
    for row in outcome.rows.values():
        ratio, part = _ratio(row.device, outcome.seconds(OURS)), _ratio(outcome.seconds(COPY), row.device)
        launches = [None] * 3 if row.launches is None else row.launches[:3]
        cells = [
            *(_microseconds(seconds) for seconds in (row.device, row.slow, row.host)),
            *(_cell(ratio, "{:.2f}"), _cell(part, "{:.1%}")),
            *(_cell(count, "{}") for count in launches),
            *(_cell(None if row.peak is None else row.peak / 1e6, "{:.2f} MB"), _cell(row.error, "{:.1e}")),
        ]
        lines.append(f"  {row.name:24}" + "".join(f"{cell:>12}" for cell in cells))
        if row.failed:
            lines.append(f"  {'':24} failed: {row.failed}")
    if outcome.replay is not None:
        step, empty = outcome.replay
        lines.append(f"  a graph's replay {_microseconds(step)}, three empty launches {_microseconds(empty)}")
    return "\n".join(lines)


def verdict_lines(verdicts: Sequence[Verdict]) -> str:
    words = {True: "met", False: "MISSED", None: "not told"}
    return "\n".join(
        f"  {words[v.met]:9} {v.case}: {v.target}" + ("" if v.found is None else f" (found {v.found:.3g})")
        for v in verdicts
    )


def _cell(value: Any, form: str) -> str:
    return "-" if value is None else form.format(value)


def _microseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e6:.1f} us"


def as_json(environment: dict[str, Any], repeats: int, outcomes: Sequence[Outcome], verdicts: Sequence[Verdict]) -> Any:
    """Plain lists and dictionaries."""
    cases = []
    for outcome in outcomes:
        case = outcome.case._asdict() | {"dtype": str(outcome.case.dtype).removeprefix("torch.")}
        rows = []
        for row in outcome.rows.values():
            rate = None if row.device is None else least_bytes(outcome.case) / row.device
            launches = None if row.launches is None else row.launches._asdict()
            ratios = {
                "times_ours": _ratio(row.device, outcome.seconds(OURS)),
                "fraction_of_copy": _ratio(outcome.seconds(COPY), row.device),
            }
            rows.append(row._asdict() | {"launches": launches, "bytes_per_second": rate, **ratios})
        cases.append(case | {"least_bytes": least_bytes(outcome.case), "rows": rows, "replay": outcome.replay})
    judged = [verdict._asdict() for verdict in verdicts]
    return {"schema": 1, "kind": "kernels", **environment, "repeats": repeats, "cases": cases, "targets": judged}
