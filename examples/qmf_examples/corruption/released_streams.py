"""The random numbers of the released evaluation scripts, drawn as they draw them, from streams of their own.

The scripts use three global generators: ``torch`` decides whether an image is corrupted (``RandomApply``), ``random``
whether salt-and-pepper takes place, ``numpy.random`` the pixels and the words; and the Gaussian noise seeds NumPy's
anew at every image. Thus each image of a size gets the same noise, and which words go depends on the images before.
Here the same numbers come from private generators. They follow on from sample to sample, so that the scripts' numbers
are repeated where samples are read in order by one process (``num_workers=0``).
"""

import random

import numpy as np
import torch


class ReleasedStreams:
    """The three generators, seeded as ``set_seed`` of the released code seeds the global ones.

    Share one between the corruptions of images and of texts, as the scripts do.

    Example:
        >>> ReleasedStreams(seed=0).coin(0.5)
        True
    """

    def __init__(self, seed: int = 0) -> None:
        self.python = random.Random(seed)
        self.numpy = np.random.RandomState(seed)
        self.torch = torch.Generator().manual_seed(seed)

    def coin(self, probability: float) -> bool:
        """Whether ``torchvision.transforms.RandomApply`` applies its transform."""
        return not probability < torch.rand(1, generator=self.torch).item()
