"""Hypothesis strategies: logits of M modalities, and which of them are there."""

from typing import TypeVar

import torch
from hypothesis import strategies as st
from torch import Tensor

T = TypeVar("T")


def floating_dtypes() -> st.SearchStrategy[torch.dtype]:
    """float16, bfloat16, float32 and float64."""
    return st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16])


@st.composite
def logits(
    draw: st.DrawFn,
    num_modalities: int | st.SearchStrategy[int] | None = None,
    num_classes: int | st.SearchStrategy[int] | None = None,
    batch: int | tuple[int, ...] | st.SearchStrategy[int | tuple[int, ...]] | None = None,
    dtype: torch.dtype | st.SearchStrategy[torch.dtype] = torch.float32,
    extreme: bool = False,
    strided: bool = True,
) -> list[Tensor]:
    """Logits of M modalities, a list of tensors ``[*, K]``: plain, repeated, constant and large values (up to 1e4).

    Args:
        draw: given by Hypothesis.
        num_modalities: M; by default from 1 to 4.
        num_classes: K; by default from 1 to 6.
        batch: the leading dimensions ``*``; by default one or two, from 1 to 4 each.
        dtype: a strategy is drawn from anew for each modality, so that dtypes mix.
        extreme: put NaN, +inf, -inf, 1e4 and -1e4 in places.
        strided: lay some out transposed, with gaps, or as an expanded row.

    Example:
        >>> import hypothesis
        >>> hypothesis.find(logits(num_modalities=2, num_classes=3, batch=1), lambda x: True)[0].shape
        torch.Size([1, 3])
    """
    count = _draw(draw, num_modalities, st.integers(1, 4))
    classes = _draw(draw, num_classes, st.integers(1, 6))
    rows = _draw(draw, batch, st.one_of(st.integers(1, 4), st.tuples(st.integers(1, 3), st.integers(1, 3))))
    shape = (*((rows,) if isinstance(rows, int) else rows), classes)
    return [_one(draw, shape, _draw(draw, dtype, st.just(torch.float32)), extreme, strided) for _ in range(count)]


@st.composite
def present_masks(draw: st.DrawFn, num_modalities: int, batch: int | tuple[int, ...], min_present: int = 0) -> Tensor:
    """Which modalities are there: bool ``[M, *]``, at least ``min_present`` in each place.

    Example:
        >>> import hypothesis
        >>> hypothesis.find(present_masks(2, 1, min_present=1), lambda mask: True).shape
        torch.Size([2, 1])
    """
    shape = (num_modalities, *((batch,) if isinstance(batch, int) else batch))
    flat = torch.empty(shape, dtype=torch.bool).flatten(1)
    columns = st.sets(st.integers(0, num_modalities - 1), min_size=min_present)
    for column in flat.unbind(1):
        column.fill_(False)[list(draw(columns))] = True
    return flat.view(shape)


def _draw(draw: st.DrawFn, value: T | st.SearchStrategy[T] | None, default: st.SearchStrategy[T]) -> T:
    if value is None:
        return draw(default)
    return draw(value) if isinstance(value, st.SearchStrategy) else value


def _one(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype, extreme: bool, strided: bool) -> Tensor:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64) * draw(st.sampled_from([1.0, 10.0, 0.0, 1e3]))
    x = (x + draw(st.sampled_from([0.0, 100.0, -100.0]))).clamp(-1e4, 1e4)
    if draw(st.booleans()):
        x = x.round()  # so that values repeat
    if extreme:
        places = st.lists(st.integers(0, x.numel() - 1), max_size=4)
        values = st.sampled_from([torch.inf, -torch.inf, torch.nan, 1e4, -1e4])
        for place in draw(places):
            x.view(-1)[place] = draw(values)
    x = x.to(dtype)
    layout = draw(st.sampled_from(["plain", "transposed", "gaps", "expanded"])) if strided else "plain"
    if layout == "transposed":
        return x.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "gaps":
        return torch.stack([x, x.flip(-1)], -1)[..., 0]
    return x[:1].expand(shape) if layout == "expanded" else x
