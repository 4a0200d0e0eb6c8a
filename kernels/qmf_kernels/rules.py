"""The one list of options: what the operators take and return, field by field.

The operators' schemas, the order of their arguments, and the way back from arguments to records are made from these
fields (``schema``, ``flatten``, ``unflatten``): a new option is a new field here, and whoever computes with it.
"""

import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

from torch import Tensor

FORMS = ("paper", "margin", "released")
PAIRS = ("adjacent", "all")
BACKENDS = (None, "torch", "triton")


class WeightRule(NamedTuple):
    """How logits become weights (Eq. 13 and 9) and fused logits (Eq. 11)."""

    uncertainty: Tensor | None
    """``[M, *]``: a ready ``u`` of Eq. 9. None: the energy (Eq. 13)."""
    alpha: Tensor
    """``[M]`` (Eq. 9)."""
    beta: Tensor
    """``[M]`` (Eq. 9)."""
    temperature: Tensor | None
    """``[M]`` (Eq. 13). None: 1; ones in the host's memory cost no more."""
    fused: Tensor | None = None
    """``[*, K]``: ready fused logits in place of Eq. 11; nothing flows from them into the weights."""
    nonnegative: bool = False
    """Clamp weights at 0."""
    normalize: bool = False
    """Clamp weights at 0 and divide by their sum over the modalities that count; equal shares where all are 0."""
    detach: bool = False
    """Stop the gradient of the fused logits at the weights; the ranking's still reaches them."""


class LossRule(NamedTuple):
    """The options of Eq. 18: the cross-entropies', as in ``torch.nn.CrossEntropyLoss``, and the ranking's."""

    class_weight: Tensor | None = None
    label_smoothing: float = 0.0
    ignore_index: int = -100
    ranking_weight: float = 0.1
    form: str = "paper"
    pairs: str = "adjacent"


class Losses(NamedTuple):
    """What Eq. 18 is made of; every field but ``sample_losses`` can be differentiated."""

    loss: Tensor
    """Scalar: ``fused_loss + unimodal_losses.sum() + ranking_weight * ranking_loss``."""
    fused_loss: Tensor
    """Scalar: the cross-entropy of the fused logits."""
    unimodal_losses: Tensor
    """``[M]``: each modality's own cross-entropy; 0 for one that is absent throughout."""
    ranking_loss: Tensor
    """Scalar: mean over pairs, summed over modalities (Eq. 17)."""
    logits: Tensor
    """Fused logits ``[B, *, K]``; empty, ``[0]``, where they were not asked for."""
    weights: Tensor
    """``[M, B, *]``."""
    energy: Tensor
    """``[M, B, *]``."""
    sample_losses: Tensor
    """``[M, B]``: each sample's plain cross-entropy per modality, NaN where absent; what a trajectory records."""


class Past(NamedTuple):
    """A training step's history (Eq. 14): kappa comes from it where it ``ranks``, the batch goes in where it
    ``records``.
    """

    history: Tensor
    low: Tensor
    span: Tensor
    visits: Tensor | None
    samples: Tensor  # [B], the dataset index of each
    start_epoch: int
    minmax: bool
    ranks: bool
    records: bool


class RuleGrads(NamedTuple):
    """Gradients of a ``WeightRule``'s tensors; None where the rule has none."""

    uncertainty: Tensor | None
    alpha: Tensor
    beta: Tensor
    temperature: Tensor | None
    fused: Tensor | None


class LossGrads(NamedTuple):
    """Gradients of what can be differentiated of ``Losses``; None is zero."""

    loss: Tensor | None = None
    fused_loss: Tensor | None = None
    unimodal_losses: Tensor | None = None
    ranking_loss: Tensor | None = None
    logits: Tensor | None = None
    weights: Tensor | None = None
    energy: Tensor | None = None


class FuseOptions(NamedTuple):
    """What ``qmf::fuse`` takes beside the logits."""

    present: Tensor | None
    weight_rule: WeightRule
    backend: str | None


class ObjectiveOptions(NamedTuple):
    """What ``qmf::objective`` takes beside the logits."""

    target: Tensor
    kappa: Tensor | None
    present: Tensor | None
    weight_rule: WeightRule
    loss_rule: LossRule
    return_logits: bool = True
    backend: str | None = None


def _is_record(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, tuple) and hasattr(kind, "_fields")


def _fields(record: type) -> list[tuple[str, Any]]:
    hints = typing.get_type_hints(record)
    return [(name, hints[name]) for name in record._fields]  # type: ignore[attr-defined]


# Known once, at import: torch.compile traces whoever packs and unpacks, and can't ask for annotations.
_INNER: dict[type, tuple[Any, ...]] = {
    record: tuple(kind if _is_record(kind) else None for _, kind in _fields(record))
    for record in (WeightRule, LossRule, LossGrads, FuseOptions, ObjectiveOptions)
}


def _all_names(record: Any) -> tuple[str, ...]:
    parts = zip(record._fields, _INNER[record], strict=True)
    return tuple(n for name, inner in parts for n in ((name,) if inner is None else _all_names(inner)))


NAMES = {record: _all_names(record) for record in _INNER}  # the fields' names in the order of ``flatten``


def flatten(record: Any) -> list[Any]:
    """The values in the order of the schema, those of records inside records in their place."""
    values: list[Any] = []
    for value, inner in zip(record, _INNER[type(record)], strict=True):
        values += [value] if inner is None else flatten(value)
    return values


def unflatten(record: Any, values: Iterable[Any]) -> Any:
    """``record(...)`` from ``values`` in the order of ``flatten``; takes an iterator no further than it needs."""
    following = iter(values)
    return record(*[next(following) if inner is None else unflatten(inner, following) for inner in _INNER[record]])


def schema(record: type) -> str:
    """The record's fields as an operator's schema lists them, in the order of ``flatten``."""
    return ", ".join(
        schema(kind) if _is_record(kind) else f"{_SCHEMA_TYPES[kind]} {'grad_' if record is LossGrads else ''}{name}"
        for name, kind in _fields(record)
    )


_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    str: "str",
    str | None: "str?",
}
