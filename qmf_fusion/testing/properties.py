"""The properties, each a function that draws examples and raises AssertionError with one that breaks it."""

import copy
from typing import Any

import hypothesis
import torch
from hypothesis import strategies as st
from torch import Tensor

from ..fusion import QualityAwareFusion  # noqa: F401 - for the examples
from ..model import FusionModel
from ..uncertainty import Uncertainty
from .strategies import logits, present_masks
from .subject import Output, Subject, agree, show, size_of, tolerance, verify


def check_weight_monotonicity(
    fusion: Any,
    *,
    uncertainty: Uncertainty | None = None,
    num_modalities: int | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
    settings: hypothesis.settings | None = None,
) -> None:
    """A modality's weight never rises when its uncertainty rises and the other modalities stay (Eq. 9).

    Args:
        fusion: see the module's docstring.
        uncertainty: ``[*, K] -> [*]``, what the weights should follow; by default the fusion's own ``uncertainties``,
            or the energy (Eq. 13) where it has none.
        num_modalities: M, for a callable without ``num_modalities``; by default 3.
        num_classes: K, for a fusion that takes no other.
        dtype: of the logits.
        settings: Hypothesis's; by default ``DEFAULTS``.

    Example:
        >>> check_weight_monotonicity(QualityAwareFusion(2))
    """
    subject = Subject(fusion, num_modalities)
    if uncertainty is None and subject.layer is not None and hasattr(subject.layer.rule, "odds_of"):
        _check_odds_monotonicity(subject, num_classes, dtype, settings)
        return

    def body(before: list[Tensor], other: list[Tensor], step: float, data: st.DataObject) -> None:
        m = data.draw(st.integers(0, subject.num_modalities - 1))
        x = before[m]
        out, u_before = subject(before), subject.uncertainties(before, uncertainty)[m]
        # Lower logits, flatter ones, and others altogether: each raises some uncertainty.
        for changed in (x - step, x / (1 + step), x + step, x * (1 + step), other[m].expand_as(x)):
            after = [*before[:m], changed, *before[m + 1 :]]
            w_before, w_after = out.weights[m].detach(), subject(after).weights[m].detach()
            u_after = subject.uncertainties(after, uncertainty)[m]
            more_uncertain = u_after > u_before + tolerance(u_before, u_after)
            rose = more_uncertain & (w_after > w_before + tolerance(w_before, w_after, x))
            if rose.any():
                at = tuple(rose.nonzero()[0].tolist())
                raise AssertionError(
                    f"weights must never rise with uncertainty (Eq. 9): modality {m}'s uncertainty rose from "
                    f"{u_before[at].item():.6g} to {u_after[at].item():.6g}, yet its weight rose from "
                    f"{w_before[at].item():.6g} to {w_after[at].item():.6g}; its logits went from "
                    f"{x[at].tolist()} to {changed[at].tolist()}"
                )

    shapes = st.shared(st.integers(1, 4), key="batch")
    classes = num_classes or subject.num_classes or st.shared(st.integers(2, 6), key="classes")
    both = logits(num_modalities=subject.num_modalities, num_classes=classes, batch=shapes, dtype=dtype)
    verify(settings, body, both, both, st.floats(0.01, 20), st.data())


def _check_odds_monotonicity(
    subject: Subject, num_classes: int | None, dtype: torch.dtype, settings: hypothesis.settings | None
) -> None:
    """Of a rule whose weights follow odds that rise with u, and the logits besides: only u is raised."""

    def body(given: list[Tensor], rise: float, data: st.DataObject) -> None:
        m = data.draw(st.integers(0, subject.num_modalities - 1))
        raised = Subject(copy.deepcopy(subject.fusion))
        assert raised.layer is not None
        rule: Any = raised.layer.rule
        odds_of = rule.odds_of

        def odds_of_more(u: Tensor) -> Tensor:
            up = torch.zeros_like(u)
            up[m] = rise
            return odds_of(u + up)

        rule.odds_of = odds_of_more
        before, after = subject(given).weights[m].detach(), raised(given).weights[m].detach()
        assert (after <= before + tolerance(before, after)).all(), (
            f"weights must never rise with uncertainty: modality {m}'s u rose by {rise}, yet its weight went from "
            f"{before.tolist()} to {after.tolist()}: logits={show(given)}"
        )

    verify(settings, body, subject.draws(num_classes, dtype), st.floats(0.01, 6), st.data())


