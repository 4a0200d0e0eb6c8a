"""Images between Pillow, where they are decoded and damaged, and tensors, where they are cropped and normalised."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_pixels(image: Image.Image | Tensor) -> Tensor:
    """An RGB image as uint8 ``[3, H, W]``; what is that already, as it is."""
    if isinstance(image, Tensor):
        return image
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels: Image.Image | Tensor) -> Image.Image:
    """The inverse of ``to_pixels``.

    Example:
        >>> to_image(to_pixels(Image.new("RGB", (3, 2), "red"))).getpixel((2, 1))
        (255, 0, 0)
    """
    if isinstance(pixels, Image.Image):
        return pixels
    return Image.fromarray(np.ascontiguousarray(pixels.permute(1, 2, 0).numpy()))


class Normal(NamedTuple):
    """An image, uint8 ``[3, H, W]``, of which ``stack`` makes one from 0 to 1, less ``mean``, over ``std``."""

    pixels: Tensor
    mean: Sequence[float]
    std: Sequence[float]


def stack(images: Sequence[Normal]) -> Tensor:
    """The batch of images of one size, float32 ``[B, 3, H, W]``.

    The very operations of torchvision's ``ToDtype(scale=True)`` and ``Normalize``, with equal bits. But they write to
    the batch itself, where those would take new memory for every image, which costs several times what they compute.

    Example:
        >>> white = torch.full((3, 1, 1), 255, dtype=torch.uint8)
        >>> stack([Normal(white, (0.5, 0.5, 0.5), (0.5, 0.5, 0.25))]).flatten()
        tensor([1., 1., 2.])
    """
    batch = torch.empty(len(images), *images[0].pixels.shape)
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in images[0][1:])
    for place, image in zip(batch, images, strict=True):
        place.copy_(image.pixels).mul_(1.0 / 255).sub_(mean).div_(std)
    return batch
