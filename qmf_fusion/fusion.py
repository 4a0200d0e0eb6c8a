"""The layer: weight each modality per sample by how certain it is (Eq. 9), and add up (Eq. 11)."""

import copy
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from .affine import COMBINATIONS, AffineOptions, AffineRule
from .calibration import FITTABLE, Calibration, CleanData, clean_data
from .checks import (
    Logits,
    Present,
    check_batch,
    check_choice,
    check_confidence,
    check_features,
    check_integer,
    check_logit_norm,
    check_logits,
    check_present,
    in_order,
    modality_names,
)
from .coefficients import Coefficient, Coefficients, own_coefficient
from .exported import exportable
from .logit_norm import normalize_rows
from .mixture import ContaminatedProduct
from .rows import Features
from .rule import Rule
from .rules import RULES
from .uncertainty import Uncertainty
from .warn import warn_user


class FusionOutput(NamedTuple):
    """What the layer returns; M modalities, ``*`` any leading dimensions, K classes."""

    logits: Tensor
    """Fused logits ``[*, K]`` (Eq. 11), float32, or float64 if any input is."""
    weights: Tensor
    """``[M, *]`` (Eq. 9); exactly 0 for an absent modality."""
    energy: Tensor
    """``[M, *]`` (Eq. 13), whatever the uncertainty; +inf for an absent modality."""
    unimodal_logits: tuple[Tensor, ...]
    """The M inputs, ``[*, K]`` each; zeros where the input was None."""
    present: Tensor | None
    """Which modalities were there, bool ``[M, *]``; None for all."""
    features: tuple[Tensor | None, ...] | None = None
    """What the rule judged by beside the logits, as given (from ``FusionModel`` as its heads returned it), ``[*, D]``
    each or None; None if there was nothing."""


Heads = Logits | FusionOutput
"""What is taken for the M heads' logits; a whole output brings what is present, and the features, along."""


def parts_of(
    given: Heads, present: Present | None, features: Logits | None
) -> tuple[Logits, Present | None, Logits | None]:
    """Logits, what is present, and features: of a whole output its own, where none are given beside it."""
    if not isinstance(given, FusionOutput):
        return given, present, features
    present = given.present if present is None else present
    return given.unimodal_logits, present, given.features if features is None else features


