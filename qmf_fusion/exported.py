"""What an exported program returns: a container that loads where this package is not installed."""

from typing import Any, TypeVar

import torch
from torch.fx.immutable_collections import immutable_list

from qmf_kernels.eager.plain import is_exporting

Output = TypeVar("Output", bound=tuple[Any, ...])


def exportable(out: Output) -> Output:
    """A named tuple as it is, but under ``torch.export`` as a list with the same names.

    A file of an exported program names the types of its outputs, and a named tuple would have to be known where it is
    loaded. Lists of ``torch.fx`` are PyTorch's own, and take attributes, so that a module around this one is traced as
    it runs. What is loaded has the places alone.
    """
    if not is_exporting() or torch.compiler.is_dynamo_compiling():  # strict export does not trace such a list
        return out
    listed: Any = immutable_list(out)
    vars(listed).update(out._asdict())  # type: ignore[attr-defined]
    return listed
