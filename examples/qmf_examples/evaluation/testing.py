"""Trained runs on clean and corrupted test data: one record per run, kind of noise and level."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..corruption.conditions import PAPER_KINDS, Condition
from ..errors import CommandError
from ..frozen.heads import check_encoders, features_folder
from ..models.divergence import DivergenceWatch, check_probabilities
from ..models.learners import Learner
from ..training.run import FINISHED, load_learner, quieten
from ..training.settings import FILE, Settings, differences, load_run, methods_of
from .damaged_tests import Features, NoisePlan, Samples, UnderConditions
from .reliability import calibration_error, damage_detection, risk_coverage_area
from .statistics import correlation


class Tested(NamedTuple):
    """One run under one kind of noise at one level."""

    settings: Settings
    condition: Condition
    accuracy: float
    """In [0, 1]."""
    calibration_error: float
    risk_coverage_area: float
    correlation: float | None
    """Of weight and loss, over samples; None for methods without weights."""
    weights: Tensor | None
    """``[M, B]``, and the next: for the picture."""
    losses: Tensor | None
    right: bytes
    """Whether each sample's answer is right, a byte of 1 or 0, for paired tests."""
    detection: float | None = None
    """Area under the ROC curve of "this modality is damaged" from the weights; None where none is, or has weights."""


def find_runs(places: Sequence[Path]) -> list[Path]:
    """The folders of finished runs in and below ``places``: of one data set, each method with one set of settings.

    Raises:
        CommandError: no run, one that is not finished, or several that do not belong in one table.
    """
    folders = list(dict.fromkeys(path.parent for place in places for path in sorted(place.rglob(FILE))))
    if not folders:
        raise CommandError(f"no runs in {', '.join(map(str, places))}: no {FILE} there or below")
    unfinished = [str(folder) for folder in folders if not (folder / FINISHED).exists()]
    if unfinished:
        raise CommandError(f"not finished, go on with train --resume: {', '.join(unfinished[:3])}")
    first: dict[str, Settings] = {}
    seen: dict[tuple[str, int], Path] = {}
    for folder in folders:
        settings = load_run(folder)
        same = seen.setdefault((settings.method, settings.seed), folder)
        if same != folder:
            raise CommandError(
                f"{same} and {folder} are both {settings.method} with seed {settings.seed}: evaluate them apart"
            )
        other = first.setdefault(settings.method, settings)
        different = [text for text in differences(settings, other) if not text.startswith("seed ")]
        one = next(iter(first.values()))
        if different or settings.data_set != one.data_set:
            raise CommandError(f"{folder} does not belong to the others: {'; '.join(different) or settings.data_set}")
        if settings.frozen != one.frozen:
            told = "; ".join(text for text in differences(settings, one) if text.startswith("frozen "))
            raise CommandError(f"{folder} does not belong to {folders[0]}: {told}: evaluate them apart")
    order = methods_of(one.data_set, one.frozen)
    return [folder for (method, _), folder in sorted(seen.items(), key=lambda run: (order.index(run[0][0]), run[0][1]))]


def evaluate_runs(
    folders: Sequence[Path],
    plan: NoisePlan,
    data_root: Path | None = None,
    device: str = "cpu",
    batch_size: int = 64,
    workers: int = 0,
    say: Callable[[str], object] = print,
) -> list[Tested]:
    """Test every run under every condition; without noise once, for all kinds.

    Args:
        folders: of runs, from ``find_runs``.
        plan: the corruptions.
        data_root: in place of each run's own.
        device: where to run.
        batch_size: samples at a time; no figure depends on it.
        workers: loader processes; none under a released protocol, whose random numbers go on from sample to sample.
        say: told of each run.

    Raises:
        CommandError: a run that cannot be loaded, or whose weights or scores are not finite.
    """
    quieten()
    tested: list[Tested] = []
    encoded: dict[str, Features] = {}
    for folder in folders:
        settings, learner, numbering = load_learner(folder, data_root)
        learner.to(device)
        data: UnderConditions
        if settings.frozen:
            # One and the same for all methods and seeds, which the encoders do not know of.
            key, cache = repr(replace(settings, method="", seed=0)), features_folder(folder)
            if key not in encoded:
                encoded[key] = Features(settings, plan, cache, batch_size, say)
            check_encoders(folder, settings, encoded[key].split)
            data = encoded[key]
        elif plan.further:
            raise CommandError(f"--damage is for runs on frozen encoders (train --frozen), got {folder}")
        else:
            data = Samples(settings, numbering, plan, batch_size, workers, say)
        clean: Tested | None = None
        for condition in plan.conditions:
            if condition.kind in PAPER_KINDS and condition.level == 0 and clean is not None:
                tested.append(clean._replace(condition=condition))
                continue
            record = _test(learner, data.batches(condition), settings, condition, device)
            clean = record if clean is None and condition.level == 0 else clean
            tested.append(record)
        shown = ", ".join(f"{100 * t.accuracy:.1f}" for t in tested[-len(plan.conditions) :])
        say(f"{folder}: {settings.method}, seed {settings.seed}: {shown} %")
    return tested


@torch.no_grad()
def _test(
    learner: Learner, batches: Iterable[dict[str, Any]], settings: Settings, condition: Condition, device: str
) -> Tested:
    scores, targets, weights, losses, damaged = [], [], [], [], []
    watch, run = DivergenceWatch(), f"{settings.method}, seed {settings.seed}, {condition.name}"
    for batch in batches:
        answer = learner(_to(batch["inputs"], device))
        watch.add(answer)
        scores.append(answer.scores.float().cpu())
        targets.append(batch["label"])
        damaged.append(batch["damaged"])
        if answer.weights is not None:
            weights.append(answer.weights.float().cpu())
            losses.append(learner.unimodal_losses(answer, batch["label"].to(device)).cpu())
    problem = watch.problem(learner)
    if problem:
        raise CommandError(f"{run}: {problem}")
    probabilities, target = torch.cat(scores).softmax(-1), torch.cat(targets)
    check_probabilities(probabilities, run)
    correct = probabilities.argmax(-1) == target
    w = x = r = found = None
    if weights:
        w, x = torch.cat(weights, 1), torch.cat(losses, 1)
        r = correlation(w, x)
        # A view beyond the modalities, such as ETMC's joint one, is neither damaged nor whole.
        found = damage_detection(w[: len(damaged[0])], torch.cat(damaged, 1))
    return Tested(
        settings,
        condition,
        correct.double().mean().item(),
        calibration_error(probabilities, target),
        risk_coverage_area(probabilities.amax(-1), correct),
        r,
        w,
        x,
        correct.to(torch.uint8).numpy().tobytes(),
        found,
    )


def _to(inputs: Any, device: str) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: _to(value, device) for name, value in inputs.items()}
