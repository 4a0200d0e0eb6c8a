"""What adapting at test time brings, and costs: ``python -m qmf_examples.benchmarks.adaptation RUN... --damage ...``.

Streams of test samples through trained heads, answered by the fusion as trained and by ``TestTimeAdaptation``, paired
sample by sample: clean, with one modality damaged throughout, with it damaged in half of the samples, and the first two
with the classes one after the other, which READ's balancing term does not expect. Of runs on frozen encoders
(``qmf-fusion train --frozen``), which have the damages of images and texts; without a run, of the digits.
"""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from qmf_fusion.adaptation import TestTimeAdaptation, adaptation_loss
from qmf_fusion.fusion import FusionOutput, QualityAwareFusion

from ..comparison.heads import Config, train_heads
from ..comparison.prepared import DIGITS, Prepared, prepare
from ..corruption.every_row import parse_damages
from ..corruption.features import DAMAGES
from ..data.digits import load_digits
from ..errors import CommandError
from ..evaluation.paired_difference import TEST, Difference, difference
from ..evaluation.testing import find_runs
from ..files import write_atomically
from ..frozen.encode import encode_split
from ..frozen.heads import check_encoders, features_folder, load_split
from ..models.feature_heads import Scaled
from ..models.learners import Answer, Learner, QualityAware
from ..models.methods import METHODS
from ..processes import one_thread
from ..training.run import load_learner, quieten

DIGITS_RULES = ("QMF, paper", "robust")
DIGITS_DAMAGES = {"noise": 2.0, "impulses": 0.3, "offset": 2.0, "scale": 5.0, "stuck": 0.0}
"""Of all rows of a view, with the levels of ``corruption.features``."""
CONDITIONS = ("clean", "one damaged", "half damaged", "clean, by class", "one damaged, by class")
AS_TRAINED = "as trained"


class Published(TestTimeAdaptation):
    """With the balancing term as in READ's published code, of the softmax of the probabilities' sum: of a batch of B
    samples, their mean sharpened B-fold.
    """

    def loss(self, out: FusionOutput) -> Tensor:
        whole = torch.ones_like(out.logits[..., 0], dtype=torch.bool)
        entropy = torch.special.entr(out.logits.softmax(-1).sum(0).softmax(-1)).sum()
        return adaptation_loss(out.logits, whole, 0.0) - self.balance * entropy


Make = Callable[[QualityAwareFusion], TestTimeAdaptation]
VARIANTS: dict[str, Make] = {
    "adapted": TestTimeAdaptation,
    "ten times the step": partial(TestTimeAdaptation, lr=10.0),
    "episodic": partial(TestTimeAdaptation, episodic=True),
    "without balance": partial(TestTimeAdaptation, balance=0.0),
    "published balance": Published,
}
"""Against the fusion as trained."""


class Trained(NamedTuple):
    """A seed's fusion before its test set: what its heads say of whole and of damaged samples."""

    name: str
    fusion: QualityAwareFusion
    target: Tensor
    clean: Answer
    damaged: dict[str, Answer]
    """By damage, all rows of every modality."""
    touched: dict[str, tuple[bool, ...]]
    """By damage, which modalities it changes."""
    seed: int


class Stream(NamedTuple):
    """Heads' outputs as they come."""

    name: str
    """What of it differs within a condition: the damage and the modality."""
    order: Tensor
    """``[N]``: which sample comes when."""
    replaced: Tensor
    """bool ``[M, N]``, by sample: which are taken from ``damage``."""
    damage: str | None


def fusion_of(learner: Learner) -> QualityAwareFusion | None:
    """Of a method of this package; None of any other."""
    method = learner.method if isinstance(learner, Scaled) else learner
    return method.model.fusion if isinstance(method, QualityAware) else None


def of_digits(seeds: int, epochs: int) -> Iterator[Trained]:
    """The two rules on the digits, their views damaged in all rows."""
    data = load_digits()
    for seed in range(seeds):
        prepared = prepare(data, DIGITS._replace(conditions=DIGITS.conditions[:1]), seed)
        for rule in DIGITS_RULES:
            training = METHODS[rule].training
            assert training is not None
            with one_thread():
                learner = train_heads(training, prepared, Config(epochs=epochs), seed)
            yield _digits(rule, learner, prepared, seed)


