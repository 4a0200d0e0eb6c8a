"""What is compared: how heads are trained, and how a method fuses what they say. A new method is one entry here."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qmf_fusion import QualityAwareFusion


class Training(NamedTuple):
    """One way to train the heads; the methods that share it share the trained heads too."""

    name: str
    unimodal_only: bool = False
    """Minimise the sum of the unimodal cross-entropies, each head on its own, in place of the whole of Eq. 18."""
    options: Mapping[str, Any] = {}
    """Passed to ``QMFLoss``."""
    fusion: Callable[[Sequence[str]], QualityAwareFusion] = QualityAwareFusion
    """Makes the layer from the views' names."""


class Evidence(NamedTuple):
    """What a method may look at for a test set of B samples."""

    logits: Sequence[Tensor]
    """One ``[B, K]`` per view."""
    fusion: QualityAwareFusion
    """The layer that was trained with these heads."""
    corrupted: Tensor
    """bool ``[V, B]``: which views are corrupted. Only an oracle may look."""


class Fused(NamedTuple):
    """A method's answer."""

    scores: Tensor
    """``[B, K]``, the largest of which is the prediction."""
    weights: Tensor | None = None
    """``[V, B]`` where the method weights views per sample, for the correlation of weight and loss."""


class Method(NamedTuple):
    """A row of the tables."""

    name: str
    training: str
    """The name of a ``Training``."""
    fuse: Callable[[Evidence], Fused]
    role: str
    """``"single"`` view, plain ``"average"``, ``"fusion"`` (to be held against the averages) or ``"oracle"``."""


def _logitnorm(views: Sequence[str]) -> QualityAwareFusion:
    return QualityAwareFusion(views, normalize_logits=0.1, combine="probabilities")


TRAININGS: tuple[Training, ...] = (
    Training("unimodal", unimodal_only=True, options={"ranking_weight": 0.0}),
    Training("qmf-no-ranking", options={"ranking_weight": 0.0}),
    Training("qmf-paper", options={"form": "paper"}),
    Training("qmf-margin", options={"form": "margin"}),
    Training("qmf-released", options={"form": "released"}),
    Training("logitnorm", options={"ranking_weight": 0.0}, fusion=_logitnorm),
    Training("robust", fusion=QualityAwareFusion.robust),
)


def alone(view: int) -> Callable[[Evidence], Fused]:
    """One view, the others unseen."""
    return lambda evidence: Fused(evidence.logits[view])


def mean_logits(evidence: Evidence) -> Fused:
    """Late fusion: the plain mean of logits."""
    return Fused(torch.stack(tuple(evidence.logits)).mean(0))


def mean_probabilities(evidence: Evidence) -> Fused:
    """Late fusion: the plain mean of probabilities."""
    return Fused(torch.stack(tuple(evidence.logits)).softmax(-1).mean(0))


def trained_layer(evidence: Evidence) -> Fused:
    """Eq. 9 and 11, with the layer that the heads were trained under."""
    out = evidence.fusion(evidence.logits)
    return Fused(out.logits, out.weights)


def oracle(evidence: Evidence) -> Fused:
    """The plain mean of probabilities over the views that it is told are clean: what knowing the quality is worth."""
    clean = (~evidence.corrupted).to(evidence.logits[0].dtype)
    weights = clean / clean.sum(0)
    probabilities = torch.stack(tuple(evidence.logits)).softmax(-1)
    return Fused((weights.unsqueeze(-1) * probabilities).sum(0), weights)


def list_methods(views: Sequence[str]) -> tuple[Method, ...]:
    """Every row of the tables, in order."""
    return (
        *(Method(f"{view} alone", "unimodal", alone(v), "single") for v, view in enumerate(views)),
        Method("mean of logits", "unimodal", mean_logits, "average"),
        Method("mean of probabilities", "unimodal", mean_probabilities, "average"),
        Method("QMF, no ranking", "qmf-no-ranking", trained_layer, "fusion"),
        Method("QMF, paper", "qmf-paper", trained_layer, "fusion"),
        Method("QMF, margin", "qmf-margin", trained_layer, "fusion"),
        Method("QMF, released", "qmf-released", trained_layer, "fusion"),
        Method("energy of LogitNorm", "logitnorm", trained_layer, "fusion"),
        Method("robust", "robust", trained_layer, "fusion"),
        Method("oracle: clean views only", "unimodal", oracle, "oracle"),
    )