def check_permutation(
    fusion: Any,
    *,
    num_modalities: int | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
    settings: hypothesis.settings | None = None,
) -> None:
    """Permuting the modalities permutes the weights and leaves the result.

    A ``QualityAwareFusion``'s coefficients, one per modality, and a ``FusionModel``'s heads are permuted along. Any
    other callable must treat its modalities alike to pass. Arguments as in ``check_weight_monotonicity``.

    Example:
        >>> check_permutation(QualityAwareFusion(3, alpha=[-0.1, -0.2, -0.3]))
    """
    subject = Subject(fusion, num_modalities)

    def body(given: list[Tensor], order: list[int]) -> None:
        out, permuted = subject(given), subject.select(order)([given[m] for m in order])
        agree(
            permuted.weights, out.weights[order], f"permuting the modalities by {order} must permute the weights", given
        )
        size = size_of(given, out)
        agree(permuted.logits, out.logits, f"permuting the modalities by {order} must leave the logits", given, size)

    verify(settings, body, subject.draws(num_classes, dtype), st.permutations(range(subject.num_modalities)))


def check_absent(
    fusion: Any,
    *,
    num_modalities: int | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
    settings: hypothesis.settings | None = None,
) -> None:
    """An absent modality changes nothing, whatever its logits hold.

    Where ``present`` is False the weight is exactly 0, neither the logits nor the other weights depend on what lies
    there (NaN and infinities included) by a single bit, and its gradient is exactly 0; no sample turns into NaN. For a
    ``QualityAwareFusion`` or a ``FusionModel``: the same as leaving the modality out of the fusion, or giving None.
    Arguments as in ``check_weight_monotonicity``.

    Example:
        >>> check_absent(QualityAwareFusion(2))
    """
    subject = Subject(fusion, num_modalities)

    def body(given: list[Tensor], garbage: float, data: st.DataObject) -> None:
        mask = data.draw(present_masks(len(given), tuple(given[0].shape[:-1])))
        if isinstance(fusion, FusionModel) and mask.dim() > 2:
            # A head makes one thing of all positions of a sample, and so a sample is absent as a whole.
            mask = mask.flatten(2)[..., :1].unflatten(-1, (1,) * (mask.dim() - 2)).expand(mask.shape)
        out = subject(given, mask)
        shown = f"present={mask.tolist()}, logits={show(given)}"
        assert not out.weights[~mask].any(), (  # NaN is not 0 either
            f"an absent modality's weight must be exactly 0, got {out.weights.tolist()}: {shown}"
        )
        assert torch.isfinite(out.logits).all(), f"absence must not spread, got {out.logits.tolist()}: {shown}"

        leaves = [torch.where(there.unsqueeze(-1), x, garbage) for there, x in zip(mask, given, strict=True)]
        leaves = [x.detach().requires_grad_() for x in leaves]
        spoilt = subject(leaves, mask)
        for name, x, y in (("weights", out.weights, spoilt.weights), ("logits", out.logits, spoilt.logits)):
            assert torch.equal(x, y), (
                f"an absent modality must change nothing, but with {garbage} in its logits the {name} went from "
                f"{x.tolist()} to {y.tolist()}: {shown}"
            )
        total = (spoilt.logits * torch.linspace(-1, 1, spoilt.logits.shape[-1])).sum() + spoilt.weights.sum()
        if total.requires_grad:
            grads = torch.autograd.grad(total, leaves, allow_unused=True)
            for m, (there, grad) in enumerate(zip(mask, grads, strict=True)):
                if grad is not None:
                    assert not grad[~there].any(), (
                        f"modality {m}'s gradient must be exactly 0 where it is absent, got {grad.tolist()} with "
                        f"{garbage} in its logits: {shown}"
                    )
                    assert torch.isfinite(grad).all(), f"gradients must be finite, got {grad.tolist()}: {shown}"

        if subject.layer is None or len(given) == 1:
            return
        gone = data.draw(st.integers(0, len(given) - 1))
        kept = [m for m in range(len(given)) if m != gone]
        dropped = subject.select(kept)([given[m] for m in kept])
        whole = torch.ones_like(mask)
        whole[gone] = False
        as_none = [None if m == gone else x for m, x in enumerate(given)]
        for way, result in (("present=False", subject(given, whole)), ("None", subject(as_none))):
            what = f"modality {gone} absent ({way}) must be the same as a fusion without it"
            agree(result.weights[kept], dropped.weights, what, given)
            agree(result.logits, dropped.logits, what, given, size_of(given, result))

    garbage = st.sampled_from([torch.nan, torch.inf, -torch.inf, 1e4, -1e4, 0.0])
    verify(settings, body, subject.draws(num_classes, dtype), garbage, st.data())


