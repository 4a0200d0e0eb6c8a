"""``FusionReport``'s sentences: what was measured, what the theorem says of it, and each modality's part."""

from collections.abc import Sequence

from .correlation_test import FEWEST
from .measured import Measured
from .report import ModalityReport
from .theorem_1 import Bounds


def recommend(measured: Measured, confidence: float) -> str:
    """From what is measured alone."""
    loss, accuracy = measured.loss, measured.accuracy
    figures = (
        f"the fused loss is {loss.dynamic:.4g} dynamic and {loss.static:.4g} static, the accuracy "
        f"{100 * accuracy.dynamic:.1f} and {100 * accuracy.static:.1f} %"
    )
    told = " and ".join(
        f"the difference in {name} is beyond chance" for name, d in (("loss", loss), ("accuracy", accuracy)) if d.sign
    )
    if measured.samples < FEWEST:
        return f"Either rule will do: {measured.samples} of the {FEWEST} samples that a recommendation takes."
    recommended = measured.recommended
    if recommended == "either":
        sure = f"{100 * confidence:g} % for both"
        return f"Either rule will do: {figures}, and neither difference is beyond chance at {sure}."
    if recommended == "depends":
        lower, other = ("dynamic", "static") if loss.sign < 0 else ("static", "dynamic")
        return f"It depends: the {lower} rule has the lower loss, the {other} rule the higher accuracy ({figures})."
    said = f"Use the {recommended} rule: {figures}; {told}."
    if not accuracy.sign:
        said += (
            " By loss alone: part of it may be how sharp the fused logits are, which the size of the weights decides."
        )
    return said


def explain(verdict: str, bounds: Bounds, modalities: Sequence[ModalityReport], measured: Measured) -> str:
    """What Theorems 1 and 2 have to say of it."""
    if verdict == "none":
        return "No theorem covers this rule; the measured difference is the verdict."
    if bounds.dynamic is None or bounds.static is None:
        return (
            f"Theorems 1 and 2 say nothing here: in {100 * bounds.negative:.3g} % of the rows some weight is negative "
            "and turns a modality's vote around; nonnegative=True, normalize=True or calibrate() rules that out."
        )
    dynamic, static = bounds.dynamic.total, bounds.static.total
    sides = f"{dynamic:.3g} dynamic, {static:.3g} static"
    if verdict == "holds":
        said = f"Theorem 2 applies: in the paper's bound the dynamic rule is no worse than the static one ({sides})."
    elif verdict == "fails":
        failing = {n: [m.name for m in modalities if getattr(m, f"eq{n}") == "fails"] for n in (5, 6)}
        where = "; ".join(f"Eq. {n} fails for {', '.join(names)}" for n, names in failing.items() if names)
        said = f"Theorem 2 does not apply ({where}); the bound is {sides}."
    else:
        said = f"Whether Theorem 2 applies is undecided: more data would tell; the bound is {sides}."
    if measured.recommended in ("dynamic", "static") and bounds.lower != measured.recommended and dynamic != static:
        why = "it is a limit, and need not be close"
        if bounds.scale > 1 and (bounds.dynamic.loss > bounds.static.loss) == (bounds.lower == "static"):
            limited = f"{bounds.dynamic.loss:.4g} dynamic and {bounds.static.loss:.4g} static"
            why = f"of fused logits divided by {bounds.scale:.3g}, which are less sharp, the losses are {limited}"
        said += f" The bound favours the other rule than what is measured: {why}."
    return said


def describe(m: ModalityReport, confidence: float) -> str:
    """One modality."""
    if not m.samples:
        return f"{m.name} never counts in this data."
    if m.samples < FEWEST:
        return f"{m.name} has {m.samples} of the {FEWEST} samples that a verdict takes."
    low, high = m.interval
    said = {
        "holds": f"{m.name} weighs less where it is wrong, as Eq. 6 demands (r = {m.pearson:+.2f}).",
        "fails": f"{m.name} weighs more where it is wrong (r = {m.pearson:+.2f}): calibrate() would hold its weight.",
        "undecided": f"{m.name} weighs neither less nor more where it is wrong, beyond chance (r = {m.pearson:+.2f}, "
        f"{100 * confidence:g} % interval {low:+.2f} to {high:+.2f}).",
    }[m.eq6]
    if m.interval == (0.0, 0.0):
        said = f"{m.name}'s weight or loss is constant here: no covariance, as Eq. 6 allows."
    if m.assumption1 == "fails":
        said += f" Its uncertainty is lower where it is wrong: Assumption 1 fails (r = {m.uncertainty_pearson:+.2f})."
    if m.eq5 == "fails":
        side = "above" if m.mean_weight > m.static_weight else "below"
        said += (
            f" Its mean weight {m.mean_weight:.3g} is {side} its static weight {m.static_weight:.3g} (Eq. 5): "
            "calibrate() would make them equal."
        )
    if m.clean is not None:
        said += (
            f" P(clean) is {m.clean.promised:.2f} on average, and {m.clean.found:.2f} once the class is known; over "
            f"tenths of P(clean) the two lie {m.clean.error:.2f} apart."
        )
    return said
