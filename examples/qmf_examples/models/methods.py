"""The one registry of methods: how each is trained, and how it answers. The rows of every table are picked from it."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qmf_fusion import QualityAwareFusion

from .learners import (
    Answer,
    AveragedHeads,
    FusedFeatures,
    Head,
    Joint,
    LateFusion,
    Learner,
    QualityAware,
    RankedAverage,
    UnimodalHeads,
)
from .mmbt import MMBT
from .mmtm import MMTMFusion

RECOMMENDED = "robust"
"""The name of the rule to start with, which the bench holds against all others."""
ALIGNMENT = 1.0
"""What the cosine distance of the two features counts in the alignment baseline."""
DROPOUT = 0.3
"""How often a modality is dropped in training, where it is."""


@dataclass(frozen=True)
class Objective:
    """What of Eq. 18 a run may choose."""

    ranking_weight: float = 0.1
    form: str = "paper"
    pairs: str = "adjacent"
    detach_weights: bool = False
    alpha: float | None = None
    beta: float | None = None
    """None for both: what ``QualityAwareFusion`` takes for the uncertainty."""
    temperature: float = 1.0
    start_epoch: int = 1
    sampling_count: int | None = None
    update: str = "after"

    @property
    def coefficients(self) -> dict[str, Any]:
        """What of it is the layer's."""
        names = ("alpha", "beta", "temperature", "detach_weights")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Parts:
    """What a method is built from: whoever trains says which networks stand at the modalities."""

    modalities: tuple[str, ...]
    num_classes: int
    num_samples: int
    """N, of the whole training set: indices run over it."""
    encoder: Callable[[str], Any]
    """Makes an encoder with its ``width``, for a modality, or ``"bow"`` for a bag of words."""
    classifier: Callable[[int], nn.Module]
    """Makes a classifier of features so wide."""
    heads: Callable[[], dict[str, Head]]
    """Makes an encoder with its classifier for each modality."""
    objective: Objective = Objective()
    annealing_steps: int = 1
    """Over how many batches of training the late parts of a rule's loss come in; of no effect where none is trained."""
    joint_width: int = 0
    """To how many features a modality's are taken before they are joined by concatenation; 0 leaves them."""
    seed: int = 0
    """Of what the method draws in training besides its first weights."""


Build = Callable[[Parts], Learner]


class Training(NamedTuple):
    """One way to train; methods that share it share the trained networks too."""

    name: str
    build: Build


class Frozen(NamedTuple):
    """Trained networks before a test set of B samples: what a method may look at."""

    answer: Answer
    corrupted: Tensor
    """bool ``[V, B]``: which views are corrupted. Only an oracle may look."""
    best: int
    """The view that is best on the clean test set: a choice in its own favour."""
    clean: tuple[Tensor, ...]
    """Logits ``[N, K]`` of each view on the clean data that they were trained on."""
    labels: Tensor
    """``[N]``, of that data."""

    @property
    def logits(self) -> Tensor:
        """``[V, B, K]``."""
        return torch.stack(self.answer.unimodal_logits)


class Fused(NamedTuple):
    """A method's answer."""

    scores: Tensor
    """``[B, K]``, whose softmax is the method's probabilities."""
    weights: Tensor | None = None
    """``[V, B]`` where the method weights views per sample, for the correlation of weight and loss."""


def as_trained(given: Frozen) -> Fused:
    """What the trained method itself answers."""
    return Fused(given.answer.scores, given.answer.weights)


class Method(NamedTuple):
    """A row of the tables."""

    name: str
    training: Training | None = None
    """None for a rule that fuses whatever heads a table has trained."""
    answer: Callable[[Frozen], Fused] = as_trained
    role: str = "fusion"
    """``"single"`` view, plain ``"average"``, ``"fusion"`` (to be held against the averages), ``"variant"`` of the
    recommended rule, or ``"oracle"``."""
    title: str = ""
    """What tables call it, where not by its name."""

    @property
    def label(self) -> str:
        return self.title or self.name


# How networks are trained.


def _alone(modality: str, encoder: str | None = None) -> Build:
    def build(parts: Parts) -> Learner:
        network = parts.encoder(encoder or modality)
        return Joint({modality: network}, parts.classifier(network.width))

    return build


