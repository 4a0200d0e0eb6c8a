"""The robustness bench: the same heads for every rule that can share them, under every condition."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion

from ..data.multiview import MultiView, Prepared, prepare
from ..models import baselines
from ..models.methods import Fused
from .results import Score, pearson

DROPOUT = 0.3


@dataclass(frozen=True)
class BenchConfig:
    """What decides the numbers, bit for bit on one machine."""

    seeds: tuple[int, ...] = (0, 1, 2)
    """Each seeds a split, the damage, the first weights and the order of the batches."""
    steps: int = 1000
    batch_size: int = 128
    hidden: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 1e-4


class Heads(NamedTuple):
    """Trained heads, and what their rules need."""

    model: FusionModel
    confidence: nn.ModuleList
    """Predict the probability of the true class from a head's hidden layer (PDF); trained with ``plain`` alone."""


class Given(NamedTuple):
    """What a rule may look at."""

    logits: Tensor
    """``[V, B, K]``."""
    fusion: QualityAwareFusion
    confidence: Tensor
    """``[V, B]``."""
    train_logits: Tensor
    train_labels: Tensor
    corrupted: Tensor
    """``[V, B]``, for the oracle."""
    best: int
    """The view that is best on the clean test set: a choice in its own favour."""


class Rule(NamedTuple):
    """A row of the table."""

    name: str
    training: str
    fuse: Callable[[Given], Fused]
    told: bool = False
    """Whether it is told what is corrupted, and so is out of competition."""


def _layer(**options: object) -> Callable[[Given], Fused]:
    def fuse(given: Given) -> Fused:
        out = QualityAwareFusion(len(given.logits), **options)(given.logits)  # type: ignore[arg-type]
        return Fused(out.logits, out.weights)

    return fuse


def _trained(given: Given) -> Fused:
    out = given.fusion(given.logits)
    return Fused(out.logits, out.weights)


def _calibrated(given: Given) -> Fused:
    fusion = QualityAwareFusion.robust(len(given.logits)).calibrate(given.train_logits, given.train_labels)
    out = fusion(given.logits)
    return Fused(out.logits, out.weights)


RULES: tuple[Rule, ...] = (
    Rule("mean of logits", "plain", lambda g: Fused(g.logits.mean(0))),
    Rule("mean of probabilities", "plain", lambda g: Fused(g.logits.softmax(-1).mean(0))),
    Rule("best single view", "plain", lambda g: Fused(g.logits[g.best])),
    Rule("MSP, probabilities", "plain", _layer(uncertainty="msp", combine="probabilities")),
    Rule("entropy, probabilities", "plain", _layer(uncertainty="entropy", combine="probabilities")),
    Rule("evidence, probabilities", "plain", _layer(uncertainty="evidence", combine="probabilities")),
    Rule("energy, logits", "plain", _layer()),
    Rule("TMC", "tmc", lambda g: Fused(*baselines.dempster(F.softplus(g.logits)))),
    Rule("RCML", "rcml", lambda g: Fused(*baselines.average_belief(F.softplus(g.logits)))),
    Rule("PDF", "plain", lambda g: Fused(*baselines.collaborative_belief(g.logits, g.confidence))),
    Rule("QMF, released ranking", "released", _trained),
    Rule("QMF, paper's ranking", "paper", _trained),
    Rule("QMF, margin ranking", "margin", _trained),
    Rule("energy of LogitNorm, probabilities", "logitnorm", _trained),
    Rule("robust", "robust", _trained),
    Rule("robust, calibrated", "robust", _calibrated),
    Rule("robust + modality dropout", "dropout", _trained),
    Rule(
        "oracle (told what is corrupted)", "plain", lambda g: Fused(baselines.fuse_known(g.logits, g.corrupted)), True
    ),
)
TRAININGS = tuple(dict.fromkeys(rule.training for rule in RULES))
OURS = ("robust", "robust, calibrated", "robust + modality dropout")


def make_fusion(training: str, num: int) -> QualityAwareFusion:
    """The layer that the training's heads are trained with."""
    if training in ("robust", "dropout"):
        return QualityAwareFusion.robust(num)
    if training == "logitnorm":
        return QualityAwareFusion(num, normalize_logits=0.1, combine="probabilities")
    return QualityAwareFusion(num)


