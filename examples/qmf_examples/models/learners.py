"""What the trainers train: every method of the tables, each with its answer and its loss. None knows a data set."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmf_fusion import FusionModel, QMFLoss, QualityAwareFusion, TrajectoryRankingLoss

from .baselines import evidential_loss
from .evidential import combine, evidence
from .image_encoders import ImageEncoder
from .mmtm import TwoStreams

ANNEALING_EPOCHS = 10
"""Over how many epochs the evidential loss's divergence comes in, as in TMC's released RGB-D code."""


class Answer(NamedTuple):
    """What a method says of B samples."""

    scores: Tensor
    """``[B, K]``, such that their softmax is the method's probabilities."""
    unimodal_logits: tuple[Tensor, ...] = ()
    """``[B, K]`` per modality, of methods that decide per modality."""
    weights: Tensor | None = None
    """``[M, B]``, of methods that weight modalities per sample."""
    features: tuple[Tensor, ...] = ()
    """``[B, width]`` per encoder, for alignment."""


class Learner(nn.Module):
    """A method: ``forward`` answers, ``loss`` says how wrong the answer was; ``encoders`` are what can be frozen."""

    encoders: dict[str, nn.Module]

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        raise NotImplementedError

    def loss(self, answer: Answer, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        """The loss of a batch in training; ``index`` is each one's place in the training set, epochs count from 0."""
        losses = [F.cross_entropy(x.float(), target) for x in (answer.scores, *answer.unimodal_logits)]
        return torch.stack(losses).sum()


def give(module: nn.Module, given: Any) -> Any:
    """Call ``module`` with one tensor, or with a mapping as keywords."""
    return module(**given) if isinstance(given, Mapping) else module(given)


def classifier(width: int, num_classes: int, hidden: int, dropout: float) -> nn.Sequential:
    """A linear layer, or with ``hidden`` a hidden one before it and dropout on that, as released."""
    if not hidden:
        return nn.Sequential(nn.Linear(width, num_classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))


class Head(nn.Module):
    """An encoder and its classifier: one modality's input to logits ``[B, K]``."""

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.classifier = encoder, head

    def forward(self, *given: Any, **named: Any) -> Tensor:
        return self.classifier(self.encoder(*given, **named))


def encoders_of(heads: Mapping[str, Head]) -> dict[str, nn.Module]:
    return {name: head.encoder for name, head in heads.items()}


class Joint(Learner):
    """One classifier over the features of one encoder (a single modality), or of several (concatenation).

    Args:
        encoders: by modality.
        head: from all their features, side by side, to logits.
        alignment: what the cosine distance of two encoders' features counts in the loss (alignment); they must be of
            one width.
    """

    def __init__(self, encoders: Mapping[str, nn.Module], head: nn.Module, alignment: float = 0.0) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(encoders)
        self.encoders = dict(encoders)
        self.classifier = head
        self.alignment = alignment

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = tuple(give(part, inputs[name]) for name, part in self.parts.items())
        return Answer(self.classifier(torch.cat(features, 1)), features=features)

    def loss(self, answer: Answer, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        loss = super().loss(answer, target, index, epoch)
        if self.alignment:
            loss = loss + self.alignment * cosine_distance(*answer.features).mean()
        return loss


def cosine_distance(first: Tensor, second: Tensor) -> Tensor:
    """``1 - cos``, from 0 (the same direction) to 2 (the opposite one), ``[B]`` for ``[B, width]``.

    Example:
        >>> cosine_distance(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[3.0, 0.0], [0.0, -1.0]]))
        tensor([0., 2.])
    """
    return 1 - F.cosine_similarity(first.float(), second.float(), dim=1)


class LateFusion(Learner):
    """The mean of the modalities' logits; trained on the sum of its cross-entropy and each modality's own."""

    def __init__(self, heads: Mapping[str, Head]) -> None:
        super().__init__()
        self.heads = nn.ModuleDict(heads)
        self.encoders = encoders_of(heads)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        logits = tuple(give(head, inputs[name]) for name, head in self.heads.items())
        return Answer(torch.stack(logits).mean(0), logits)


class RankedAverage(LateFusion):
    """Late fusion whose training ranks the weights that QMF would give: Table 2's row of the ranking loss alone.

    Args:
        heads: by modality.
        num_samples: of the training set.
        objective: options of ``QMFLoss``.
        fusion: whose weights are ranked, and fuse nothing.
    """

    def __init__(
        self, heads: Mapping[str, Head], num_samples: int, objective: Mapping[str, Any], fusion: QualityAwareFusion
    ) -> None:
        super().__init__(heads)
        self.fusion = fusion
        self.ranking_weight = objective["ranking_weight"]
        self.ranking = TrajectoryRankingLoss(num_samples, len(heads), objective["form"], objective["pairs"])

    def loss(self, answer: Answer, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        logits = [x.float() for x in answer.unimodal_logits]
        losses = torch.stack([F.cross_entropy(x.detach(), target, reduction="none") for x in logits])
        ranking = self.ranking(self.fusion(logits).weights, losses, index)
        return super().loss(answer, target, index, epoch) + self.ranking_weight * ranking


class MMTMFusion(Learner):
    """Two ResNets that excite each other's channels, and the mean of their logits; the losses of late fusion."""

    def __init__(self, first: ImageEncoder, second: ImageEncoder, names: Sequence[str], heads: Sequence[nn.Module]):
        super().__init__()
        self.streams = TwoStreams(first, second)
        self.classifiers = nn.ModuleList(heads)
        self.names = tuple(names)
        self.encoders = dict(zip(names, (first, second), strict=True))

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = self.streams(*(inputs[name] for name in self.names))
        logits = tuple(head(x) for head, x in zip(self.classifiers, features, strict=True))
        return Answer(torch.stack(logits).mean(0), logits)


class Trusted(Learner):
    """TMC: each modality's evidence, combined by Dempster's rule; with ``pseudo``, ETMC's joint view as one more.

    Args:
        heads: by modality.
        pseudo: from all features, side by side, to logits of the pseudo-view.
    """

    def __init__(self, heads: Mapping[str, Head], pseudo: nn.Module | None = None) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(encoders_of(heads))
        self.classifiers = nn.ModuleDict({name: head.classifier for name, head in heads.items()})
        self.pseudo = pseudo
        self.encoders = encoders_of(heads)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = {name: give(encoder, inputs[name]) for name, encoder in self.encoders.items()}
        logits = [self.classifiers[name](x) for name, x in features.items()]
        if self.pseudo is not None:
            logits.append(self.pseudo(torch.cat(list(features.values()), 1)))
        combined = evidence(logits[0].float())
        for x in logits[1:]:
            combined = combine(combined, evidence(x.float()))
        # Their softmax is the Dirichlet's mean.
        return Answer(torch.log(combined + 1), tuple(logits))

    def loss(self, answer: Answer, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        annealing = min(1.0, epoch / ANNEALING_EPOCHS)
        views = [torch.expm1(answer.scores), *(evidence(x.float()) for x in answer.unimodal_logits)]
        return torch.stack([evidential_loss(view, target, annealing) for view in views]).sum()


class QualityAware(Learner):
    """QMF, the package's own: ``FusionModel`` with its objective (Eq. 18), the trajectory of losses in the state.

    Args:
        heads: by modality.
        num_samples: of the training set.
        objective: options of ``QMFLoss``.
        fusion: the layer.
    """

    def __init__(
        self, heads: Mapping[str, Head], num_samples: int, objective: Mapping[str, Any], fusion: QualityAwareFusion
    ) -> None:
        super().__init__()
        self.model = FusionModel(heads, fusion)
        self.criterion = QMFLoss(self.model.fusion, num_samples, **objective)
        self.encoders = encoders_of(heads)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        out = self.model(inputs)
        return Answer(out.logits, out.unimodal_logits, out.weights)

    def loss(self, answer: Answer, target: Tensor, index: Tensor, epoch: int) -> Tensor:
        return self.criterion(answer.unimodal_logits, target, index).loss


class Whole(Learner):
    """One network over all inputs at once, such as MMBT: ``[B, width]`` features, then a classifier.

    Args:
        network: called with each input as keywords, in the order of ``names``.
        names: of the inputs.
        head: the classifier.
        encoders: what can be frozen.
    """

    def __init__(
        self, network: nn.Module, names: Sequence[str], head: nn.Module, encoders: Mapping[str, nn.Module]
    ) -> None:
        super().__init__()
        self.network, self.classifier = network, head
        self.names = tuple(names)
        self.encoders = dict(encoders)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        tensors = [inputs[name] for name in self.names if not isinstance(inputs[name], Mapping)]
        named = {key: x for name in self.names if isinstance(inputs[name], Mapping) for key, x in inputs[name].items()}
        return Answer(self.classifier(self.network(*tensors, **named)))


WEIGHTINGS: dict[str, dict[str, Any]] = {
    "qmf": {},
    "energy": {},
    "msp": {"uncertainty": "msp"},
    "entropy": {"uncertainty": "entropy"},
    "evidence": {"uncertainty": "evidence"},
}
"""Options of ``QualityAwareFusion``: QMF, and the rules of the paper's Figure 3, which are weights alone."""


def make_fusion(method: str, names: Sequence[str], num_classes: int, detach_weights: bool) -> QualityAwareFusion:
    """The layer of a method that weights modalities per sample; ``robust`` is the package's recommended rule."""
    if method == "ranking-only":
        return QualityAwareFusion(names)
    if method == "robust":
        return QualityAwareFusion.robust(names, num_classes=num_classes)
    return QualityAwareFusion(names, detach_weights=detach_weights, **WEIGHTINGS[method])


def objective_options(method: str, ranking_weight: float, form: str, pairs: str) -> dict[str, Any]:
    """Options of ``QMFLoss``: the rules of Figure 3 go without the ranking."""
    ranked = method in ("qmf", "robust", "ranking-only")
    return {"ranking_weight": ranking_weight if ranked else 0.0, "form": form, "pairs": pairs}
