"""What is trained: networks with an answer and a loss. Networks with ideas of their own have files of their own."""

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qmf_fusion import FusionModel, LossTrajectory, QMFLoss, QualityAwareFusion, TrajectoryRankingLoss

JOINT = "joint"
"""The name of the pseudo-view."""


class Answer(NamedTuple):
    """What a method says of B samples."""

    scores: Tensor
    """``[B, K]``, such that their softmax is the method's probabilities."""
    unimodal_logits: tuple[Tensor, ...] = ()
    """``[B, K]`` per modality as its head gave them, of methods that decide per modality."""
    weights: Tensor | None = None
    """``[M, B]``, of methods that weight modalities per sample."""
    features: tuple[Tensor, ...] | None = None
    """``[B, width]`` per modality, of methods whose loss or fusion looks at them."""
    present: Tensor | None = None
    """bool ``[M, B]``, where modalities were dropped."""


class Learner(nn.Module):
    """A method: ``forward`` answers, ``loss`` says how wrong the answer was; ``encoders`` are what can be frozen."""

    encoders: dict[str, nn.Module]

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        raise NotImplementedError

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        """The loss of a batch in training.

        Args:
            answer: to the batch.
            target: ``[B]``.
            index: ``[B]``, each sample's place in the training set.
        """
        losses = [F.cross_entropy(x.float(), target) for x in (answer.scores, *answer.unimodal_logits)]
        return torch.stack(losses).sum()

    def unimodal_losses(self, answer: Answer, target: Tensor) -> Tensor:
        """Each modality's cross-entropy ``[M, B]``, which weights are held against."""
        return torch.stack([F.cross_entropy(x.float(), target, reduction="none") for x in answer.unimodal_logits])


def give(module: nn.Module, given: Any) -> Any:
    """Call ``module`` with one tensor, or with a mapping as keywords."""
    return module(**given) if isinstance(given, Mapping) else module(given)


def classifier(width: int, num_classes: int, hidden: int, dropout: float) -> nn.Sequential:
    """A linear layer, or with ``hidden`` a hidden one before it and dropout on that, as released."""
    if not hidden:
        return nn.Sequential(nn.Linear(width, num_classes))
    return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden, num_classes))


class HeadOutput(NamedTuple):
    """What ``FusionModel`` takes from a head that shows what it sees."""

    logits: Tensor
    """``[B, K]``."""
    features: Tensor | None = None
    """``[B, width]``, for a rule that judges by them."""


class Head(nn.Module):
    """An encoder and its classifier: one modality's input to logits.

    Args:
        encoder: from the input to features.
        head: from the features to logits.
        input_width: of inputs that are themselves features, such as a frozen encoder's: a rule may judge by these.
            None for any other input, and for rules that look at logits alone.
    """

    def __init__(self, encoder: nn.Module, head: nn.Module, input_width: int | None = None) -> None:
        super().__init__()
        self.encoder, self.classifier, self.input_width = encoder, head, input_width

    def forward(self, *given: Any, **named: Any) -> HeadOutput:
        logits = self.classifier(self.encoder(*given, **named))
        return HeadOutput(logits, None if self.input_width is None else given[0])


def encoders_of(heads: Mapping[str, Head]) -> dict[str, nn.Module]:
    return {name: head.encoder for name, head in heads.items()}


