"""Does the dynamic rule do better than a static one on this data, and what do Theorems 1 and 2 have to say of it?

Theorem 1 bounds the generalization error of ``f = sum_m w_m f_m``, with probability ``1 - delta``, by

    ``sum_m [ E(w_m) Err(f_m) + E(w_m) Rad(f_m) + Cov(w_m, loss_m) ] + M sqrt(ln(1 / delta) / 2N)``

(Term-L, Term-C, Term-Cov and confidence). **Its premise:** the proof is Jensen's inequality, which needs weights that
are **not negative and sum to one**. Eq. 9 promises neither; ``theorem_1`` derives what can be said all the same, and in
that form the two rules are compared here. Of negative weights, nothing can.

Theorem 2: dynamic fusion is at least as good as static fusion, in this bound, if besides that premise Eq. 5 holds
(equal mean weights) and no weight correlates positively with its modality's loss (Eq. 6). A bound is a limit, not a
loss: the report starts from what is measured. ``WeightLossCorrelation`` accumulates Eq. 6 over streams;
``QualityAwareFusion.calibrate`` makes the conditions hold.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .calibration import CleanData, excess
from .checks import Logits, Present, check_confidence, check_count, in_order
from .coefficients import Coefficient, own_coefficient
from .correlation import Correlation, WeightLossCorrelation, spearman
from .correlation_test import FEWEST, CorrelationTest, judge_correlations
from .fusion import FusionOutput, Heads, QualityAwareFusion
from .measured import clean_reliability, interval, measure, per_sample, resample_means
from .model import FusionModel
from .report import FusionReport, ModalityReport
from .theorem_1 import Bounds, Terms, bound_both, split_into_terms
from .wording import describe, explain, recommend

__all__ = ["Correlation", "FusionReport", "ModalityReport", "WeightLossCorrelation", "fusion_report", "spearman"]

MARGIN = 0.05  # a mean weight within 5 % of its static weight is as good as equal
VERDICTS = ("none", "holds", "undecided", "fails")
_MOST_SHOWN = 2000


class Intervals(NamedTuple):
    """How they are made, by bootstrap."""

    confidence: float
    resamples: int
    seed: int


@torch.no_grad()
def fusion_report(
    fusion: QualityAwareFusion | FusionModel,
    logits: Heads | Mapping[str, Any],
    target: Tensor,
    static_weights: Coefficient | Mapping[str, float] | None = None,
    present: Present | None = None,
    *,
    features: Logits | None = None,
    confidence: float = 0.95,
    resamples: int = 1000,
    seed: int = 0,
    ignore_index: int = -100,
) -> FusionReport:
    """The dynamic rule against the static one on held-out data, and Theorem 2's conditions, as far as they apply.

    The static rule adds up the same logits (for fused probabilities: the same probabilities) with constant weights.
    What is recommended is measured: the rule with the lower fused loss or the higher accuracy, where the interval of
    the paired difference leaves out 0. As either may decide, each of these two has half the level (Bonferroni): of
    rules that are as good as each other, one is recommended with a probability of ``1 - confidence``. The theorem
    explains it. It is about weights as they are, and of rules with ``normalize`` or fused probabilities about the
    weights' shares among the modalities that are there; it does not cover ``robust``, as ``judged_by`` says.

    Eq. 5 holds where the interval of the mean weight less the static weight lies within 5 % of the latter (or they are
    equal to 1e-6), and fails where it leaves out 0 otherwise. Eq. 6 and Assumption 1 are decided by the test that
    ``calibrate`` uses (``qmf_fusion.correlation_test``). All intervals take samples for units, the first dimension,
    however many positions each has. Fewer than 4 samples decide nothing.

    Args:
        fusion: the layer, calibrated or not; or a ``FusionModel``.
        logits: as ``fusion`` takes them, ``[N, *, K]`` each, or a ``FusionOutput``; for a model its inputs, which it is
            run on in evaluation mode, all at once.
        target: int ``[N, *]``.
        static_weights: positive; a number or one per modality, in order or by name. Default: what the layer was
            calibrated to; else, for ``robust``, its own mean weights; else the mean of all weights, the same for all.
        present: as ``fusion`` takes it.
        features: as ``fusion`` takes them.
        confidence: of the intervals (loss and accuracy together); ``1 - confidence`` is the tests' family-wise level.
        resamples: of the bootstrap; intervals are percentiles, widened for few samples as Student's t is.
        seed: of the bootstrap.
        ignore_index: a target that does not count.

    Returns:
        FusionReport. A modality that never counts has NaN numbers and undecided verdicts.

    Raises:
        TypeError, ValueError, IndexError: arguments of the wrong kind, shape or range, no row that counts, or a target
            that a logit of -inf rules out.

    Example:
        >>> logits = 3 * torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
        >>> report = fusion_report(QualityAwareFusion(2), logits, logits.sum(0).argmax(-1))
        >>> report.recommended, report.verdict, [m.eq6 for m in report.modalities]
        ('static', 'fails', ['holds', 'holds'])
    """
    check_confidence(confidence)
    check_count("resamples", resamples)
    if isinstance(fusion, FusionModel):
        logits = logits if isinstance(logits, FusionOutput) else _run(fusion, logits, present)
        fusion, present = fusion.fusion, None
    rule, data = fusion.rule, fusion.clean_data(logits, target, present, ignore_index, features)
    some = data.counted.any(0)
    if not bool(some.any()):
        raise ValueError("logits and target must hold a row that counts: a modality that is there, and a class")
    fused, weights, _ = rule.fuse(data.rows, data.counted, data.features)
    given = in_order("static_weights", static_weights, fusion.names)
    static = _static_weights(fusion, given, data, weights).to(weights)
    fused_static, constant = rule.static_fusion(data.rows, data.counted, static)
    intervals = Intervals(confidence, resamples, seed)
    measured = measure(fused, fused_static, data.target, some, *intervals)

    acting = rule.convex_weights(weights, data.counted)
    covered, weights = acting is not None, weights if acting is None else acting
    bounds = bound_both(weights, constant, data, fused, fused_static) if covered else Bounds()
    modalities = _modalities(fusion, data, weights, constant, bounds.scale if covered else None, intervals)
    eq5, eq6, first = (_worst([getattr(m, name) for m in modalities]) for name in ("eq5", "eq6", "assumption1"))
    verdict = "fails" if bounds.negative else _worst([eq5, eq6]) if covered else "none"
    if verdict == "holds" and bounds.lower == "static":
        verdict = "undecided"  # both conditions hold, within their margins, and the bounds are as close
    return FusionReport(
        measured=measured,
        recommended=measured.recommended,
        judged_by=rule.judged_by,
        modalities=modalities,
        confidence=confidence,
        scale=bounds.scale,
        negative=bounds.negative,
        bound=bounds.dynamic,
        bound_static=bounds.static,
        eq5=eq5,
        eq6=eq6,
        assumption1=first,
        verdict=verdict,
        sentence=f"{recommend(measured, confidence)} {explain(verdict, bounds, modalities, measured)}",
        _points=[_thin(*each) for each in zip(weights, data.losses, data.counted, strict=True)],
    )


def _run(model: FusionModel, inputs: Any, present: Present | None) -> FusionOutput:
    """In evaluation mode, which is left as it was."""
    modes = {module: module.training for module in model.modules()}
    try:
        out: FusionOutput = model.eval()(inputs, present)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return out


def _thin(weights: Tensor, losses: Tensor, counted: Tensor) -> tuple[Tensor, Tensor]:
    """Those of a picture, of one modality."""
    step = max(1, -(-int(counted.sum()) // _MOST_SHOWN))
    return weights[counted][::step].cpu(), losses[counted][::step].cpu()


def _static_weights(fusion: QualityAwareFusion, given: Coefficient | None, data: CleanData, weights: Tensor) -> Tensor:
    """The static rule's ``[M]``, on the CPU."""
    if given is not None:
        return own_coefficient("static_weights", given, fusion.num_modalities)
    if fusion.calibration.found():
        return fusion.calibration.static.cpu()
    static = fusion.rule.default_static(data.mean(weights).cpu())
    # Where weights are negative on average, no static rule is like them: the plain mean.
    return torch.where(static > 0, static, 1 / fusion.num_modalities)


