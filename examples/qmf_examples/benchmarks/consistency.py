"""What consistency terms bring: ``python -m qmf_examples.benchmarks.consistency nyud2.npz mvsa.npz``.

Trains the bench's heads on files of encoders' features without the terms of ``qmf_fusion.consistency`` and with each,
and measures the test split: whole, with one modality missing (the mean over which), damaged (the mean over damages),
and how often confidence rises where a modality is taken away, which is what the first term is against.
"""

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qmf_fusion.consistency import consistency_terms
from qmf_fusion.missing import calibration_error

from ..comparison.heads import train_heads
from ..comparison.prepared import Prepared, prepare_file
from ..comparison.robustness import FILES
from ..data.feature_files import load_npz
from ..models.learners import Answer, Learner, QualityAware
from ..models.methods import METHODS, Parts, Training
from ..processes import one_thread

RULES = ("QMF, paper", "robust")
TERMS = {"neither": (0.0, 0.0), "rise": (1.0, 0.0), "disagreement": (0.0, 1.0)}
"""What the two terms count in the loss."""
COLUMNS = ("accuracy", "one missing", "damaged", "log-loss", "one missing", "ECE", "one missing", "rises")
LOSSES = (3, 4)
"""Those of the columns that are in nats; all others are in points."""


class Consistent(Learner):
    """A quality-aware learner whose loss has the terms besides."""

    def __init__(self, inner: QualityAware, rise: float, disagreement: float) -> None:
        super().__init__()
        self.inner, self.rise, self.disagreement = inner, rise, disagreement
        self.encoders = inner.encoders

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        return self.inner(inputs)

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        loss = self.inner.loss(answer, target, index)
        if not self.rise and not self.disagreement:
            return loss
        fusion = self.inner.model.fusion
        terms = consistency_terms(fusion, answer.unimodal_logits, answer.present, answer.features)
        return loss + self.rise * terms.rise + self.disagreement * terms.disagreement


def with_terms(rule: str, rise: float, disagreement: float) -> Training:
    """The registry's training of a rule, with the terms."""
    base = METHODS[rule].training
    assert base is not None

    def build(parts: Parts) -> Learner:
        inner = base.build(parts)
        assert isinstance(inner, QualityAware)
        return Consistent(inner, rise, disagreement)

    return Training(base.name, build)


@torch.no_grad()
def measure(learner: Consistent, data: Prepared) -> list[float]:
    """The columns: in points, but for the log-losses."""
    fusion, labels = learner.inner.model.fusion, data.test_labels
    damaged = [(learner(test.views).scores.argmax(-1) == labels).double().mean().item() for test in data.tests[1:]]
    clean = learner(data.tests[0].views)
    whole = clean.scores.double()
    partial = []
    for m in range(fusion.num_modalities):
        present = torch.ones(fusion.num_modalities, dtype=torch.bool)
        present[m] = False
        features = clean.features if fusion.rule.feature_widths else None
        partial.append(fusion(clean.unimodal_logits, present=present, features=features).logits.double())
    found: list[tuple[float, float, float]] = []
    for every in ([whole], partial):
        right = statistics.fmean((x.argmax(-1) == labels).double().mean().item() for x in every)
        loss = statistics.fmean(F.cross_entropy(x, labels).item() for x in every)
        error = statistics.fmean(calibration_error(x.softmax(-1), labels) for x in every)
        found.append((100 * right, loss, 100 * error))
    confidence = whole.softmax(-1).amax(-1)
    rises = statistics.fmean((x.softmax(-1).amax(-1) > confidence).double().mean().item() for x in partial)
    rights, losses, errors = zip(*found, strict=True)
    return [*rights, 100 * statistics.fmean(damaged), *losses, *errors, 100 * rises]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m qmf_examples.benchmarks.consistency", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help=".npz files of features, as bench-robustness takes them")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=FILES.epochs)
    options = parser.parse_args(argv)
    print("| set | rule | term | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 3) + "|")
    for path in options.files:
        content = load_npz(path)
        for rule in RULES:
            for term, weights in TERMS.items():
                rows = []
                for seed in range(options.seeds):
                    data = prepare_file(content, seed)
                    with one_thread():
                        config = replace(FILES, epochs=options.epochs)
                        learner = train_heads(with_terms(rule, *weights), data, config, seed)
                    assert isinstance(learner, Consistent)
                    rows.append(measure(learner, data))
                means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
                cells = [f"{mean:.{3 if n in LOSSES else 1}f}" for n, mean in enumerate(means)]
                print("| " + " | ".join([content.name, rule, term, *cells]) + " |", flush=True)


if __name__ == "__main__":
    main()