class Joint(Learner):
    """One classifier over the features of one encoder (a single modality), or of several (concatenation).

    Args:
        encoders: by modality.
        head: from all their features, side by side, to logits.
        alignment: what the cosine distance of two encoders' features counts in the loss (alignment); they must be of
            one width.
        width: to how many features each encoder's are taken, by a linear layer and ReLU; 0 leaves them.
    """

    def __init__(
        self, encoders: Mapping[str, nn.Module], head: nn.Module, alignment: float = 0.0, width: int = 0
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(encoders)
        self.encoders = dict(encoders)
        widths: dict[str, Any] = {name: encoder.width for name, encoder in encoders.items()} if width else {}
        self.narrow = nn.ModuleDict(
            {name: nn.Sequential(nn.Linear(given, width), nn.ReLU()) for name, given in widths.items()}
        )
        self.classifier = head
        self.alignment = alignment

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        given = {name: give(part, inputs[name]) for name, part in self.parts.items()}
        features = tuple(self.narrow[name](x) for name, x in given.items()) if self.narrow else tuple(given.values())
        return Answer(self.classifier(torch.cat(features, 1)), features=features)

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        loss = super().loss(answer, target, index)
        if self.alignment:
            assert answer.features is not None
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
        logits = tuple(give(head, inputs[name]).logits for name, head in self.heads.items())
        return Answer(torch.stack(logits).mean(0), logits)


class UnimodalHeads(LateFusion):
    """Each head trained on its own cross-entropy alone; the answer is the mean of their logits."""

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        return torch.stack([F.cross_entropy(x.float(), target) for x in answer.unimodal_logits]).sum()


class AveragedHeads(LateFusion):
    """The mean of the modalities' probabilities; trained on the sum of its cross-entropy and each modality's own."""

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        logits = super().forward(inputs).unimodal_logits
        return Answer(torch.logsumexp(torch.stack(logits).log_softmax(-1), 0) - math.log(len(logits)), logits)


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
        options = dict(objective)
        self.ranking_weight = options.pop("ranking_weight")
        self.ranking = TrajectoryRankingLoss(num_samples, len(heads), **options)

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        logits = [x.float() for x in answer.unimodal_logits]
        losses = torch.stack([F.cross_entropy(x.detach(), target, reduction="none") for x in logits])
        ranking = self.ranking(self.fusion(logits).weights, losses, index)
        return super().loss(answer, target, index) + self.ranking_weight * ranking


class QualityAware(Learner):
    """``FusionModel`` with its objective, the package's own: Eq. 18, or that of a published rule. The trajectory of
    losses is in the state.

    Args:
        heads: by modality.
        num_samples: of the training set.
        objective: options of ``QMFLoss``.
        fusion: the layer, or a rule's name, as ``FusionModel`` takes it.
        dropout: how often ``FusionModel`` drops a modality in training.
        seed: of what it drops.
        options: of the rule that is named.
    """

    def __init__(
        self,
        heads: Mapping[str, Head],
        num_samples: int,
        objective: Mapping[str, Any],
        fusion: QualityAwareFusion | str,
        dropout: float = 0.0,
        seed: int = 0,
        **options: Any,
    ) -> None:
        super().__init__()
        self.model = FusionModel(heads, fusion, modality_dropout=dropout, dropout_seed=seed, **options)
        self.criterion = QMFLoss(self.model.fusion, num_samples, **objective)
        self.encoders = encoders_of(heads)

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        out = self.model(inputs)
        return Answer(out.logits, out.unimodal_logits, out.weights, out.features, out.present)

    def loss(self, answer: Answer, target: Tensor, index: Tensor) -> Tensor:
        return self.criterion(answer.unimodal_logits, target, index, answer.present, answer.features).loss

    def unimodal_losses(self, answer: Answer, target: Tensor) -> Tensor:
        """Of what the rule takes logits for, where it trains heads by a loss of its own: evidence, say."""
        rule = self.model.fusion.rule
        if rule.row_loss() is not None:
            answer = answer._replace(unimodal_logits=tuple(rule.likelihood(x) for x in answer.unimodal_logits))
        return super().unimodal_losses(answer, target)


class FusedFeatures(QualityAware):
    """``QualityAware`` on what the encoders see, each of which runs once: for what looks at it beside the classifiers.

    Such are rules with features, which here are the encoders', and the pseudo-view of Han et al. (TPAMI 2022): one more
    modality, called ``joint``, of all features side by side.

    Args:
        heads: by modality; their encoders have a ``width``.
        joint: from all features to the pseudo-view's logits; None for none.
        given: as ``QualityAware`` takes it.
    """

    def __init__(self, heads: Mapping[str, Head], *given: Any, joint: nn.Module | None = None, **options: Any) -> None:
        encoders: dict[str, Any] = encoders_of(heads)
        seen = {name: Head(nn.Identity(), head.classifier, encoders[name].width) for name, head in heads.items()}
        super().__init__(seen if joint is None else {**seen, JOINT: Head(nn.Identity(), joint)}, *given, **options)
        self.parts, self.encoders = nn.ModuleDict(encoders), encoders

    def forward(self, inputs: Mapping[str, Any]) -> Answer:
        features = {name: give(encoder, inputs[name]) for name, encoder in self.encoders.items()}
        if JOINT in self.model.names:
            features[JOINT] = torch.cat(list(features.values()), 1)
        return super().forward(features)


def trajectories(learner: nn.Module) -> dict[str, LossTrajectory]:
    """The trajectories in it, by name."""
    return {name: module for name, module in learner.named_modules() if isinstance(module, LossTrajectory)}