def _modalities(
    fusion: QualityAwareFusion,
    data: CleanData,
    weights: Tensor,
    static: Tensor,
    scale: float | None,
    intervals: Intervals,
) -> list[ModalityReport]:
    """Each modality's numbers and verdicts, of weights ``[M, N, *]`` of both rules; no ``scale``, no theorem."""
    counted, (confidence, resamples, seed) = data.counted, intervals
    u = fusion.rule.uncertainties(data.rows, data.features)
    eq6 = judge_correlations(excess(weights, static, data), data.losses, counted, confidence)
    first = judge_correlations(u, data.losses, counted & torch.isfinite(u), confidence)
    unknown = torch.full((fusion.num_modalities,), float("nan"))
    dynamic, own = Terms(unknown, unknown), Terms(unknown, unknown)
    if scale is not None:
        dynamic, own = (split_into_terms(w, data, scale) for w in (weights, static))
    gaps, counts = per_sample(weights - static, counted)
    drawn = resample_means(gaps, counts, resamples, seed)
    clean, held = fusion.rule.clean_given_label(data), fusion.calibration.held.tolist()
    described = []
    for m, name in enumerate(fusion.names):
        samples = int((counts[:, m] > 0).sum())
        w, s, loss = (x[m][counted[m]].cpu().double() for x in (weights, static, data.losses))
        mean, static_mean = float(w.mean()), float(s.mean())
        ends = interval(drawn[:, m], mean - static_mean, samples, confidence)
        promises = clean is not None and samples and not held[m]
        found = ModalityReport(
            name=name,
            samples=samples,
            mean_weight=mean,
            static_weight=static_mean,
            mean_interval=ends,
            mean_loss=float(loss.mean()),
            pearson=float(eq6.r[m]),
            interval=(float(eq6.low[m]), float(eq6.high[m])),
            spearman=spearman(w, loss),
            uncertainty_pearson=float(first.r[m]),
            term_l=float(dynamic.term_l[m]),
            term_cov=float(dynamic.term_cov[m]),
            term_l_static=float(own.term_l[m]),
            eq5="none" if scale is None else _eq5(samples, mean, static_mean, ends),
            eq6=_wanted(-1, eq6, m),
            assumption1=_wanted(1, first, m),
            clean=clean_reliability(w, clean[m][counted[m]].cpu()) if clean is not None and promises else None,
            sentence="",
        )
        described.append(replace(found, sentence=describe(found, confidence)))
    return described


def _eq5(samples: int, mean: float, static: float, ends: tuple[float, float]) -> str:
    if samples < FEWEST:
        return "undecided"
    if abs(mean - static) <= 1e-6 or all(abs(end) <= MARGIN * abs(static) for end in ends):
        return "holds"
    return "undecided" if ends[0] <= 0 <= ends[1] else "fails"


def _wanted(sign: int, test: CorrelationTest, m: int) -> str:
    """Whether a correlation has the sign that is wanted, or is exactly 0."""
    constant = float(test.low[m]) == float(test.high[m]) == 0
    found = int(test.sign[m])
    return "holds" if constant or found == sign else "fails" if found == -sign else "undecided"


def _worst(verdicts: Sequence[str]) -> str:
    return max(verdicts, key=VERDICTS.index)
