"""Trained runs on clean and corrupted test data: one record per run, kind of noise and level."""

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from ..corruption.conditions import TABLES_PROTOCOL, Condition, paper_conditions
from ..corruption.images import ImageCorruption
from ..corruption.released_streams import ReleasedStreams
from ..corruption.texts import TextCorruption
from ..data.catalogue import DATA_SETS
from ..errors import CommandError
from ..models.divergence import DivergenceWatch, check_probabilities
from ..models.learners import Learner
from ..training.run import FINISHED, load_learner, loader_of, quieten
from ..training.settings import FILE, METHODS, Settings, differences, load_run
from .reliability import calibration_error, risk_coverage_area
from .statistics import correlation


class NoisePlan(NamedTuple):
    """What the test data undergo: each kind of noise at each level."""

    kinds: tuple[str, ...]
    levels: tuple[float, ...]
    protocol: str = TABLES_PROTOCOL
    seed: int = 0


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
        if different or settings.data_set != next(iter(first.values())).data_set:
            raise CommandError(f"{folder} does not belong to the others: {'; '.join(different) or settings.data_set}")
    order = METHODS[next(iter(first.values())).data_set]
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
    for folder in folders:
        settings, learner, numbering = load_learner(folder, data_root)
        learner.to(device)
        module = loader_of(settings.data_set)
        samples = module.load_test(settings, numbering, say=say)
        clean: Tested | None = None
        conditions = paper_conditions(plan.kinds, plan.levels)
        for condition in conditions:
            if condition.level == 0 and clean is not None:
                tested.append(clean._replace(condition=condition))
                continue
            damaged = _damage(samples, settings, condition, plan)
            loader = DataLoader(
                damaged,
                batch_size,
                num_workers=workers if plan.protocol == "clean" else 0,
                collate_fn=module.collate,
            )
            record = _test(learner, loader, settings, condition, device)
            clean = record if condition.level == 0 else clean
            tested.append(record)
        shown = ", ".join(f"{100 * t.accuracy:.1f}" for t in tested[-len(conditions) :])
        say(f"{folder}: {settings.method}, seed {settings.seed}: {shown} %")
    return tested


def _damage(samples: Any, settings: Settings, condition: Condition, plan: NoisePlan) -> Any:
    """The same samples, read and checked once, under a corruption."""
    streams = None if plan.protocol == "clean" else ReleasedStreams(plan.seed)
    options: dict[str, Any] = {"protocol": plan.protocol, "seed": plan.seed, "streams": streams}
    damaged = copy.copy(samples)
    try:
        damaged.corrupt = ImageCorruption(*condition, settings.data_set, **options)
        if not DATA_SETS[settings.data_set].paired:
            damaged.corrupt_text = TextCorruption(condition.level, **options)
    except ValueError as error:
        raise CommandError(f"--levels: {error}") from error
    return damaged


@torch.no_grad()
def _test(learner: Learner, loader: Any, settings: Settings, condition: Condition, device: str) -> Tested:
    scores, targets, weights, unimodal = [], [], [], []
    watch, run = DivergenceWatch(), f"{settings.method}, seed {settings.seed}, {condition.name}"
    for batch in loader:
        answer = learner(_to(batch["inputs"], device))
        watch.add(answer)
        scores.append(answer.scores.float().cpu())
        targets.append(batch["label"])
        if answer.weights is not None:
            weights.append(answer.weights.float().cpu())
            unimodal.append(torch.stack([x.float().cpu() for x in answer.unimodal_logits]))
    problem = watch.problem(learner)
    if problem:
        raise CommandError(f"{run}: {problem}")
    probabilities, target = torch.cat(scores).softmax(-1), torch.cat(targets)
    check_probabilities(probabilities, run)
    correct = probabilities.argmax(-1) == target
    w = x = r = None
    if weights:
        w = torch.cat(weights, 1)
        x = torch.stack([F.cross_entropy(logits, target, reduction="none") for logits in torch.cat(unimodal, 1)])
        r = correlation(w, x)
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
    )


def _to(inputs: Any, device: str) -> Any:
    if isinstance(inputs, Tensor):
        return inputs.to(device)
    return {name: _to(value, device) for name, value in inputs.items()}