def _concatenated(alignment: float = 0.0, text: str = "text") -> Build:
    def build(parts: Parts) -> Learner:
        encoders = {name: parts.encoder(text if name == "text" else name) for name in parts.modalities}
        widths = [parts.joint_width or encoder.width for encoder in encoders.values()]
        return Joint(encoders, parts.classifier(sum(widths)), alignment, parts.joint_width)

    return build


def _mmtm(parts: Parts) -> Learner:
    first, second = (parts.encoder(name) for name in parts.modalities)
    return MMTMFusion(first, second, parts.modalities, [parts.classifier(x.width) for x in (first, second)])


def _mmbt(parts: Parts) -> Learner:
    return MMBT(parts.encoder("text"), parts.encoder("image"), parts.classifier)


def _widths(heads: dict[str, Head]) -> list[int]:
    """Of the features that their encoders make."""
    encoders: list[Any] = [head.encoder for head in heads.values()]
    return [encoder.width for encoder in encoders]


def _etmc(parts: Parts) -> Learner:
    heads = parts.heads()
    joint = parts.classifier(sum(_widths(heads)))
    given = heads, parts.num_samples, _objective(parts, _UNRANKED), "tmc"
    return FusedFeatures(*given, joint=joint, annealing_steps=parts.annealing_steps)


def _pdf(parts: Parts) -> Learner:
    heads = parts.heads()
    given = heads, parts.num_samples, _objective(parts, _UNRANKED), "pdf"
    return FusedFeatures(*given, num_classes=parts.num_classes, features=_widths(heads))


def _ranking_only(parts: Parts) -> Learner:
    fusion = QualityAwareFusion(parts.modalities, **parts.objective.coefficients)
    return RankedAverage(parts.heads(), parts.num_samples, _objective(parts, {}), fusion)


def _objective(parts: Parts, options: dict[str, Any]) -> dict[str, Any]:
    """``QMFLoss``'s options."""
    chosen = replace(parts.objective, **options)
    names = ("ranking_weight", "form", "pairs", "start_epoch", "sampling_count", "update")
    return {name: getattr(chosen, name) for name in names}


def _quality_aware(objective: dict[str, Any] | None = None, dropout: float = 0.0, **layer: Any) -> Build:
    """QMF with options of its objective fixed, modality dropout, and options of its layer."""

    def build(parts: Parts) -> Learner:
        heads = parts.heads()
        fusion = QualityAwareFusion(parts.modalities, **{**parts.objective.coefficients, **layer})
        return QualityAware(heads, parts.num_samples, _objective(parts, objective or {}), fusion, dropout, parts.seed)

    return build


def _published(rule: str, anneals: bool = False) -> Build:
    """A rule of ``qmf_fusion.rules`` by its name, with its own objective and no ranking, as published."""

    def build(parts: Parts) -> Learner:
        options = {"annealing_steps": parts.annealing_steps} if anneals else {}
        return QualityAware(parts.heads(), parts.num_samples, _objective(parts, _UNRANKED), rule, **options)

    return build


def _robust(dropout: float = DROPOUT, features: bool = True, **switches: Any) -> Build:
    """The recommended rule, trained as recommended, with modality dropout; it judges by features where heads have any
    to show, unless ``features`` is False.
    """

    def build(parts: Parts) -> Learner:
        heads = parts.heads()
        widths = [head.input_width if features else None for head in heads.values()]
        fusion = QualityAwareFusion.robust(parts.modalities, parts.num_classes, features=widths, **switches)
        return QualityAware(heads, parts.num_samples, _objective(parts, {}), fusion, dropout, parts.seed)

    return build


_UNRANKED = {"ranking_weight": 0.0}
UNIMODAL = Training("unimodal", lambda parts: UnimodalHeads(parts.heads()))
PLAIN = Training("plain", lambda parts: AveragedHeads(parts.heads()))
NO_RANKING = Training("qmf-no-ranking", _quality_aware(_UNRANKED))
DROPPED = Training("qmf-no-ranking-dropout", _quality_aware(_UNRANKED, DROPOUT))
ROBUST = Training("robust", _robust())


# How a rule fuses frozen heads.


def alone(view: int, name: str) -> Method:
    """One view, the others unseen."""
    return Method(f"{name} alone", answer=lambda given: Fused(given.answer.unimodal_logits[view]), role="single")