class QualityAwareFusion(nn.Module):
    """Fuse the logits of M modalities, each weighted per sample by its certainty.

    ``f = sum_m w[m] * x[m]`` with ``w[m] = alpha[m] * u[m] + beta[m]``, ``alpha < 0``, ``beta >= 0`` (Eq. 9 and 11 of
    Zhang et al., ICML 2023), and the energy ``u[m] = -T[m] * logsumexp(x[m] / T[m])`` (Eq. 13) unless chosen otherwise.

    Args:
        modalities: how many, from 1 up, or their names.
        alpha: negative; a number or one per modality, in order or by name. Default: -0.1 for the energy, as published,
            and -1 for the other uncertainties, which lie in [0, 1].
        beta: not negative; a number or one per modality. Default: 0 for the energy, 1 for the others.
        temperature: positive; a number or one per modality. Divides the logits that the uncertainty sees.
        uncertainty: ``"energy"``, ``"msp"``, ``"entropy"``, ``"evidence"`` (see ``qmf_fusion.uncertainty``), or a
            callable from ``[*, K]`` to ``[*]``, differentiable if the weights are to be trained.
        learnable: make alpha, beta and temperature parameters, whose signs hold by construction
            (``alpha = -exp(a)``, ``beta = |b|``, ``T = exp(t)``).
        normalize: clamp weights at 0 and divide by their sum over the present modalities; equal shares where all are 0.
        nonnegative: clamp weights at 0. Eq. 9 as published lets them go negative (for the energy: when every logit is
            far below 0), which turns a modality's vote around.
        detach_weights: stop the gradient of the fused logits at the weights, as the released text-image code does (its
            RGB-D code does not). The ranking loss still reaches them.
        combine: what the weights add up: ``"logits"`` (Eq. 11); ``"probabilities"``, ``f = log(sum_m w[m] softmax(x[m])
            / sum_m w[m])``, with weights clamped at 0; or a ``Rule`` that has weights of its own, beside which none of
            the arguments above may be given: a published one by its name in ``qmf_fusion.rules``, such as ``"tmc"``, or
            an object, as ``ContaminatedProduct`` (see ``QualityAwareFusion.robust``). In all but the first a row with
            any value that is not finite is absent.
        normalize_logits: divide each row of logits by its Euclidean norm times this temperature, in training and
            after (LogitNorm, Wei et al., ICML 2022, who take 0.04); ``unimodal_logits`` stay as they came. From 1e-30
            to 1e30. A row with any value that is not finite is absent.
        class_dim: where the classes lie in each modality's tensor: -1, or 1 for ``[B, K, H, W]``. The fused logits lie
            the same.

    Shapes: inputs ``[*, K]`` each; outputs as in ``FusionOutput``. All floating dtypes; arithmetic and outputs are
    float32 (float64 if any input is), under autocast too.

    Absent and broken inputs: a modality that is absent (``present`` False, or None in place of its logits), or whose
    logits for a sample hold NaN or +inf or nothing but -inf, gets weight exactly 0, energy +inf and no gradient there;
    other samples and modalities are unaffected. A -inf among finite logits rules its class out of the fused result,
    where rows that are not finite throughout are not absent anyway (``combine``, ``normalize_logits``). A sample with
    no modality gets fused logits 0.

    Raises:
        TypeError, ValueError: for any argument out of the above, naming it.

    Example:
        >>> fusion = QualityAwareFusion(["rgb", "depth"])
        >>> out = fusion({"rgb": torch.tensor([[4.0, 0.0]]), "depth": torch.tensor([[0.0, 1.0]])})
        >>> out.weights
        tensor([[0.4018],
                [0.1313]])
        >>> out.logits
        tensor([[1.6073, 0.1313]])
    """

    def __init__(
        self,
        modalities: int | Iterable[str],
        *,
        alpha: Coefficient | Mapping[str, float] | None = None,
        beta: Coefficient | Mapping[str, float] | None = None,
        temperature: Coefficient | Mapping[str, float] = 1.0,
        uncertainty: str | Uncertainty = "energy",
        learnable: bool = False,
        normalize: bool = False,
        nonnegative: bool = False,
        detach_weights: bool = False,
        combine: str | Rule = "logits",
        normalize_logits: float | None = None,
        class_dim: int = -1,
    ) -> None:
        super().__init__()
        self.names = modality_names(modalities)
        self.normalize_logits = check_logit_norm(normalize_logits)
        self.class_dim = check_integer("class_dim", class_dim)
        options = AffineOptions(uncertainty, "logits", nonnegative, normalize, detach_weights)
        given = {"alpha": alpha, "beta": beta, "temperature": temperature}
        if isinstance(combine, Rule) or (isinstance(combine, str) and combine in RULES):
            _check_no_eq_9(options, learnable=learnable, **given)
        if isinstance(combine, str) and combine in RULES:
            combine = RULES[combine](len(self.names))
        if isinstance(combine, str):
            check_choice("combine", combine, [*COMBINATIONS, *RULES])
            options = options._replace(combine=combine)
            options.check()
            a, b, t = (in_order(name, value, self.names) for name, value in given.items())
            constants = Coefficients(len(self.names), *options.defaults(a, b), t, learnable)
            combine = AffineRule(len(self.names), options, constants)
        elif not isinstance(combine, Rule):
            raise TypeError(f"combine must be a string or a Rule, got {type(combine).__name__}")
        elif combine.num_modalities != len(self.names):
            raise ValueError(f"combine must be of {len(self.names)} modalities, got {combine.num_modalities}")
        self.rule = combine

    @classmethod
    def robust(
        cls,
        modalities: int | Iterable[str],
        num_classes: int,
        *,
        features: Sequence[int | None] | Mapping[str, int | None] | None = None,
        odds: Coefficient | Mapping[str, float] = 0.3,
        normalize_logits: float | None = None,
        class_dim: int = -1,
        **switches: Any,
    ) -> "QualityAwareFusion":  # by name, not Self: so that a configuration may name this method where one is wanted
        """The rule to start with where modalities may be broken: a contaminated product of experts.

        Weights are ``P(modality is clean | all)``, fused logits are log-probabilities. It measures how untypical a
        modality's logits are, and the features that its head sees, if they are given: much damage shows in these only.
        ``QMFLoss`` gathers the statistics that this takes in training, or ``calibrate`` takes them from clean data;
        before either, every modality is taken to be typical. ``QMFLoss`` trains with that plain form, whatever has been
        gathered, and with the evidential likelihood (``qmf_fusion.evidential``) in place of the softmax.

        Args:
            modalities: how many, or their names.
            num_classes: K.
            features: the width D of each modality's features, None for one without; None for none at all. They are what
                the head's last layers see, ``[*, D]``, such as an encoder's pooled output. In order or by name.
            odds: broken : clean of a modality that shows nothing untypical, before the others are heard. Positive; a
                number or one per modality, in order or by name. ``fusion.rule.set_odds`` sets others.
            normalize_logits: see ``QualityAwareFusion``.
            class_dim: see ``QualityAwareFusion``.
            switches: the ingredients, each to be switched off or tuned; see ``qmf_fusion.mixture.ContaminatedProduct``.

        Raises:
            TypeError, ValueError: an unknown switch or a number out of its range.

        Example:
            >>> fusion = QualityAwareFusion.robust(["rgb", "depth", "audio"], num_classes=3)
            >>> agree, other = torch.tensor([[4.0, 0.0, 0.0]]), torch.tensor([[0.0, 6.0, 0.0]])
            >>> out = fusion([agree, agree, other])  # the third is outvoted
            >>> out.logits.argmax(-1), out.weights[:, 0]
            (tensor([0]), tensor([0.7681, 0.7681, 0.6898]))
        """
        names = modality_names(modalities)
        of_each = {what: in_order(what, given, names) for what, given in (("features", features), ("odds", odds))}
        rule = ContaminatedProduct(len(names), num_classes, **of_each, **switches)
        return cls(names, combine=rule, normalize_logits=normalize_logits, class_dim=class_dim)

    @property
    def num_modalities(self) -> int:
        return len(self.names)

    @property
    def calibration(self) -> Calibration:
        """What ``calibrate`` found."""
        return self.rule.calibration

    @property
    def alpha(self) -> Tensor:
        """``[M]``, negative (Eq. 9); 0 where calibration holds a modality at its static weight. Not of ``robust``."""
        return self.rule.constants().alpha

    @property
    def beta(self) -> Tensor:
        """``[M]``, not negative (Eq. 9), unless calibrated (Lemma 1 needs any real number). Not of ``robust``."""
        return self.rule.constants().beta

    @property
    def temperature(self) -> Tensor:
        """``[M]``, positive (Eq. 13). Not of ``robust``."""
        return self.rule.constants().temperature

    def uncertainties(self, logits: Heads, features: Logits | None = None) -> Tensor:
        """The ``u`` of Eq. 9 for each modality, ``[M, *]``; NaN or infinite where a row's logits are not finite.

        For ``robust`` the untypicality, which its odds rise with: 0 everywhere without statistics. For a published rule
        what its ``uncertainties`` say: TMC's and RCML's vacuity, PDF's ``1 - c``, else the entropy over its maximum.
        """
        logits, _, features = parts_of(logits, None, features)
        rows, _ = check_logits(logits, self.names, self.class_dim)
        return self.rule.uncertainties(self.prepare(rows), self.check_features(features, rows))

    def check_features(self, features: Logits | None, rows: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Features as the rule takes them, M of ``[*, D]`` or None, for rows ``[*, K]``; None where there are none.

        Raises:
            TypeError, ValueError: features of the wrong kind, count, shape, dtype or device, or for a rule that takes
                none.
        """
        return check_features(features, self.rule.feature_widths, self.names, rows[0], self.class_dim)

    def prepare(self, rows: list[Tensor]) -> list[Tensor]:
        """Rows ``[*, K]`` as the rule sees them: LogitNorm where asked, a second time without effect."""
        return normalize_rows(rows, self.normalize_logits)

    def forward(self, logits: Heads, present: Present | None = None, features: Logits | None = None) -> FusionOutput:
        """Fuse.

        Args:
            logits: M tensors ``[*, K]`` as a sequence, a mapping by name or stacked ``[M, *, K]``; None in a sequence
                or a mapping for a modality that is absent from the whole batch. A ``FusionOutput`` is its unimodal
                logits, with what is present and the features.
            present: bool ``[M]``, ``[M, B]`` or ``[M, *]``, or masks by name; False where a modality is absent.
            features: what the heads see, as a sequence or a mapping by name, where the rule was built with widths: each
                is laid out as the logits, with D in place of the classes. None for a modality whose features are not
                known, which ``robust`` judges by its logits alone, and which is absent for PDF. A row with features
                that are not finite is absent, as its head saw something broken. Not differentiated. Those of a modality
                without a width are not looked at.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device, naming them.
        """
        logits, present, features = parts_of(logits, present, features)
        rows, there = check_logits(logits, self.names, self.class_dim)
        mask = check_present(present, there, (len(rows), *rows[0].shape[:-1]), rows[0].device, self.names)
        seen = self.check_features(features, rows)
        fused, weights, energy = self.rule.fuse(self.prepare(rows), mask, seen)
        if self.class_dim != -1:
            fused = fused.movedim(-1, self.class_dim)
            rows = [x.movedim(-1, self.class_dim) for x in rows]
            seen = None if seen is None else [f if f is None else f.movedim(-1, self.class_dim) for f in seen]
        return exportable(
            FusionOutput(fused, weights, energy, tuple(rows), mask, None if seen is None else tuple(seen))
        )

    def observe(
        self,
        rows: list[Tensor],
        target: Tensor,
        present: Tensor | None,
        ignore_index: int = -100,
        features: Features | None = None,
    ) -> None:
        """Let the rule learn from a training batch, as ``QMFLoss`` has checked it: ``robust`` counts it."""
        self.rule.observe(self.prepare(rows), target, present, ignore_index, features)

    def clean_data(
        self,
        logits: Heads,
        target: Tensor,
        present: Present | None = None,
        ignore_index: int = -100,
        features: Logits | None = None,
    ) -> CleanData:
        """Check held-out data, as ``calibrate`` takes it, and see it as the rule does."""
        logits, present, features = parts_of(logits, present, features)
        rows, target, mask = check_batch(logits, target, present, self.names, self.class_dim, "[N, *, K]")
        seen = self.check_features(features, rows)
        ways = (self.normalize_logits, self.rule.likelihood, seen, self.rule.read)
        data = clean_data(rows, target, mask, ignore_index, *ways)
        data.check_targets(self.names)
        return data

    @torch.no_grad()
    def calibrate(
        self,
        logits: Heads,
        target: Tensor,
        static_weights: Coefficient | Mapping[str, float] | None = None,
        *,
        present: Present | None = None,
        features: Logits | None = None,
        fit: Sequence[str] = (),
        confidence: float = 0.95,
        ignore_index: int = -100,
    ) -> Self:
        """Make Theorem 2's conditions hold on clean data, held out if there is any, and keep them in ``state_dict``.

        Eq. 5: ``beta`` becomes, by Lemma 1, what makes each modality's mean weight that of the static rule, to 1e-6. No
        weight becomes negative by that on this data, as Theorem 1 needs them: where one would, ``alpha`` shrinks as far
        as it takes, with a warning that says how far. Eq. 6: a modality whose weights correlate positively with its
        loss is held at its static weight, with a warning. ``robust`` also fits its statistics, for which the data must
        be held out: those of logits that a head has fitted describe the training set alone. Noisy-or measures what
        entropy is typical, on such data too, and nothing else; of the other published rules there is nothing to
        calibrate. Calling it again starts from the uncalibrated layer, and ``reset_calibration`` restores that exactly.

        Weights that only act by their shares (``normalize``, fused probabilities) are compared as shares: with those
        that the static weights have among the modalities that are there; the mean of their sum stays. If one of them is
        held, all are.

        Args:
            logits: as ``forward`` takes them.
            target: int ``[*]``.
            static_weights: positive; a number or one per modality, in order or by name. With ``normalize`` they sum to
                1. Default: the same for all, at the mean of all weights (a plain mean of logits at the present scale);
                for ``robust`` its mean weights, as they are probabilities, not coefficients, and cannot be set.
            present: as ``forward`` takes it.
            features: as ``forward`` takes them; of modalities without, ``robust`` keeps what was gathered in training.
            fit: also ``"temperature"`` (each modality's, by its likelihood; Guo et al., ICML 2017) and ``"alpha"`` (one
                factor for all, by the fused likelihood under Eq. 5).
            confidence: from 0 to 1, of the test of Eq. 6 (``qmf_fusion.correlation_test``), which ``fusion_report``
                shares: with this probability no modality is held by chance alone.
            ignore_index: a target that does not count.

        Raises:
            TypeError, ValueError: arguments of the wrong kind, shape or range, static weights that cannot be met, a
                target that -inf rules out. For ``robust`` and noisy-or also data on which the heads are perfect: every
                one is right on every row, with a softmax of 0.99 and more. Held-out data has harder rows. Where any
                head is right on every row, for which held-out data may be easy enough, it warns. Fewer than 30 rows
                tell neither.

        Example:
            >>> logits = 3 * torch.randn(2, 500, 4, generator=torch.Generator().manual_seed(0))
            >>> fusion = QualityAwareFusion(2).calibrate(logits, logits.sum(0).argmax(-1), static_weights=0.6)
            >>> fusion(logits).weights.mean(1)
            tensor([0.6000, 0.6000])
        """
        if isinstance(fit, str) or not isinstance(fit, Iterable) or not set(fit) <= set(FITTABLE):
            raise ValueError(f"fit must hold some of {list(FITTABLE)}, got {fit!r}")
        check_confidence(confidence)
        if static_weights is not None:
            static_weights = own_coefficient(
                "static_weights", in_order("static_weights", static_weights, self.names), self.num_modalities
            )
        data = self.clean_data(logits, target, present, ignore_index, features)
        data.check_every_modality(self.names)
        fitted = data.fitted(self.names) if self.rule.takes_clean_statistics else []
        if fitted:
            warn_user(
                f"the heads of {fitted} are right on every row, as on data that they were trained on: statistics of "
                "such data describe no other; calibrate on held-out data"
            )
        before = copy.deepcopy(self.rule.state_dict())
        try:
            self.rule.reset_calibration()
            cut = self.rule.calibrate(data, static_weights, fit, confidence)
            if cut is not None and bool((cut < 1).any()):
                less = {name: round(c, 4) for name, c in zip(self.names, cut.tolist(), strict=True) if c < 1}
                warn_user(
                    f"alpha is multiplied by {less}: at these static weights some sample's weight would be negative. "
                    "Larger static weights leave more of it; nonnegative=True clamps those samples' weights instead"
                )
            held = [name for name, value in zip(self.names, self.calibration.held.tolist(), strict=True) if value]
            if held:
                warn_user(
                    f"the weights of {held} correlate positively with their loss (Eq. 6 fails at confidence "
                    f"{confidence}): held at their static weights"
                )
        except BaseException:
            self.rule.load_state_dict(before)
            raise
        return self

    def reset_calibration(self) -> Self:
        """Undo ``calibrate``, exactly; statistics gathered in training stay."""
        self.rule.reset_calibration()
        return self

    def get_extra_state(self) -> Tensor:
        """What the rest of the state belongs to, as text in bytes, for formats of files that hold tensors alone."""
        kind = self.rule.kind()
        if self.normalize_logits is not None:
            kind += f" of normalize_logits={self.normalize_logits}"
        # Names by number are those of any modalities.
        names = None if self.names == modality_names(len(self.names)) else self.names
        return torch.tensor(list(json.dumps([names, kind]).encode()), dtype=torch.uint8, device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse the state of other modalities, or of another kind of rule, whose numbers would mean something else."""
        if state.is_meta:
            return
        (names, kind), (own_names, own_kind) = (json.loads(bytes(x.tolist())) for x in (state, self.get_extra_state()))
        if None not in (names, own_names) and names != own_names:
            raise RuntimeError(f"state is of a fusion of the modalities {names}, and this one is of {own_names}")
        if kind != own_kind:
            raise RuntimeError(f"state is of another kind of fusion, {kind}, and this one is {own_kind}")

    def extra_repr(self) -> str:
        shown = [repr(list(self.names))]
        if self.normalize_logits is not None:
            shown.append(f"normalize_logits={self.normalize_logits}")
        return ", ".join(shown if self.class_dim == -1 else [*shown, f"class_dim={self.class_dim}"])


def _check_no_eq_9(options: AffineOptions, *, learnable: bool, temperature: Any, **given: Any) -> None:
    """Raise ValueError where something of Eq. 9 is asked for, beside a rule that has weights of its own."""
    asked = [name for name, value in given.items() if value is not None]
    asked += [] if isinstance(temperature, int | float) and temperature == 1 else ["temperature"]
    asked += ["learnable"] if learnable else []
    plain = AffineOptions()
    changed = [field for field in AffineOptions._fields if getattr(options, field) != getattr(plain, field)]
    asked += ["detach_weights" if field == "detach" else field for field in changed]
    if asked:
        raise ValueError(f"{asked[0]} is of Eq. 9 (combine='logits' or 'probabilities'), and goes with no other rule")


def check_fusion(fusion: Any) -> QualityAwareFusion:
    """``fusion``, or a TypeError where it is none."""
    if not isinstance(fusion, QualityAwareFusion):
        raise TypeError(f"fusion must be a QualityAwareFusion, got {type(fusion).__name__}")
    return fusion