def check_equations(
    fusion: Any,
    *,
    num_modalities: int | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
    settings: hypothesis.settings | None = None,
) -> None:
    """Scaling and shifting do what the equations say.

    Eq. 11: ``f = sum_m w[m] * x[m]``, or the mean of probabilities for ``combine="probabilities"``; with LogitNorm, of
    normalised logits. Eq. 13, where the fusion returns ``.energy``: c more on every logit is c less energy. For a
    ``QualityAwareFusion`` or a ``FusionModel`` also: logits and temperature times s are energy times s (Eq. 13), and
    ``w = alpha * u + beta``, clamped and normalised as asked (Eq. 9). What does not apply is left out: LogitNorm undoes
    scales and changes shifts; a rule without Eq. 11, such as ``robust``, is checked to return weights from 0 to 1 and,
    if it says so (``gives_log_probabilities``), log-probabilities. Arguments as in ``check_weight_monotonicity``.

    Example:
        >>> check_equations(QualityAwareFusion(2, temperature=2.0))
    """
    subject = Subject(fusion, num_modalities)

    def body(given: list[Tensor], shift: float, scale: float) -> None:
        out = subject(given)
        layer, fused = subject.layer, subject.fused(given, out.weights)
        if fused is None:
            _check_own_logits(subject, out, given)
        else:
            agree(out.logits, fused, "the logits must be sum_m w[m] * x[m] (Eq. 11)", given, size_of(given, out))
        expected = None if layer is None else subject.expected_weights(given)
        if expected is not None:
            agree(out.weights, expected, "weights must follow Eq. 9", given)
        if out.energy is None or (layer is not None and layer.normalize_logits is not None):
            return
        # Shifted and scaled in float32 at least: narrower logits would round.
        wide = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in given]
        moved = subject([x + shift for x in wide])
        assert moved.energy is not None
        what = f"logits + {shift} must have energy - {shift} (Eq. 13)"
        agree(moved.energy, out.energy - shift, what, given, size_of(given))
        if layer is None or expected is None:
            return
        # In float64 before and after, as a learnable temperature's own rounding would differ between the two.
        plain, scaled = (copy.deepcopy(subject.fusion).double() for _ in range(2))
        hot = scaled.fusion if isinstance(scaled, FusionModel) else scaled
        constants: Any = hot.rule.coefficients
        constants.temper.mul_(scale)
        unscaled, stretched = Subject(plain)(given).energy, Subject(scaled)([x * scale for x in wide]).energy
        assert unscaled is not None
        assert stretched is not None
        what = f"logits and temperature times {scale} must have energy times {scale} (Eq. 13)"
        agree(stretched, unscaled * scale, what, given, scale * size_of(given))

    # Powers of two, so that scaling itself does not round.
    scales = st.sampled_from([0.25, 0.5, 2.0, 8.0])
    verify(settings, body, subject.draws(num_classes, dtype), st.floats(-20, 20), scales)