def train_heads(training: str, data: Prepared, num_classes: int, config: BenchConfig, seed: int) -> Heads:
    """One set of heads, on clean data: MLPs with one hidden layer, Adam, a fixed number of steps."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = {
            str(v): nn.Sequential(
                nn.Linear(x.shape[1], config.hidden), nn.ReLU(), nn.Linear(config.hidden, num_classes)
            )
            for v, x in enumerate(data.train)
        }
        confidence = nn.ModuleList(nn.Linear(config.hidden, 1) for _ in data.train)
    fusion = make_fusion(training, len(heads))
    model = FusionModel(heads, fusion, modality_dropout=DROPOUT if training == "dropout" else 0.0, dropout_seed=seed)
    x, y = _tensors(data.train), torch.from_numpy(data.train_labels)
    form = training if training in ("released", "margin") else "paper"
    # The ranking loss costs LogitNorm's heads accuracy, whose weights hardly differ: the stronger baseline is without.
    criterion = QMFLoss(fusion, len(y), 0.0 if training == "logitnorm" else 0.1, form=form)
    parameters = [*model.parameters(), *(confidence.parameters() if training == "plain" else ())]
    optimizer = torch.optim.Adam(parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)
    for step, index in enumerate(_batches(len(y), config, seed)):
        given, target = {str(v): view[index] for v, view in enumerate(x)}, y[index]
        optimizer.zero_grad()
        if training in ("plain", "tmc", "rcml"):
            hidden = [heads[name][:2](view) for name, view in given.items()]
            logits = torch.stack([heads[name][2](h) for name, h in zip(given, hidden, strict=True)])
            annealing = min(1.0, step / (0.5 * config.steps))
            if training == "plain":
                loss = _plain_loss(logits, hidden, confidence, target)
            else:
                evidential = baselines.tmc_loss if training == "tmc" else baselines.rcml_loss
                loss = evidential(logits, target, annealing)
        else:
            out = model(given)
            loss = criterion(out.unimodal_logits, target, index, out.present).loss
        loss.backward()
        optimizer.step()
    model.eval()
    return Heads(model, confidence)


def _plain_loss(logits: Tensor, hidden: Sequence[Tensor], confidence: nn.ModuleList, target: Tensor) -> Tensor:
    """Every view's cross-entropy, and that of the mean of probabilities; the confidences learn beside them."""
    log_probs = logits.log_softmax(-1)
    fused = F.nll_loss(torch.logsumexp(log_probs, 0) - torch.log(torch.tensor(float(len(logits)))), target)
    label = target.view(1, -1, 1).expand(len(logits), -1, 1)
    own = log_probs.gather(-1, label).squeeze(-1)
    predicted = _confidence(confidence, [h.detach() for h in hidden])
    return fused - own.mean(1).sum() + F.mse_loss(predicted, own.detach().exp())


def _confidence(confidence: nn.ModuleList, hidden: Sequence[Tensor]) -> Tensor:
    return torch.stack([torch.sigmoid(net(h)).squeeze(-1) for net, h in zip(confidence, hidden, strict=True)])


def _batches(num: int, config: BenchConfig, seed: int) -> Iterator[Tensor]:
    generator, size, left = torch.Generator().manual_seed(seed), min(config.batch_size, num), torch.empty(0).long()
    for _ in range(config.steps):
        if len(left) < size:
            left = torch.randperm(num, generator=generator)
        yield left[:size]
        left = left[size:]


def _tensors(views: Sequence[object]) -> list[Tensor]:
    return [torch.tensor(view, dtype=torch.float32) for view in views]


@torch.no_grad()
def score(heads: Heads, training: str, data: Prepared, seed: int) -> list[Score]:
    """Every rule that uses these heads, under every condition."""
    model, labels = heads.model, torch.from_numpy(data.test_labels)
    train_logits, _ = _run(heads, data.train)
    scores: list[Score] = []
    best = 0
    for i, condition in enumerate(data.conditions):
        logits, confidence = _run(heads, condition.views)
        losses = torch.stack([F.cross_entropy(x, labels, reduction="none") for x in logits])
        if i == 0:
            best = baselines.best_view([(x.argmax(-1) == labels).double().mean().item() for x in logits])
        train_labels, corrupted = torch.from_numpy(data.train_labels), torch.from_numpy(condition.corrupted)
        given = Given(logits, model.fusion, confidence, train_logits, train_labels, corrupted, best)
        for rule in RULES:
            if rule.training == training:
                fused = rule.fuse(given)
                accuracy = (fused.scores.argmax(-1) == labels).double().mean().item()
                correlation = None if fused.weights is None else pearson(fused.weights, losses)
                scores.append(Score(rule.name, condition.name, 0.0, seed, accuracy, correlation))
    return scores


def _run(heads: Heads, views: Sequence[object]) -> tuple[Tensor, Tensor]:
    nets = list(heads.model.heads.values())
    hidden = [net[:2](x) for net, x in zip(nets, _tensors(views), strict=True)]  # type: ignore[index]
    logits = torch.stack([net[2](h) for net, h in zip(nets, hidden, strict=True)])  # type: ignore[index]
    return logits, _confidence(heads.confidence, hidden)


class Job(NamedTuple):
    """A set under its features' conditions, or under its images'."""

    data: MultiView
    images: bool

    @property
    def name(self) -> str:
        return f"{self.data.name} (images)" if self.images else self.data.name


def list_jobs(sets: Sequence[MultiView]) -> list[Job]:
    """Every set under the features' conditions; one with images also under the images'."""
    return [Job(data, images) for data in sets for images in (False, True) if not images or data.images is not None]


def run(
    sets: Sequence[MultiView], config: BenchConfig, progress: Callable[[str, int, str, float], None] | None = None
) -> dict[str, list[Score]]:
    """The whole bench, on one thread: by job's name, its scores.

    Args:
        sets: at least one.
        config: the settings.
        progress: called with a set's name, a seed, a training's name and its seconds after each training.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums in one order, whatever the machine
    try:
        results: dict[str, list[Score]] = {job.name: [] for job in list_jobs(sets)}
        for data in sets:
            classes = int(data.labels.max()) + 1
            for seed in config.seeds:
                prepared = [(job, prepare(data, seed, job.images)) for job in list_jobs([data])]
                for training in TRAININGS:
                    start = time.perf_counter()
                    heads = train_heads(training, prepared[0][1], classes, config, seed)
                    for job, conditions in prepared:
                        results[job.name] += score(heads, training, conditions, seed)
                    if progress is not None:
                        progress(data.name, seed, training, time.perf_counter() - start)
        return results
    finally:
        torch.set_num_threads(threads)
