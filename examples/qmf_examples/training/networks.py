"""The networks that a run's method is built from: encoders and classifiers as its settings say."""

from pathlib import Path
from typing import Any

from torch import nn

from ..data.catalogue import DATA_SETS
from ..models.image_encoders import ImageEncoder
from ..models.learners import Head, Learner, classifier
from ..models.methods import METHODS, Objective
from ..models.text_encoders import BagOfWords, Numbering, WordNumbers, load_bert
from .settings import Settings


class Networks:
    """``Parts`` of one run.

    Args:
        settings: of the run.
        num_classes: K.
        num_samples: N, of the whole training split.
        numbering: how texts become numbers; None where there are none.
        pretrained: False where a checkpoint will replace the weights.
    """

    def __init__(
        self,
        settings: Settings,
        num_classes: int,
        num_samples: int,
        numbering: Numbering | None = None,
        pretrained: bool = True,
    ) -> None:
        self.settings, self.numbering, self.pretrained = settings, numbering, pretrained
        self.modalities: tuple[str, ...] = DATA_SETS[settings.data_set].modalities
        self.num_classes, self.num_samples, self.seed = num_classes, num_samples, settings.seed
        self.objective = Objective(settings.ranking_weight, settings.form, settings.pairs, settings.detach_weights)

    def encoder(self, name: str) -> Any:
        settings = self.settings
        if name == "text":
            assert self.numbering is not None
            return load_bert(settings.text_model, self.numbering, self.pretrained)
        if name == "bow":
            assert isinstance(self.numbering, WordNumbers)
            return BagOfWords(self.numbering.vocabulary, Path(settings.word_vectors) if settings.word_vectors else None)
        return ImageEncoder(settings.backbone, settings.weights if self.pretrained else "none", settings.regions)

    def classifier(self, width: int) -> nn.Module:
        return classifier(width, self.num_classes, self.settings.hidden, self.settings.dropout)

    def heads(self) -> dict[str, Head]:
        encoders = {name: self.encoder(name) for name in self.modalities}
        return {name: Head(encoder, self.classifier(encoder.width)) for name, encoder in encoders.items()}


def build_learner(
    settings: Settings,
    num_classes: int,
    num_samples: int,
    numbering: Numbering | None = None,
    pretrained: bool = True,
) -> Learner:
    """The method of ``settings``; see ``Networks``."""
    training = METHODS[settings.method].training
    assert training is not None
    return training.build(Networks(settings, num_classes, num_samples, numbering, pretrained))
