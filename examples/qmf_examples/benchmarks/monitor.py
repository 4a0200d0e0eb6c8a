"""How soon the monitor sees a fault, how often it sees one where none is, and what feedback brings.

``python -m qmf_examples.benchmarks.monitor digits nyud2.npz --json monitor.json`` trains the recommended rule on each
set, on clean data, and makes streams of its test split's rows:

- **false alarms**: reference and stream drawn from the rows with replacement, so that they are exchangeable;
- **delays**: the same, and after a clean stretch one modality has a fault for good, each in turn;
- **feedback**: every row once, the middle half with one modality broken; accuracy with odds that follow, and as given.
"""

import argparse
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from qmf_fusion import FusionModel, FusionOutput
from qmf_fusion.monitor import ReliabilityMonitor

from ..comparison.heads import train_heads
from ..comparison.prepared import ROBUSTNESS, prepare, prepare_file
from ..comparison.robustness import FILES, VIEWS
from ..corruption.features import DAMAGES
from ..data.digits import load_digits
from ..data.feature_files import CLEAN, load_npz
from ..data.feature_scale import feature_scale
from ..evaluation.paired_difference import TEST, difference
from ..files import write_results_file
from ..models.learners import QualityAware
from ..models.methods import METHODS, RECOMMENDED
from ..processes import one_thread

REFERENCE, HEALTHY, FAULTY = 300, 500, 1000
"""Rows of the reference, and of a stream before and after its fault begins."""
RATE, ROWS = 0.1, 2000
"""Of the streams for false alarms: alpha, high enough to be measured, and their length."""
DRIFT = 1000
"""Rows in which a drift comes to one standard deviation of each feature."""
SLICE = 8
"""Rows that arrive together where feedback is measured."""

Views = dict[str, Tensor]
Fault = Callable[[Tensor, np.random.Generator], Tensor]
"""From rows ``[n, D]`` of a view, standardised, to what a broken sensor gives."""


class Subject(NamedTuple):
    """A trained model and its test split."""

    model: FusionModel
    views: Views
    labels: Tensor
    replaced: dict[str, Views]
    """By damage, views of the same rows through damaged inputs, of those modalities that know it."""


def damaged_by(kind: str, level: float = 0.0) -> Fault:
    """The bench's damage of features."""

    def apply(rows: Tensor, rng: np.random.Generator) -> Tensor:
        return torch.from_numpy(np.array(DAMAGES[kind](rows.double().numpy(), level, rng))).float()

    return apply


FAULTS: dict[str, Fault] = {
    "dead (NaN)": lambda rows, rng: torch.full_like(rows, torch.nan),
    "blank": damaged_by("blank"),
    "stuck": damaged_by("stuck"),
    "noise 0.5": damaged_by("noise", 0.5),
    "noise 1": damaged_by("noise", 1.0),
    "noise 2": damaged_by("noise", 2.0),
    "drift": lambda rows, rng: rows + torch.arange(1, len(rows) + 1).unsqueeze(1) / DRIFT,
    "conflict": damaged_by("conflict"),
}
"""Levels are in standard deviations of each feature; a conflict is another sample's row."""


def train(name: str, seed: int, epochs: int | None) -> Subject:
    """The recommended rule's heads on ``digits`` or a file of features."""
    training = METHODS[RECOMMENDED].training
    assert training is not None
    replaced: dict[str, Views] = {}
    if name == "digits":
        data, config = prepare(load_digits(), ROBUSTNESS, seed), VIEWS
    else:
        content = load_npz(Path(name))
        data, config = prepare_file(content, seed), FILES
        for modality, copies in content.test.items():
            mean, deviation = feature_scale(content.train[modality][CLEAN].astype(np.float64))
            for damage, rows in copies.items():
                if damage != CLEAN:
                    scaled = ((rows.astype(np.float64) - mean) / deviation).clip(-50, 50).astype(np.float32)
                    replaced.setdefault(damage, {})[modality] = torch.from_numpy(scaled)
    if epochs is not None:
        config = replace(config, epochs=epochs, steps=None)
    learner = train_heads(training, data, replace(config, seeds=(seed,)), seed)
    assert isinstance(learner, QualityAware)
    return Subject(learner.model.eval(), data.tests[0].views, data.test_labels, replaced)


@torch.no_grad()
def answer(subject: Subject, index: Tensor, broken: Mapping[str, Tensor] | None = None) -> FusionOutput:
    """The model's output for these rows of the test split, some views in other versions ``[n, D]``."""
    views = {name: x[index] for name, x in subject.views.items()} | dict(broken or {})
    out = subject.model(views)
    assert isinstance(out, FusionOutput)
    return out


Broken = Callable[[Tensor, np.random.Generator], Tensor]
"""From the numbers of test rows to a modality's broken rows ``[n, D]``."""


def faults(subject: Subject, modality: str) -> dict[str, Broken]:
    """Every fault of a modality."""
    known = {name: views[modality] for name, views in subject.replaced.items() if modality in views}
    made = {name: _made(fault, subject.views[modality]) for name, fault in FAULTS.items()}
    return {**made, **{name: _looked_up(rows) for name, rows in known.items()}}


