"""What the checks call and how they compare: one face for a layer, a wrapped model and a user's own callable."""

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor, nn

from ..fusion import QualityAwareFusion
from ..model import FusionModel
from ..rule import Rule
from ..uncertainty import Uncertainty, energy_score
from .strategies import logits

DEFAULTS = hypothesis.settings(
    max_examples=40, derandomize=True, deadline=None, suppress_health_check=list(hypothesis.HealthCheck)
)
"""The settings of a check that is given none."""


class Output(NamedTuple):
    logits: Tensor  # [*, K]
    weights: Tensor  # [M, *]
    energy: Tensor | None  # [M, *]


class Subject:
    """A fusion, called with logits ``[*, K]`` wherever it wants its classes."""

    def __init__(self, fusion: Any, num_modalities: int | None = None) -> None:
        if not callable(fusion):
            raise TypeError(f"fusion must be callable with a list of logits, got {type(fusion).__name__}")
        self.fusion = fusion
        self.layer: QualityAwareFusion | None = fusion.fusion if isinstance(fusion, FusionModel) else None
        if isinstance(fusion, QualityAwareFusion):
            self.layer = fusion
        count: Any = getattr(self.layer or fusion, "num_modalities", 3) if num_modalities is None else num_modalities
        self.num_modalities = int(count)
        self.class_dim: int = getattr(self.layer or fusion, "class_dim", -1)
        self.num_classes = None if self.layer is None else self.layer.rule.num_classes

    def __call__(self, logits: Sequence[Tensor | None], present: Tensor | None = None) -> Output:
        given: Any = [None if x is None else x.movedim(-1, self.class_dim) for x in logits]
        if isinstance(self.fusion, FusionModel):
            given = dict(zip(self.fusion.names, given, strict=True))
        out = self.fusion(given) if present is None else self.fusion(given, present=present)
        return Output(out.logits.movedim(self.class_dim, -1), out.weights, getattr(out, "energy", None))

    def uncertainties(self, logits: Sequence[Tensor], measure: Uncertainty | None) -> Tensor:
        layer = self.layer if self.layer is not None else self.fusion
        if measure is None and hasattr(layer, "uncertainties"):
            moved = [x.movedim(-1, self.class_dim) for x in logits]
            return torch.as_tensor(layer.uncertainties(moved)).detach()
        return torch.stack([(measure or energy_score)(x) for x in logits])

    def select(self, order: Sequence[int]) -> "Subject":
        """The same with these modalities in this order; a callable of unknown making is taken as it is."""
        if self.layer is None:
            return Subject(self.fusion, len(order))
        layer = copy.deepcopy(self.layer)
        names = [getattr(self.fusion, "names", layer.names)[m] for m in order]
        layer.names = tuple(names)
        _select(layer.rule, order)
        if not isinstance(self.fusion, FusionModel):
            return Subject(layer)
        return Subject(FusionModel({name: self.fusion.heads[name] for name in names}, layer))

    def fused(self, given: Sequence[Tensor], weights: Tensor) -> Tensor | None:
        """What weights ``[M, *]`` make of the logits: Eq. 11, or what the rule says; None where they do not decide."""
        if self.layer is None:
            return (weights.unsqueeze(-1) * torch.stack(list(given))).sum(0)
        return self.layer.rule.logits_from(self.layer.prepare(list(given)), weights)

    def expected_weights(self, given: Sequence[Tensor]) -> Tensor | None:
        """What Eq. 9 makes of the layer's uncertainties; None where they do not decide the weights."""
        assert self.layer is not None
        return self.layer.rule.weights_from(self.uncertainties(given, None))

    def draws(self, num_classes: int | None, dtype: torch.dtype, **options: Any) -> st.SearchStrategy[list[Tensor]]:
        classes = num_classes or self.num_classes or st.integers(2, 6)
        return logits(num_modalities=self.num_modalities, num_classes=classes, dtype=dtype, **options)


def _select(rule: Rule, order: Sequence[int]) -> None:
    """Leave these modalities, in this order, in all that a rule has one of per modality: see ``Rule``."""
    if rule.feature_widths is not None:
        rule.feature_widths = tuple(rule.feature_widths[m] for m in order)
    _select_in(rule, rule.num_modalities, order)


def _select_in(module: nn.Module, num: int, order: Sequence[int]) -> None:
    if hasattr(module, "num_modalities"):
        module.num_modalities = len(order)  # type: ignore[assignment]
    for kept in (module._parameters, module._buffers):
        for name, value in kept.items():
            if value is not None and value.dim() > 0 and len(value) == num:
                chosen = value.detach()[list(order)]
                setattr(module, name, nn.Parameter(chosen) if isinstance(value, nn.Parameter) else chosen)
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList) and len(child) == num:
            setattr(module, name, nn.ModuleList(child[m] for m in order))
        else:
            _select_in(child, num, order)


def verify(
    settings: hypothesis.settings | None, body: Callable[..., None], *strategies: st.SearchStrategy[Any]
) -> None:
    chosen = hypothesis.settings(settings or DEFAULTS, report_multiple_bugs=False)
    try:
        with warnings.catch_warnings():
            # What is not finite is given on purpose.
            warnings.filterwarnings("ignore", r".* rows of modality .* count in training step", UserWarning)
            chosen(hypothesis.given(*strategies)(body))()
    except hypothesis.errors.Flaky as error:
        raise AssertionError("repeated calls must agree: an example failed once and then passed") from error


def tolerance(*values: Tensor, size: float | None = None) -> float:
    """What rounding may make of values, or of a sum of terms of this size."""
    size = max(float(x.detach().abs().max()) for x in values) if size is None else size
    return 256 * max(torch.finfo(x.dtype).eps for x in values) * (1 + size)


def size_of(given: Sequence[Tensor], out: Output | None = None) -> float:
    """How large the terms of a sum over modalities are, which bounds its rounding error."""
    if out is None:
        return max(float(x.abs().max()) for x in given)
    return max(float((w.detach().unsqueeze(-1) * x).abs().max()) for w, x in zip(out.weights, given, strict=True))


def agree(got: Tensor, expected: Tensor, what: str, given: Sequence[Tensor], size: float = 0.0) -> None:
    got, expected = got.detach(), expected.detach()
    assert got.shape == expected.shape, f"{what}: the shape is {tuple(got.shape)}, not {tuple(expected.shape)}"
    error = (got - expected).abs().max()
    assert error <= tolerance(got, expected, size=size + size_of(given)), (
        f"{what}: got {got.tolist()}, expected {expected.tolist()} (off by {float(error):.3g}), logits={show(given)}"
    )


def show(given: Sequence[Tensor]) -> list[Any]:
    return [x.tolist() for x in given]
