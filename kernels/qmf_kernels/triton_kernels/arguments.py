"""From an operator's arguments to a kernel's: rows as they lie, rules to compile for, and the launch itself."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor
from triton import knobs

from ..fusion import WeightRule
from ..objective import LossRule
from ..trajectory import Past
from .history import Trajectory
from .layout import Layout, lay_out
from .rows import Labels, Makers, Rules, Stats, split_number
from .tiling import Tiling

INTERPRETED = knobs.runtime.interpret
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64}


class Rows(NamedTuple):
    """Logits and mask as the kernels walk them."""

    logits: tuple[Tensor, ...]
    extra: tuple[Tensor, ...]
    present: Tensor | None
    layout: Layout
    num_rows: int
    num_classes: int


def lay_rows(logits: Sequence[Tensor], present: Tensor | None = None, *extra: Tensor) -> Rows:
    """``extra``: more tensors of the logits' shape, whose strides follow theirs."""
    tensors = [*logits, *extra]
    layout = lay_out(tensors, present)
    if layout is None:
        tensors = [x.contiguous() for x in tensors]
        present = None if present is None else present.contiguous()
        layout = lay_out(tensors, present)
        assert layout is not None
    num = len(logits)
    return Rows(
        tuple(tensors[:num]),
        tuple(tensors[num:]),
        present,
        layout,
        math.prod(layout.sizes),
        logits[0].shape[-1],
    )


def give_back(written: Sequence[Tensor], wanted: Sequence[Tensor]) -> None:
    """Copy what was written to where it was wanted, where ``lay_rows`` had to put it elsewhere."""
    for source, place in zip(written, wanted, strict=True):
        if source is not place:
            place.copy_(source)


def launch(kernel: Any, programs: int, device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Put ``programs`` programs of a kernel into the device's queue."""
    if INTERPRETED:
        del constants["num_warps"]
        with _asserting():
            kernel[(programs,)](*arguments, **constants)
        return
    other = device.type == "cuda" and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if other else contextlib.nullcontext():
        kernel[(programs,)](*arguments, **constants, sanitize_overflow=False, enable_fp_fusion=True)


@contextlib.contextmanager
def _asserting() -> Iterator[None]:
    """The interpreter skips device-side assertions, which the compiled kernels make, unless told to debug; and it looks
    for overflow at every sum, which they do not.
    """
    from triton.runtime.interpreter import interpreter_builder as builder

    options = builder.options
    if not options.debug:
        builder.options = dataclasses.replace(options, debug=True, sanitize_overflow=False)
    try:
        yield
    finally:
        builder.options = options


def make_makers(rule: WeightRule) -> Makers:
    weights, alpha, beta, temperature, static = (None if x is None else x.contiguous() for x in rule[:5])
    odds, norm = split_number(float(rule.odds)), split_number(float(rule.normalize_logits or 1.0))
    return Makers(weights, alpha, beta, temperature, static, odds, norm)


def make_rules(
    rule: WeightRule,
    loss_rule: LossRule | None = None,
    detach: bool = False,
    unit: bool = False,
    ranks: bool = False,
    past: Past | None = None,
) -> Rules:
    """What to compile for."""
    mixed = rule.combined and rule.combine != "probabilities"
    made = "made" if mixed else rule.uncertainty
    return Rules(
        losses=loss_rule is not None,
        uncertainty=made if rule.weights is None else "given",
        tempered=rule.temperature is not None,
        nonnegative=rule.clamped,
        normalize=rule.normalize,
        weighted=loss_rule is not None and loss_rule.class_weight is not None,
        smoothing=loss_rule is not None and bool(loss_rule.label_smoothing),
        detach=detach,
        unit=unit,
        form="paper" if loss_rule is None else loss_rule.form,
        pairs="adjacent" if loss_rule is None else loss_rule.pairs,
        ranks=ranks,
        reads=ranks or (past is not None and past.records),
        minmax=past is not None and past.minmax,
        records=past is not None and past.records,
        measured=rule.measured,
        combine=rule.combine,
        strict=rule.combined,
        mixed=mixed,
        normed=rule.normalize_logits is not None,
    )


def ranking_rules(form: str, pairs: str) -> Rules:
    """For the ranking alone."""
    return Rules(False, "given", False, False, False, False, False, form=form, pairs=pairs, ranks=True)


def recording_rules() -> Rules:
    """For the history alone."""
    return ranking_rules("paper", "adjacent")._replace(ranks=False, reads=True, minmax=True, records=True)


def make_labels(target: Tensor, loss_rule: LossRule) -> Labels:
    class_weight = None if loss_rule.class_weight is None else loss_rule.class_weight.contiguous()
    smoothing = split_number(float(loss_rule.label_smoothing))
    return Labels(target.contiguous(), class_weight, loss_rule.ignore_index, smoothing)


def make_trajectory(kappa: Tensor | None, past: Past | None) -> Trajectory | None:
    """Where kappa comes from: itself, or the history."""
    if past is not None:
        return Trajectory(
            *(None, past.history, past.low, past.span, past.visits, past.samples.contiguous()),
            *(past.history.shape[2], past.start_epoch),
        )
    return None if kappa is None else Trajectory(kappa.contiguous(), None, None, None, None, None, 0, 0)


def row_constants(rows: Rows, rules: Rules, slots: Stats, dtype: torch.dtype, tiling: Tiling) -> dict[str, Any]:
    return {
        "M": len(rows.logits),
        "DIMS": len(rows.layout.sizes),
        "RB": tiling.rows,
        "KB": tiling.classes,
        "TILES": tiling.tiles,
        "RULES": rules,
        "SLOTS": slots,
        "ACC": TYPES[dtype],
        "num_warps": tiling.warps,
    }