def _made(fault: Fault, clean: Tensor) -> Broken:
    return lambda index, rng: fault(clean[index], rng)


def _looked_up(rows: Tensor) -> Broken:
    return lambda index, rng: rows[index]


def draw(subject: Subject, num: int, rng: np.random.Generator) -> Tensor:
    return torch.from_numpy(rng.integers(len(subject.labels), size=num))


def false_alarms(subject: Subject, streams: int, seed: int) -> int:
    """How many streams of ``ROWS`` clean rows raise any alarm at ``RATE``."""
    rng, raised = np.random.default_rng([seed, 1]), 0
    for _ in range(streams):
        monitor = ReliabilityMonitor(subject.model.fusion, alpha=RATE)
        monitor.fit(answer(subject, draw(subject, REFERENCE, rng)))
        raised += bool(monitor.update(answer(subject, draw(subject, ROWS, rng))))
    return raised


class Delay(NamedTuple):
    """A stream whose modality breaks."""

    fault: str
    modality: str
    rows: int | None
    """From the fault's first to the alarm; None where there was none in ``FAULTY`` rows."""
    test: str | None
    """Which test was the first."""
    elsewhere: int
    """Alarms before the fault, or of other modalities."""


def delays(subject: Subject, streams: int, seed: int) -> Iterator[Delay]:
    """Of every fault in every modality."""
    for m, modality in enumerate(subject.views):
        for name, fault in faults(subject, modality).items():
            for stream in range(streams):
                rng = np.random.default_rng([seed, 2, m, stream])
                monitor = ReliabilityMonitor(subject.model.fusion)
                monitor.fit(answer(subject, draw(subject, REFERENCE, rng)))
                monitor.update(answer(subject, draw(subject, HEALTHY, rng)))
                index = draw(subject, FAULTY, rng)
                monitor.update(answer(subject, index, {modality: fault(index, rng)}))
                own = [a for a in monitor.alarms if a.modality == modality and a.raised > HEALTHY]
                first = min(own, key=lambda alarm: alarm.raised, default=None)
                yield Delay(
                    name,
                    modality,
                    None if first is None else first.raised - HEALTHY,
                    None if first is None else first.test,
                    len(monitor.alarms) - len(own),
                )