def mean_logits(given: Frozen) -> Fused:
    """Late fusion: the plain mean of logits."""
    return Fused(given.logits.mean(0))


def mean_probabilities(given: Frozen) -> Fused:
    """Late fusion: the plain mean of probabilities."""
    return Fused(given.logits.softmax(-1).mean(0).log())


def best_view(given: Frozen) -> Fused:
    return Fused(given.logits[given.best])


def oracle(given: Frozen) -> Fused:
    """The plain mean of probabilities over the views that it is told are clean: what knowing the quality is worth.

    Where it is told that none is, over all.
    """
    clean = (~given.corrupted | given.corrupted.all(0)).to(given.logits.dtype)
    weights = clean / clean.sum(0)
    return Fused((weights.unsqueeze(-1) * given.logits.softmax(-1)).sum(0).log(), weights)


def _all_fitted(fusion: QualityAwareFusion, given: Frozen) -> bool:
    """Whether every head is right, and sure, on all that it was trained on, of which ``calibrate`` takes nothing."""
    data = fusion.clean_data(given.clean, given.labels)
    try:
        data.fitted(fusion.names)
    except ValueError:
        return True
    return False


def _layer(calibrated: bool = False, **options: Any) -> Callable[[Frozen], Fused]:
    """A layer that fuses heads as they are, ``calibrated`` on what they were trained on, as there is no other data.

    Where every head fits all of that, it says nothing of what is typical, and the layer stays uncalibrated.
    """

    def answer(given: Frozen) -> Fused:
        fusion = QualityAwareFusion(len(given.logits), **options)
        if calibrated and not _all_fitted(fusion, given):
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "the heads of .* are right on every row")
                fusion.calibrate(given.clean, given.labels)
        out = fusion(given.logits)
        return Fused(out.logits, out.weights)

    return answer


_TITLES = {"product_of_experts": "product of experts", "noisy_or": "noisy-or", "entropy_weights": "entropy weights"}
"""Of published rules that fuse whatever heads there are."""
METHODS = {
    method.name: method
    for method in (
        # Trained from the inputs on, by the trainers of the four data sets.
        Method("rgb", Training("rgb", _alone("rgb")), role="single"),
        Method("depth", Training("depth", _alone("depth")), role="single"),
        Method("bow", Training("bow", _alone("text", "bow")), role="single"),
        Method("image", Training("image", _alone("image")), role="single"),
        Method("bert", Training("bert", _alone("text")), role="single"),
        Method("late", Training("late", lambda parts: LateFusion(parts.heads())), role="average"),
        Method("concat", Training("concat", _concatenated())),
        Method("align", Training("align", _concatenated(ALIGNMENT))),
        Method("mmtm", Training("mmtm", _mmtm)),
        Method("concatbow", Training("concatbow", _concatenated(text="bow"))),
        Method("concatbert", Training("concatbert", _concatenated())),
        Method("mmbt", Training("mmbt", _mmbt)),
        Method("tmc", Training("tmc", _published("tmc", anneals=True)), title="TMC"),
        Method("etmc", Training("etmc", _etmc)),
        Method("rcml", Training("rcml", _published("rcml", anneals=True)), title="RCML"),
        Method("pdf", Training("pdf", _pdf), title="PDF"),
        *(Method(rule, Training(rule, _published(rule)), title=title) for rule, title in _TITLES.items()),
        Method("ranking-only", Training("ranking-only", _ranking_only)),
        Method("qmf", Training("qmf", _quality_aware())),
        Method("robust", ROBUST),
        Method("msp", Training("msp", _quality_aware(_UNRANKED, uncertainty="msp"))),
        Method("entropy", Training("entropy", _quality_aware(_UNRANKED, uncertainty="entropy"))),
        Method("evidence", Training("evidence", _quality_aware(_UNRANKED, uncertainty="evidence"))),
        Method("energy", NO_RANKING, title="QMF, no ranking"),
        # Trained on feature views as well.
        Method("QMF, paper", Training("qmf-paper", _quality_aware({"form": "paper"}))),
        Method("QMF, margin", Training("qmf-margin", _quality_aware({"form": "margin"}))),
        Method("QMF, released", Training("qmf-released", _quality_aware({"form": "released"}))),
        # The ranking loss costs LogitNorm's heads accuracy, whose weights hardly differ: the better rival goes without.
        Method(
            "energy of LogitNorm",
            Training("logitnorm", _quality_aware(_UNRANKED, normalize_logits=0.1, combine="probabilities")),
        ),
        Method(
            "robust-logits",
            Training("robust-logits", _robust(features=False)),
            role="variant",
            title="robust, logits alone",
        ),
        Method("robust, no modality dropout", Training("robust-no-dropout", _robust(0.0)), role="variant"),
        # What modality dropout does for others.
        Method("energy + modality dropout", DROPPED),
        Method("mean of logits + modality dropout", DROPPED, mean_logits, role="average"),
        # Rules for heads that others have trained.
        Method("mean of logits", answer=mean_logits, role="average"),
        Method("mean of probabilities", answer=mean_probabilities, role="average"),
        Method("best single view", answer=best_view, role="single"),
        Method("MSP, probabilities", answer=_layer(uncertainty="msp", combine="probabilities")),
        Method("entropy, probabilities", answer=_layer(uncertainty="entropy", combine="probabilities")),
        Method("evidence, probabilities", answer=_layer(uncertainty="evidence", combine="probabilities")),
        Method("energy, logits", answer=_layer()),
        Method("oracle: clean views only", answer=oracle, role="oracle"),
    )
}