def _check_own_logits(subject: Subject, out: Output, given: list[Tensor]) -> None:
    """Of a rule whose weights do not decide its fused logits."""
    assert subject.layer is not None
    if subject.layer.rule.gives_log_probabilities:
        total = torch.logsumexp(out.logits.detach(), -1)
        agree(total, torch.zeros_like(total), "the rule's logits must be log-probabilities", given)
    weights, slack = out.weights.detach(), tolerance(out.weights)
    assert ((weights >= -slack) & (weights <= 1 + slack)).all(), (
        f"the rule's weights must be from 0 to 1, got {weights.tolist()}: logits={show(given)}"
    )


def check_single_modality(
    fusion: Any,
    *,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
    settings: hypothesis.settings | None = None,
) -> None:
    """With one modality, the result is that head's logits up to its weight; the logits themselves where normalised.

    For ``combine="probabilities"`` its log-probabilities; for a rule without Eq. 11 what its unimodal loss takes for
    the head's logits, up to a constant; of ``robust``, which tempers them, no more than ``check_equations`` asks.

    A ``QualityAwareFusion`` or a ``FusionModel`` of several modalities is checked for each of them alone; any other
    callable is given a list of one. Arguments as in ``check_weight_monotonicity``.

    Example:
        >>> check_single_modality(QualityAwareFusion(["rgb", "depth"]))
    """
    subject = Subject(fusion)
    alone = [Subject(fusion, 1)]
    if subject.layer is not None:
        alone = [subject.select([m]) for m in range(subject.num_modalities)]

    def body(given: list[Tensor], m: int) -> None:
        out = alone[m](given)
        assert out.weights.shape == (1, *given[0].shape[:-1]), (
            f"the weights of one modality must be {(1, *given[0].shape[:-1])}, got {tuple(out.weights.shape)}"
        )
        what = f"modality {m} alone must give its own logits times its weight {out.weights[0].tolist()}"
        fused = alone[m].fused(given, out.weights)
        if subject.layer is not None and fused is None:
            rule = subject.layer.rule
            if rule.gives_p_clean:
                _check_own_logits(subject, out, given)
                return
            what = f"modality {m} alone must give what its unimodal loss takes for its logits, up to a constant"
            own = rule.likelihood(subject.layer.prepare(list(given))[0])
            agree(torch.log_softmax(out.logits, -1), torch.log_softmax(own, -1), what, given, size_of(given, out))
            return
        assert fused is not None
        agree(out.logits, fused, what, given, size_of(given, out))
        expected = None if subject.layer is None else alone[m].expected_weights(given)
        if expected is not None and bool((expected == 1).all()):
            agree(out.weights, expected, "one modality's normalised weight must be 1", given)

    verify(settings, body, alone[0].draws(num_classes, dtype), st.integers(0, len(alone) - 1))


def check_repeatable(
    fusion: Any,
    *,
    num_modalities: int | None = None,
    num_classes: int | None = None,
    dtype: torch.dtype = torch.float64,
    settings: hypothesis.settings | None = None,
) -> None:
    """Repeated calls agree bit for bit, change no input, and draw nothing from torch's global random state.

    The logits include NaN and infinities. Arguments as in ``check_weight_monotonicity``.

    Example:
        >>> check_repeatable(QualityAwareFusion(2))
    """
    subject = Subject(fusion, num_modalities)

    def body(given: list[Tensor]) -> None:
        copies, state = [x.clone() for x in given], torch.get_rng_state()
        first = [None if x is None else x.detach().clone() for x in subject(given)]
        second = subject(given)
        for m, (x, y) in enumerate(zip(given, copies, strict=True)):
            assert torch.allclose(x, y, rtol=0, atol=0, equal_nan=True), (
                f"the inputs must not change, but logits[{m}] went from {y.tolist()} to {x.tolist()}"
            )
        for name, a, b in zip(second._fields, first, second, strict=True):
            if a is not None and b is not None:
                assert torch.allclose(a, b, rtol=0, atol=0, equal_nan=True), (
                    f"repeated calls must agree bit for bit, but {name} was {a.tolist()} and then {b.tolist()}: "
                    f"logits={show(given)}"
                )
        assert torch.equal(state, torch.get_rng_state()), "the fusion must not draw from torch's global random state"

    verify(settings, body, subject.draws(num_classes, dtype, extreme=True))