@torch.no_grad()
def _digits(rule: str, learner: Learner, data: Prepared, seed: int) -> Trained:
    clean, damaged = data.tests[0].views, {}
    for kind, level in DIGITS_DAMAGES.items():
        rng = np.random.default_rng([seed, *kind.encode()])
        views = {name: DAMAGES[kind](view.double().numpy(), level, rng) for name, view in clean.items()}
        damaged[kind] = learner({name: torch.from_numpy(np.array(view)).float() for name, view in views.items()})
    fusion = fusion_of(learner)
    assert fusion is not None
    touched = dict.fromkeys(damaged, (True,) * len(clean))
    return Trained(rule, fusion, data.test_labels, learner(clean), damaged, touched, seed)


def of_runs(places: Sequence[Path], damages: Sequence[str], data_root: Path | None) -> Iterator[Trained]:
    """Every finished run in and below ``places``.

    Raises:
        CommandError: a run that is not on frozen encoders or has no fusion of this package, or an unknown damage.
    """
    quieten()
    try:
        wanted = parse_damages(damages)
    except ValueError as error:
        raise CommandError(f"--damage: {error}") from error
    for folder in find_runs(places):
        settings, learner, _ = load_learner(folder, data_root)
        fusion = fusion_of(learner)
        if not settings.frozen or fusion is None:
            raise CommandError(f"{folder} must be a run of a fusion on frozen encoders (train --frozen)")
        split = load_split(settings, "test", features_folder(folder))
        check_encoders(folder, settings, split)
        rows = {name: x[0] for name, x in split.rows.items()}
        damaged, touched = {}, {}
        with torch.no_grad():
            for damage in wanted:
                seen = encode_split(replace(settings, seed=0), "test", features_folder(folder), damage)
                damaged[damage.name] = learner({name: seen[name][0] for name in rows})
                touched[damage.name] = tuple(not torch.equal(seen[name][0], rows[name]) for name in rows)
            clean = learner(rows)
        yield Trained(settings.method, fusion, split.labels, clean, damaged, touched, settings.seed)


def streams_of(trained: Trained, condition: str) -> Iterator[Stream]:
    """The streams of a condition: one of clean samples, else one for each damage and modality."""
    num = len(trained.target)
    generator = torch.Generator().manual_seed(trained.seed)
    order = torch.randperm(num, generator=generator)
    half = torch.rand(num, generator=generator) < 0.5
    if condition.endswith("by class"):
        order = order[trained.target[order].argsort(stable=True)]
    none = torch.zeros(trained.fusion.num_modalities, num, dtype=torch.bool)
    if condition.startswith("clean"):
        yield Stream("", order, none, None)
        return
    for damage, touched in trained.touched.items():
        for m, changed in enumerate(touched):
            if changed:
                replaced = none.clone()
                replaced[m] = half if condition.startswith("half") else True
                yield Stream(f"{damage}, {trained.fusion.names[m]}", order, replaced, damage)


class Answered(NamedTuple):
    """A stream's answers, by sample in the order of the test set, in float64."""

    right: NDArray[np.float64]
    """1 or 0."""
    log_loss: NDArray[np.float64]
    """In nats."""


@torch.no_grad()
def answers(trained: Trained, stream: Stream, batch_size: int, make: Make | None) -> Answered:
    """The stream's answers by an adaptation of the fusion; None is the fusion as trained, whatever the batches."""
    adaptation = None if make is None else make(trained.fusion)
    damaged = trained.clean if stream.damage is None else trained.damaged[stream.damage]
    log_loss, right = torch.zeros(2, len(trained.target), dtype=torch.float64)
    for index in stream.order.split(len(stream.order) if adaptation is None else batch_size):
        taken = stream.replaced[:, index].unsqueeze(-1)
        logits = _mixed(taken, trained.clean.unimodal_logits, damaged.unimodal_logits, index)
        features = None
        if trained.fusion.rule.feature_widths and trained.clean.features and damaged.features:
            features = _mixed(taken, trained.clean.features, damaged.features, index)
        given = (logits, None, features)
        out = trained.fusion(*given) if adaptation is None else adaptation.step(*given)
        right[index] = (out.logits.argmax(-1) == trained.target[index]).double()
        log_loss[index] = F.cross_entropy(out.logits.double(), trained.target[index], reduction="none")
    return Answered(right.numpy(), log_loss.numpy())


