"""What the tests on a GPU share: the device, inputs moved to it as they lie, and a step's launches."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from qmf_fusion import QMFLoss, QualityAwareFusion
from qmf_kernels.benchmarks.measure import Launches, count_launches
from qmf_kernels.benchmarks.objective import KERNELS

DEVICE = torch.device("cuda")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA or ROCm device, and there is none")


def move(x: Any) -> Any:
    """A tensor to the device with its strides, overlaps included; sequences of them likewise."""
    if isinstance(x, Tensor):
        length = x.untyped_storage().nbytes() // x.element_size()
        everything = x.as_strided((length,), (1,), 0).to(DEVICE)
        return everything.as_strided(x.shape, x.stride(), x.storage_offset())
    if isinstance(x, tuple) and hasattr(x, "_fields"):
        return type(x)(*map(move, x))
    return [move(item) for item in x] if isinstance(x, list) else x


def make_step(
    modalities: int,
    batch: int,
    classes: int,
    samples: int = 4096,
    dtype: torch.dtype = torch.float32,
    make: Callable[[int, int], QualityAwareFusion] = lambda modalities, classes: QualityAwareFusion(modalities),
    **options: Any,
) -> tuple[QMFLoss, list[Tensor], Tensor, Tensor]:
    """A criterion, logits that want gradients, targets and indices, the same at every call."""
    generator = torch.Generator().manual_seed(0)
    fusion = make(modalities, classes).to(DEVICE)
    criterion = QMFLoss(fusion, samples, return_logits=False, **options).to(DEVICE)
    rows = [torch.randn(batch, classes, generator=generator).to(DEVICE, dtype) for _ in range(modalities)]
    target = torch.randint(classes, (batch,), generator=generator).to(DEVICE)
    index = torch.randperm(samples, generator=generator)[:batch].to(DEVICE)
    return criterion, [x.requires_grad_() for x in rows], target, index


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the device raises."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def launches_of(run: Callable[[], Any]) -> Launches:
    """After two steps that compile what there is to compile."""
    for _ in range(2):
        run()
    found = count_launches(lambda _: run(), KERNELS, DEVICE)
    assert found is not None
    return found


def ours(found: Launches) -> dict[str, int]:
    """This package's launches by name."""
    return {name.removesuffix("_kernel"): count for name, count in found.names.items() if name in KERNELS}