def feedback(subject: Subject, seed: int) -> dict[str, dict[str, Tensor]]:
    """By fault and stretch, what is right with feedback and what is right without, ``[2, modalities * rows]``.

    Every test row comes once; the middle half has the fault. The fault "none" is a stream without any.
    """
    found: dict[str, dict[str, list[Tensor]]] = {}
    for m, modality in enumerate(subject.views):
        rng = np.random.default_rng([seed, 3, m])
        order = torch.from_numpy(rng.permutation(len(subject.labels)))
        reference, order = order[: len(order) // 3], order[len(order) // 3 :]
        quarter = len(order) // 4
        stretches = {"before": slice(0, quarter), "fault": slice(quarter, -quarter), "after": slice(-quarter, None)}
        for name, fault in {"none": None, **faults(subject, modality)}.items():
            rows = subject.views[modality][order].clone()
            if fault is not None:
                rows[stretches["fault"]] = fault(order[stretches["fault"]], rng)
            out, right = answer(subject, order, {modality: rows}), []
            for follows in (True, False):
                monitor = ReliabilityMonitor(subject.model.fusion, feedback=follows).fit(answer(subject, reference))
                right.append(_stream(subject, monitor, out).eq(subject.labels[order]).double())
                monitor.reset()  # which gives the rule its odds back
            for stretch, part in stretches.items():
                found.setdefault(name, {}).setdefault(stretch, []).append(torch.stack(right)[:, part])
    return {name: {stretch: torch.cat(x, 1) for stretch, x in every.items()} for name, every in found.items()}


def _stream(subject: Subject, monitor: ReliabilityMonitor, out: FusionOutput) -> Tensor:
    """What the fusion answers, ``[n]``, a few rows at a time, its monitor in between."""
    fusion, answers = subject.model.fusion, []
    with torch.no_grad():
        for start in range(0, len(out.logits), SLICE):
            part = slice(start, start + SLICE)
            features = None if out.features is None else [None if f is None else f[part] for f in out.features]
            present = None if out.present is None else out.present[:, part]
            fused = fusion([x[part] for x in out.unimodal_logits], present=present, features=features)
            if monitor.feedback:
                monitor.update(fused, features=features)
            answers.append(fused.logits.argmax(-1))
    return torch.cat(answers)


def picture(subject: Subject, path: Path, title: str) -> list[str]:
    """A stream whose last modality has noise, and is repaired; what the monitor says."""
    modality, rng = list(subject.views)[-1], np.random.default_rng(0)
    monitor = ReliabilityMonitor(subject.model.fusion).fit(answer(subject, draw(subject, REFERENCE, rng)))
    said, index = [], draw(subject, 400, rng)
    monitor.update(answer(subject, draw(subject, 600, rng)))
    said.append(monitor.line())
    broken = faults(subject, modality)["noise 2"](index, rng)
    said += [str(alarm) for alarm in monitor.update(answer(subject, index, {modality: broken}))]
    said.append(monitor.line())
    figure = monitor.plot(title=title)
    figure.savefig(path, dpi=80)
    monitor.reset(modality).update(answer(subject, draw(subject, 500, rng)))
    return [*said, monitor.line()]


def delay_table(found: Sequence[Delay]) -> list[dict[str, Any]]:
    """A row for each fault, over modalities, streams and seeds."""
    table = []
    for fault in dict.fromkeys(each.fault for each in found):
        of = [each for each in found if each.fault == fault]
        rows = sorted(FAULTY + 1 if each.rows is None else each.rows for each in of)
        tests = [each.test for each in of if each.test is not None]
        most = max(set(tests), key=tests.count) if tests else None
        median, late = statistics.median(rows), rows[int(0.9 * (len(rows) - 1))]
        table.append(
            {
                "fault": fault,
                "streams": len(of),
                "found": len(tests) / len(of),
                "median": median if median <= FAULTY else None,
                "nine in ten": late if late <= FAULTY else None,
                "mostly by": most,
                "elsewhere": sum(each.elsewhere for each in of),
            }
        )
    return table


def measure(name: str, seeds: int, streams: int, clean: int, epochs: int | None) -> dict[str, Any]:
    """All of a set."""
    raised, found, gains = 0, [], []
    for seed in range(seeds):
        with one_thread():
            subject = train(name, seed, epochs)
            raised += false_alarms(subject, clean, seed)
            found += list(delays(subject, streams, seed))
            gains.append(feedback(subject, seed))
    rows: dict[str, dict[str, dict[str, Any]]] = {}
    for fault in gains[0]:
        rows[fault] = {}
        for stretch in ("before", "fault", "after"):
            both = np.stack([gain[fault][stretch].numpy() for gain in gains])
            gap = difference([both[:, 0] - both[:, 1]]).to_dict()
            rows[fault][stretch] = {"accuracy": round(float(both[:, 1].mean()), 6), **gap}
    return {
        "set": Path(name).stem,
        "seeds": seeds,
        "clean streams": seeds * clean,
        "false alarms": raised,
        "delays": delay_table(found),
        "feedback": rows,
    }


def show(found: Mapping[str, Any]) -> None:
    print(f"\n{found['set']}: {found['false alarms']} of {found['clean streams']} clean streams of {ROWS:,} rows raise")
    print(f"an alarm at alpha = {RATE:g}. Delays at alpha = 0.01, after {HEALTHY} clean rows:\n")
    print("| fault | found in % | median rows | nine in ten within | mostly by | alarms elsewhere |")
    print("|---|---|---|---|---|---|")
    for row in found["delays"]:
        late = [f"over {FAULTY:,}" if row[key] is None else f"{row[key]:g}" for key in ("median", "nine in ten")]
        cells = [row["fault"], f"{100 * row['found']:.0f}", *late, row["mostly by"] or "", str(row["elsewhere"])]
        print("| " + " | ".join(cells) + " |")
    print(f"\nAccuracy in %, and points that feedback adds [interval] ({TEST}):\n")
    print("| fault | while it lasts | with feedback | after it | with feedback |\n|---|---|---|---|---|")
    for fault, of in found["feedback"].items():
        cells = []
        for stretch in ("fault", "after"):
            figures = {key: 100 * of[stretch][key] for key in ("accuracy", "difference", "low", "high")}
            cells += ["{accuracy:.1f}", "{difference:+.1f} [{low:+.1f}, {high:+.1f}]"]
            cells[-2:] = [cell.format(**figures) for cell in cells[-2:]]
        print("| " + " | ".join([fault, *cells]) + " |", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.benchmarks.monitor", description=__doc__)
    parser.add_argument("sets", nargs="+", help="digits, or .npz files of features, as bench-robustness takes them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--streams", type=int, default=5, help="for each seed, modality and fault")
    parser.add_argument("--clean", type=int, default=50, help="streams for false alarms, for each seed")
    parser.add_argument("--epochs", type=int, help="of training; as the bench, if not given")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--picture", type=Path, help="of one stream of the first set, drawn instead of measuring")
    options = parser.parse_args(argv)
    if options.picture is not None:
        name = options.sets[0]
        with one_thread():
            subject = train(name, 0, options.epochs)
        title = f"{Path(name).stem}: noise in {list(subject.views)[-1]} from row 601 on"
        print("\n".join(picture(subject, options.picture, title)))
        return
    every = []
    for name in options.sets:
        every.append(measure(name, options.seeds, options.streams, options.clean, options.epochs))
        show(every[-1])
    if options.json is not None:
        write_results_file(options.json, "monitor", {"sets": every})


if __name__ == "__main__":
    main()