def _mixed(taken: Tensor, clean: Sequence[Any], damaged: Sequence[Any], index: Tensor) -> list[Any]:
    pairs = zip(taken, clean, damaged, strict=True)
    return [None if x is None else torch.where(t, y[index], x[index]) for t, x, y in pairs]


def measure(every: Sequence[Trained], batch_size: int, variants: Sequence[str]) -> list[dict[str, Any]]:
    """A record for each condition of one rule's seeds, and each variant."""
    records = []
    for condition in CONDITIONS:
        found: dict[str, dict[str, list[Answered]]] = {}
        for trained in every:
            for stream in streams_of(trained, condition):
                of_stream = found.setdefault(stream.name, {})
                for name in (AS_TRAINED, *variants):
                    of_stream.setdefault(name, []).append(answers(trained, stream, batch_size, VARIANTS.get(name)))
        right, loss = (
            {
                name: [np.stack([x[n] for x in each[name]]) for each in found.values()]
                for name in (AS_TRAINED, *variants)
            }
            for n in range(2)
        )
        for variant in variants:
            gains = [one - base for one, base in zip(right[variant], right[AS_TRAINED], strict=True)]
            records.append(
                {
                    "rule": every[0].name,
                    "batch_size": batch_size,
                    "condition": condition,
                    "variant": variant,
                    "as_trained": float(np.mean(right[AS_TRAINED])),
                    **difference(gains).to_dict(),
                    "log_loss": {AS_TRAINED: float(np.mean(loss[AS_TRAINED])), variant: float(np.mean(loss[variant]))},
                    "streams": {name: difference([x]).to_dict() for name, x in zip(found, gains, strict=True)},
                }
            )
    return records


COLUMNS = (
    "rule",
    "batch",
    "stream",
    "variant",
    AS_TRAINED,
    "adapted less as trained",
    "better / tie / worse",
    "log-loss",
)


def row(record: dict[str, Any]) -> str:
    """A line of the table: accuracies in points, and of how many streams the interval says what."""
    gain = Difference(*(100 * record[name] for name in ("difference", "low", "high")))
    verdicts = [each["verdict"] for each in record["streams"].values()]
    cells = [record["rule"], record["batch_size"], record["condition"], record["variant"]]
    cells += [f"{100 * record['as_trained']:.1f}", f"{gain.points:+.1f} {gain.interval()}"]
    cells.append(" / ".join(str(verdicts.count(verdict)) for verdict in ("better", "tie", "worse")))
    cells.append(" to ".join(f"{loss:.2f}" for loss in record["log_loss"].values()))
    return "| " + " | ".join(map(str, cells)) + " |"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.benchmarks.adaptation", description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs of one data set; without any, the digits")
    parser.add_argument("--damage", nargs="+", default=[], help="of runs: as in features, to every row of a modality")
    parser.add_argument("--data-root", type=Path, help="the data set's folder, where it has moved")
    parser.add_argument("--seeds", type=int, default=5, help="of the digits")
    parser.add_argument("--epochs", type=int, default=40, help="of the digits")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[64, 8, 256], help="the first with every variant")
    parser.add_argument("--output", type=Path, help="a file for all figures, as JSON in fractions")
    options = parser.parse_args(argv)
    rules: dict[str, list[Trained]] = {}
    if options.runs:
        made = of_runs(options.runs, options.damage, options.data_root)
    else:
        made = of_digits(options.seeds, options.epochs)
    for trained in made:
        rules.setdefault(trained.name, []).append(trained)
    print("| " + " | ".join(COLUMNS) + " |")
    print("|---" * len(COLUMNS) + "|")
    records = []
    for every in rules.values():
        for number, batch_size in enumerate(options.batch_sizes):
            for record in measure(every, batch_size, list(VARIANTS)[: None if number == 0 else 1]):
                records.append(record)
                print(row(record), flush=True)
    if options.output is not None:
        seeds = {name: len(every) for name, every in rules.items()}
        text = json.dumps({"test": TEST, "seeds": seeds, "records": records}, indent=1) + "\n"
        write_atomically(options.output, lambda file: file.write(text.encode()))


if __name__ == "__main__":
    main()
