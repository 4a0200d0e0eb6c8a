"""How soon the monitor sees a fault, how often it sees one where none is, and what feedback brings.

``python -m qmf_examples.benchmarks.monitor digits nyud2.npz --json monitor.json`` trains the recommended rule on each
set, on clean data, and makes streams of its test split's rows:

- **false alarms**: reference and stream drawn from the rows with replacement, so that they are exchangeable;
- **delays**: the same, and after a clean stretch one modality has a fault for good, each in turn;
- **feedback**: the rows' quarters take turns as a reference and as three stretches of a stream: clean, with one
  modality broken, and repaired; accuracy with odds that follow, and with odds as given.
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
FIRST_SEED = 1
"""The monitor's memory was chosen on seed 0, which is therefore left out."""
SPLIT = 0
"""Of digits, for every seed: seeds are compared row by row, so they need the same test rows."""
STRETCHES = ("before", "fault", "after")
MEAN = "each in turn"

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
        data, config = prepare(load_digits(), ROBUSTNESS, SPLIT), VIEWS
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


def feedback(subject: Subject, seed: int) -> dict[str, dict[str, dict[str, Tensor]]]:
    """What is right with feedback and what is right without, float64 ``[2, N]`` in the order of the N test rows.

    By fault, by the modality that has it, and by stretch. The fault "none" is a stream without any, of modality "".
    """
    found = {"none": {"": _turns(subject, None, None, seed)}}
    for modality in subject.views:
        for name, fault in faults(subject, modality).items():
            found.setdefault(name, {})[modality] = _turns(subject, modality, fault, seed)
    return found


def _turns(subject: Subject, modality: str | None, fault: Broken | None, seed: int) -> dict[str, Tensor]:
    """Four streams, by which each test row comes once in every stretch, and once in a reference."""
    num = len(subject.labels)
    rng = np.random.default_rng([seed, 3])  # the same streams for all faults
    quarters = [torch.from_numpy(part) for part in np.array_split(rng.permutation(num), 1 + len(STRETCHES))]
    found = {stretch: torch.full((2, num), torch.nan, dtype=torch.float64) for stretch in STRETCHES}
    for turn in range(len(quarters)):
        reference, *stretches = quarters[turn:] + quarters[:turn]
        broken: Views = {}
        if modality is not None and fault is not None:
            before, during, after = (subject.views[modality][part] for part in stretches)
            broken[modality] = torch.cat([before, fault(stretches[1], rng).to(during), after])
        index = torch.cat(stretches)
        out = answer(subject, index, broken)  # at the odds as given, which the last stream has left
        answers = [_followed(subject, reference, out), out.logits.argmax(-1)]
        right = torch.stack([each.eq(subject.labels[index]).double() for each in answers])
        for stretch, part, of_part in zip(STRETCHES, stretches, right.split([*map(len, stretches)], 1), strict=True):
            found[stretch][:, part] = of_part
    return found


@torch.no_grad()
def _followed(subject: Subject, reference: Tensor, out: FusionOutput) -> Tensor:
    """What the fusion answers with feedback, ``[n]``: a few rows at a time, its monitor in between."""
    fusion, answers = subject.model.fusion, []
    monitor = ReliabilityMonitor(fusion, feedback=True).fit(answer(subject, reference))
    for start in range(0, len(out.logits), SLICE):
        part = slice(start, start + SLICE)
        features = None if out.features is None else [None if f is None else f[part] for f in out.features]
        present = None if out.present is None else out.present[:, part]
        fused = fusion([x[part] for x in out.unimodal_logits], present=present, features=features)
        monitor.update(fused)
        answers.append(fused.logits.argmax(-1))
    monitor.reset()  # which gives the rule its odds back
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


def feedback_table(gains: Sequence[Mapping[str, Mapping[str, Mapping[str, Tensor]]]]) -> dict[str, Any]:
    """By fault, broken modality (``MEAN``: of all that know the fault) and stretch, from each seed's ``feedback``."""
    table: dict[str, Any] = {}
    for fault, of in gains[0].items():
        table[fault] = {}
        for modality in [MEAN, *filter(None, of)]:
            over = list(of) if modality == MEAN else [modality]
            table[fault][modality] = {}
            for stretch in STRETCHES:
                # ``[seeds, 2, N]``: a column is one test row, whose streams of several modalities count together.
                both = torch.stack([torch.stack([gain[fault][m][stretch] for m in over]).mean(0) for gain in gains])
                gap = difference([(both[:, 0] - both[:, 1]).numpy()]).to_dict()
                table[fault][modality][stretch] = {"accuracy": round(float(both[:, 1].mean()), 6), **gap}
    return table


def measure(name: str, seeds: int, streams: int, clean: int, epochs: int | None) -> dict[str, Any]:
    """All of a set."""
    raised, found, gains = 0, [], []
    numbers = range(FIRST_SEED, FIRST_SEED + seeds)
    for seed in numbers:
        with one_thread():
            subject = train(name, seed, epochs)
            raised += false_alarms(subject, clean, seed)
            found += list(delays(subject, streams, seed))
            gains.append(feedback(subject, seed))
    return {
        "set": Path(name).stem,
        "seeds": [*numbers],
        "clean streams": seeds * clean,
        "false alarms": raised,
        "delays": delay_table(found),
        "feedback": feedback_table(gains),
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
    columns = list(dict.fromkeys(modality for of in found["feedback"].values() for modality in of))
    for stretch, words in (("fault", "while the fault lasts"), ("after", "after its repair")):
        print(f"\nAccuracy in % {words}, and points that feedback adds [interval] ({TEST}), by what is broken:\n")
        print("| fault | " + " | ".join(columns) + " |\n" + "|---" * (1 + len(columns)) + "|")
        for fault, of in found["feedback"].items():
            cells = [gain_cell(of[modality][stretch]) if modality in of else "" for modality in columns]
            print("| " + " | ".join([fault, *cells]) + " |", flush=True)


def gain_cell(of: Mapping[str, Any]) -> str:
    """Accuracy without feedback, and what feedback adds."""
    figures = {key: 100 * of[key] for key in ("accuracy", "difference", "low", "high")}
    return "{accuracy:.1f} {difference:+.1f} [{low:+.1f}, {high:+.1f}]".format(**figures)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.benchmarks.monitor", description=__doc__)
    parser.add_argument("sets", nargs="+", help="digits, or .npz files of features, as bench-robustness takes them")
    parser.add_argument("--seeds", type=int, default=3, help=f"how many, from {FIRST_SEED} up")
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
