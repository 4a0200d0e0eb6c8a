"""The transform of a run's images, from its settings, in torchvision's steps."""

import torch
from torchvision.transforms import InterpolationMode, v2

from ..data.catalogue import DATA_SETS
from ..models.image_transforms import ImageTransform, encoder_transform
from .settings import Settings


def transform_of(settings: Settings) -> ImageTransform:
    """The released one of the data set, or the image encoder's own; sizes are those of the settings."""
    known = DATA_SETS[settings.data_set]
    if settings.transform == "released":
        return ImageTransform(
            settings.load_size, settings.image_size, known.paired, "bilinear", tuple(known.mean), tuple(known.std)
        )
    own = encoder_transform(settings.image_encoder)
    return ImageTransform(settings.load_size, settings.image_size, own.squash, own.interpolation, own.mean, own.std)


def resize(made: ImageTransform) -> v2.Transform:
    """To ``load_size``."""
    size = [made.load_size] * 2 if made.squash else made.load_size
    return v2.Resize(size, InterpolationMode(made.interpolation))


def as_tested(settings: Settings) -> v2.Transform:
    """A half of a pair as it is tested: resized whole, as in the released code, or by the encoder's own transform."""
    made = transform_of(settings)
    if settings.transform == "released":
        return v2.Resize((made.image_size, made.image_size))
    return v2.Compose([resize(made), v2.CenterCrop(made.image_size)])


def to_tensors(made: ImageTransform) -> list[v2.Transform]:
    """From PIL images to normalised tensors."""
    return [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(list(made.mean), list(made.std))]
