"""A comparison: for every set and seed, train each kind of heads once and score every method on them."""

from collections.abc import Callable
from pathlib import Path

import torch

from ..corruption.conditions import Condition
from ..errors import CommandError
from ..evaluation.reliability import calibration_error, damage_detection, risk_coverage_area
from ..evaluation.statistics import correlation
from ..models.divergence import DivergenceWatch, check_probabilities
from ..models.learners import Learner
from ..models.methods import Frozen, Table, Training
from ..processes import one_thread, place
from .heads import Config, train_heads
from .prepared import Prepared
from .results import Score

Progress = Callable[[str, int, str, int], None]
"""Called with a set's name, a seed, a training's name and the number of epochs that it has finished."""


def compare(
    name: str,
    prepared: Callable[[int], Prepared],
    table: Table,
    config: Config,
    checkpoints: Path | None = None,
    resume: bool = False,
    progress: Progress = lambda *_: None,
) -> list[Score]:
    """Every method of ``table`` under every condition of a set, for every seed; ordered by these three.

    Of several processes (see ``train_heads``) the first has the scores, and the others return none.

    Args:
        name: the set's.
        prepared: from a seed to the set as it is split, scaled and damaged, on the settings' device.
        table: the methods.
        config: the settings.
        checkpoints: an existing folder for them; None writes none.
        resume: go on from the checkpoints there; else those of an earlier run are removed.
        progress: see ``Progress``.

    Raises:
        CommandError: a checkpoint to resume that cannot be read, or is another run's; a training that diverges.
    """
    first = place()[0] == 0
    if first and checkpoints is not None and not resume:
        for old in checkpoints.glob("seed*-*.pt"):
            old.unlink(missing_ok=True)
    scores: list[Score] = []
    conditions: list[Condition] = []
    with one_thread():
        for seed in config.seeds:
            data = prepared(seed)
            conditions = [test.condition for test in data.tests]
            for training in table.trainings:
                path = None if checkpoints is None else checkpoint_path(checkpoints, seed, training)
                learner = train_heads(training, data, config, seed, path, resume, lambda *event: progress(name, *event))
                if first:
                    scores += score(learner, training, table, data, seed)
    names = [method.label for method in table.methods]
    return sorted(scores, key=lambda s: (names.index(s.method), conditions.index(s.under), s.seed))


def checkpoint_path(folder: Path, seed: int, training: Training) -> Path:
    return folder / f"seed{seed}-{training.name}.pt"


@torch.no_grad()
def score(learner: Learner, training: Training, table: Table, data: Prepared, seed: int) -> list[Score]:
    """Every method that uses these heads, under every condition."""
    methods = [method for method in table.methods if table.training(method) == training]
    labels, scores, best, watch = data.test_labels, [], 0, DivergenceWatch()
    clean = learner(data.train).unimodal_logits, data.train_labels
    for number, test in enumerate(data.tests):
        answer = learner(test.views)
        watch.add(answer)
        problem = watch.problem(learner)
        if problem:
            raise CommandError(f"{training.name}, seed {seed}, {test.condition.name}: {problem}")
        losses = learner.unimodal_losses(answer, labels)
        if number == 0:
            hits = [int((x.argmax(-1) == labels).sum()) for x in answer.unimodal_logits]
            best = hits.index(max(hits))
        given = Frozen(answer, test.corrupted, best, *clean)
        for method in methods:
            fused = method.answer(given)
            right = fused.scores.argmax(-1) == labels
            # In float64, where confidences near 1 are still told apart.
            probabilities = fused.scores.double().softmax(-1)
            check_probabilities(probabilities, f"{method.label}, seed {seed}, {test.condition.name}")
            scores.append(
                Score(
                    method.label,
                    *test.condition,
                    seed,
                    right.double().mean().item(),
                    None if fused.weights is None else correlation(fused.weights, losses),
                    right.to(torch.uint8).cpu().numpy().tobytes(),
                    calibration_error(probabilities, labels),
                    risk_coverage_area(probabilities.amax(-1), right),
                    None if fused.weights is None else damage_detection(fused.weights, test.corrupted),
                )
            )
    return scores