class Table(NamedTuple):
    """Methods compared on feature views, in order, and the training of the heads that their rules fuse."""

    heads: Training
    methods: tuple[Method, ...]

    def training(self, method: Method) -> Training:
        return method.training or self.heads

    @property
    def trainings(self) -> tuple[Training, ...]:
        """Each once, the heads first."""
        return tuple(dict.fromkeys([self.heads, *(self.training(method) for method in self.methods)]))


def _pick(*names: str) -> tuple[Method, ...]:
    return tuple(METHODS[name] for name in names)


_AVERAGES = ("mean of logits", "mean of probabilities")
_ORACLE = "oracle: clean views only"
_QMF = ("QMF, paper", "QMF, margin", "QMF, released", "energy of LogitNorm", "robust")
_PROBABILITIES = ("MSP, probabilities", "entropy, probabilities", "evidence, probabilities")
_VARIANTS = ("robust-logits", "robust, no modality dropout")


def digits_table(views: tuple[str, ...]) -> Table:
    """What `train digits` compares: each view, plain averages, QMF's forms and the recommended rule."""
    singles = tuple(alone(number, name) for number, name in enumerate(views))
    return Table(UNIMODAL, singles + _pick(*_AVERAGES, "energy", *_QMF, _ORACLE))


def _untrained(rule: str) -> Method:
    """A published rule for heads that others have trained."""
    return METHODS[rule]._replace(training=None, answer=_layer(rule == "noisy_or", combine=rule))


_RIVALS = ("energy, logits", "tmc", "rcml", "pdf")
_DROPPED = ("mean of logits + modality dropout", "energy + modality dropout")
ROBUSTNESS = Table(
    PLAIN,
    (
        *_pick(*_AVERAGES, "best single view"),
        *(_untrained(rule) for rule in _TITLES),
        *_pick(*_PROBABILITIES, *_RIVALS, *_DROPPED, *_QMF, *_VARIANTS, _ORACLE),
    ),
)
"""What `bench-robustness` compares."""


def _without(ingredient: str, **switches: Any) -> Method:
    return Method(
        f"without {ingredient}", Training(f"robust-{'-'.join(switches)}", _robust(**switches)), role="variant"
    )


ABLATION = Table(
    PLAIN,
    (
        *_pick("mean of probabilities", "robust"),
        _without("the size of logits", typicality_norm=False),
        _without("the distance of logits", typicality_distance=False),
        _without("either", typicality_norm=False, typicality_distance=False),
        *_pick("robust-logits", "robust, no modality dropout"),
        _without("the evidential likelihood", evidential=False),
        _without("distances as evidence", distance_evidence=0.0),
        _without("bounded votes", agreement=False),
        *_pick(_ORACLE),
    ),
)
"""What `bench-robustness --ablation` compares: the recommended rule without each of its ingredients."""
