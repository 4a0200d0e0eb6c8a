"""The networks that a run's method is built from: encoders and classifiers as its settings say."""

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from torch import nn

from ..data.catalogue import DATA_SETS
from ..models.feature_heads import Scaled, feature_heads
from ..models.image_encoders import ImageEncoder
from ..models.learners import Head, Learner, classifier
from ..models.methods import METHODS, Objective, Parts
from ..models.text_encoders import BagOfWords, Numbering, WordNumbers, load_text_encoder
from .settings import Settings

ANNEALING_EPOCHS = 10
"""Over how many epochs the evidential loss's divergence comes in, as in TMC's released RGB-D code."""


def build_learner(
    settings: Settings,
    num_classes: int,
    num_samples: int,
    numbering: Numbering | None = None,
    pretrained: bool = True,
    widths: Mapping[str, int] | None = None,
    epoch_batches: int = 1,
) -> Learner:
    """The method of ``settings``; on frozen encoders, of heads for their features alone.

    Args:
        settings: of the run.
        num_classes: K.
        num_samples: N, of the whole training split.
        numbering: how texts become numbers; None where there are none.
        pretrained: False where a checkpoint will replace the weights.
        widths: of the features that frozen encoders have made, by modality.
        epoch_batches: how many an epoch has, of a method that is to be trained.
    """
    modalities = DATA_SETS[settings.data_set].modalities
    objective = Objective(**{field.name: getattr(settings, field.name) for field in fields(Objective)})
    training = METHODS[settings.method].training
    assert training is not None
    if settings.frozen:
        assert widths is not None
        steps = settings.epochs * epoch_batches
        made = settings.hidden, settings.seed, steps, settings.dropout, objective, settings.joint_width
        return Scaled(training.build(feature_heads(widths, num_classes, num_samples, *made)), widths)

    def encoder(name: str) -> Any:
        if name == "text":
            assert numbering is not None
            return load_text_encoder(settings.text_encoder, numbering, settings.text_pooling, pretrained)
        if name == "bow":
            assert isinstance(numbering, WordNumbers)
            vectors = Path(settings.word_vectors) if settings.word_vectors else None
            return BagOfWords(numbering.vocabulary, vectors)
        return ImageEncoder(settings.image_encoder, settings.weights if pretrained else "none", settings.regions)

    def classify(width: int) -> nn.Module:
        return classifier(width, num_classes, settings.hidden, settings.dropout)

    def heads() -> dict[str, Head]:
        encoders = {name: encoder(name) for name in modalities}
        return {name: Head(network, classify(network.width)) for name, network in encoders.items()}

    return training.build(
        Parts(
            *(modalities, num_classes, num_samples, encoder, classify, heads, objective),
            annealing_steps=ANNEALING_EPOCHS * epoch_batches,
            joint_width=settings.joint_width,
            seed=settings.seed,
        )
    )
