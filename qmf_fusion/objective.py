"""The training objective (Eq. 18): every cross-entropy and the ranking loss, from the unimodal logits in one call."""

import math
from functools import partial
from typing import Self

import torch
from torch import Tensor

import qmf_kernels
from qmf_kernels import BACKENDS, LossRule

from .checks import Logits, Present, can_look, check_batch, check_choice, check_class_weight
from .divergence import RowWatch
from .functional import ObjectiveOutput, check_loss_rule
from .fusion import Heads, QualityAwareFusion, check_fusion, parts_of
from .general_objective import general_objective, labels_of
from .precision import KeepsPrecision, widened
from .ranking import TrajectoryRankingLoss
from .rule import Weighed
from .warn import warn_once

_NEEDS_SAMPLES = (
    "num_samples must be given, the size of the training set, where ranking_weight is not 0: the ranking compares each "
    "sample's past losses"
)


class QMFLoss(KeepsPrecision):
    """``CE(f, y) + sum_m CE(x[m], y) + lambda * ranking`` (Eq. 18), owning the trajectory that the ranking needs.

    It refers to the fusion, which the model owns: ``parameters()``, ``state_dict()`` and ``.to()`` are of trajectory
    and class weights alone, and a learnable fusion's parameters come from the model. In a copy of a module that holds
    both, the criterion refers to that copy's fusion; a copy of it alone comes with a fusion of its own.

    Args:
        fusion: the layer whose weights are to be trained; its options (uncertainty, normalisation, ...) hold here too.
        num_samples: N, the size of the training set. May be None where ``ranking_weight`` is 0: then no history is
            kept, and no index is looked at.
        ranking_weight: lambda, at least 0; 0 leaves the ranking out.
        form: see ``TrajectoryRankingLoss``, as for ``pairs``, ``rescale``, ``start_epoch``, ``sampling_count`` and
            ``update``, of which ``"before"`` takes the cross-entropies twice.
        weight: class weights ``[K]``, from 0 to 1e30, as in ``torch.nn.CrossEntropyLoss``, for every
            cross-entropy. Looked at here, wherever they lie, and not again at a step; kept in float64, whatever the
            module is cast to. None for a rule with a loss of its own.
        label_smoothing: the same.
        ignore_index: the same; but where nothing is left to average, or nothing of any weight, the loss is 0 without a
            gradient rather than NaN.
        return_logits: False leaves ``logits`` of the output empty: training needs no fused logits, and a GPU does not
            have to write them.
        backend: see ``functional.qmf_objective``.

    A rule may have its own loss in place of the cross-entropies, and more to add to it: TMC's is evidential, RCML also
    counts conflict (``qmf_fusion.rules``). ``fused_loss`` and ``unimodal_losses`` are then the rule's own losses, and
    what it adds is in ``loss`` alone, which is ``fused_loss + unimodal_losses.sum() + lambda * ranking_loss`` for other
    rules. Published rules other than QMF have no ranking: ``ranking_weight=0``.

    A modality that is absent counts in no loss, and a sample with none in none. Of one of which no row counts in a
    training step though some should, a warning says so once: its head has probably diverged. On a device, and in a
    compiled step, that shows when the criterion leaves training mode (``eval()``), or after some 1,000 steps.

    In dense prediction (``[B, *, K]``), a sample's weight and loss in the ranking are their means over its positions.
    The trajectory records plain cross-entropies, without class weights and smoothing.

    A criterion in evaluation mode learns nothing, as one whose fusion is in evaluation mode; where only one of the two
    is and gradients are on, a warning says so once.

    Raises:
        TypeError, ValueError: an argument out of the above, naming it.

    Example:
        >>> import torch
        >>> fusion = QualityAwareFusion(2)
        >>> criterion = QMFLoss(fusion, num_samples=100)
        >>> heads = [torch.randn(8, 5, requires_grad=True) for _ in range(2)]
        >>> out = criterion(heads, torch.arange(8) % 5, torch.arange(8))
        >>> out.loss.backward()
        >>> out.unimodal_losses.shape, out.logits.shape
        (torch.Size([2]), torch.Size([8, 5]))
    """

    weight: Tensor | None

    def __init__(
        self,
        fusion: QualityAwareFusion,
        num_samples: int | None = None,
        ranking_weight: float = 0.1,
        *,
        form: str = "paper",
        pairs: str = "adjacent",
        rescale: str | None = "minmax",
        start_epoch: int = 1,
        sampling_count: int | None = None,
        update: str = "after",
        weight: Tensor | None = None,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        return_logits: bool = True,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        check_fusion(fusion)
        check_choice("backend", backend, BACKENDS)
        if num_samples is None and ranking_weight:
            raise ValueError(_NEEDS_SAMPLES)
        # In a tuple, where nn.Module does not take it for a part of its own.
        self._fusion = (fusion,)
        self.ranking = TrajectoryRankingLoss(
            num_samples, fusion.num_modalities, form, pairs, rescale, start_epoch, sampling_count, update
        )
        self.ranking_weight, self.label_smoothing, self.ignore_index = ranking_weight, label_smoothing, ignore_index
        self.return_logits, self.backend = return_logits, backend
        self.watch = RowWatch(fusion.names)
        self._told: set[str] = set()
        check_class_weight(weight, once=True)
        if weight is not None and fusion.rule.row_loss() is not None:
            raise ValueError(
                f"weight must be None for the rule {type(fusion.rule).__name__}, whose own loss takes no class weights"
            )
        self.register_buffer("weight", None if weight is None else widened(weight))
        check_loss_rule(self._options())
        self.register_load_state_dict_post_hook(_after_load)

    @property
    def fusion(self) -> QualityAwareFusion:
        """The layer, which the model owns."""
        return self._fusion[0]

    def _options(self) -> LossRule:
        rank = self.ranking
        return LossRule(
            self.weight, self.label_smoothing, self.ignore_index, self.ranking_weight, rank.form, rank.pairs
        )

    def forward(
        self,
        logits: Heads,
        target: Tensor,
        index: Tensor | None = None,
        present: Present | None = None,
        features: Logits | None = None,
    ) -> ObjectiveOutput:
        """The objective of a batch, its fused logits laid out as the inputs are.

        Where criterion and fusion are in training mode and gradients are on, it is learned from: its unimodal losses
        are recorded, and the rule may observe it.

        Args:
            logits: what the model returned, a ``FusionOutput`` with all that is needed beside the target; or the M
                heads' logits, as ``QualityAwareFusion`` takes them, with a batch dimension.
            target: int ``[B, *]``, classes 0 to K - 1 or ``ignore_index``; or probabilities, floating point of the
                logits' shape, as ``torch.nn.CrossEntropyLoss`` takes them (``qmf_fusion.general_objective``): there
                ``ignore_index`` does not apply, and a rule that observes takes the likeliest class.
            index: int ``[B]``, the dataset index of each sample. May be None outside of training or where
                ``ranking_weight`` is 0: no ranking then, and nothing is recorded.
            present: bool ``[M]``, ``[M, B]`` or ``[M, *]``, or masks by name; False where a modality is absent.
            features: what the heads see, as ``QualityAwareFusion`` takes them.

        Raises:
            TypeError, ValueError, IndexError: arguments of the wrong kind, count, shape, dtype, device or range.
        """
        fusion, options = self.fusion, self._options()
        logits, present, features = parts_of(logits, present, features)
        rows, target, mask = check_batch(logits, target, present, fusion.names, fusion.class_dim, soft=True)
        seen = fusion.check_features(features, rows)
        self._check_devices(rows[0].device)
        if options.class_weight is not None and len(options.class_weight) != rows[0].shape[-1]:
            check_loss_rule(options, rows[0].shape[-1])
        training = self.training and fusion.training
        index = self._check_index(index, len(target), training)
        # Not under torch.no_grad, nor when reentrant checkpointing computes the first of its two times.
        learns = training and torch.is_grad_enabled()
        self._tell_of_modes(learns and features is None and fusion.rule.feature_widths is not None)
        rows = fusion.prepare(rows)
        weighed = fusion.rule.weigh(rows, mask, seen, plain=training)
        out = self._objective(weighed, target, index, learns)
        penalty = fusion.rule.penalty(weighed, target, self.ignore_index)
        if learns:
            classes, ignored = target, self.ignore_index
            if target.is_floating_point():
                classes, ignored = target.detach().argmax(-1), -100
            fusion.rule.observe(rows, classes, mask, ignored, seen)
            self._watch_rows(out.sample_losses, classes != ignored, mask, recorded=index is not None)
        # Spelled out: torch.compile takes no _replace in PyTorch 2.11, and no slices of a NamedTuple in 2.6.
        loss, fused_loss, unimodal_losses, ranking_loss, fused, weights, energy, sample_losses = out
        if penalty is not None:
            loss = loss + penalty
        if weighed.energy is not None:
            energy = weighed.energy
        if fusion.class_dim != -1 and self.return_logits:
            fused = fused.movedim(-1, fusion.class_dim)
        return ObjectiveOutput(loss, fused_loss, unimodal_losses, ranking_loss, fused, weights, energy, sample_losses)

    def _check_index(self, index: Tensor | None, batch: int, training: bool) -> Tensor | None:
        trajectory = self.ranking.trajectory
        if trajectory.num_samples == 0:
            if self.ranking_weight:
                raise ValueError(_NEEDS_SAMPLES)
            return None
        if index is not None:
            return trajectory.check_index(index, batch)
        if training and self.ranking_weight:
            raise ValueError(
                "index must be given in training: the dataset index of each sample, [B]; "
                "qmf_fusion.integrations.IndexedDataset adds it to any data set"
            )
        return None

    def _objective(self, weighed: Weighed, target: Tensor, index: Tensor | None, learns: bool) -> ObjectiveOutput:
        """Eq. 18, with the batch recorded if it ``learns``."""
        trajectory, row_loss = self.ranking.trajectory, self.fusion.rule.row_loss()
        general = target.is_floating_point() or row_loss is not None
        objective = qmf_kernels.objective
        if general:
            target, valid = labels_of(target, weighed.rows[0].shape[-1], self.ignore_index)
            objective = partial(general_objective, valid=valid, row_loss=row_loss)
        parts = weighed.present, weighed.weights, self._options()
        if index is None:
            return objective(weighed.rows, target, None, *parts, backend=self.backend, return_logits=self.return_logits)
        first, rescale, ranks = self.ranking.update == "before", self.ranking.rescale, bool(self.ranking_weight)
        # The operators record after they rank, and every visit; all else is recorded here.
        apart = first or trajectory.sampling_count is not None or general
        if learns and first:
            with torch.no_grad():
                before = objective(weighed.rows, target, None, *parts, backend=self.backend, return_logits=False)
            trajectory.record_checked(before.sample_losses, index)
        if general:
            kappa = trajectory.kappa_checked(index, rescale) if ranks else None
            out = objective(weighed.rows, target, kappa, *parts, backend=self.backend, return_logits=self.return_logits)
        else:
            past = trajectory.past(index, rescale, ranks=ranks, records=learns and not apart)
            out = qmf_kernels.objective(
                weighed.rows, target, None, *parts, past=past, backend=self.backend, return_logits=self.return_logits
            )
        if learns and apart and not first:
            trajectory.record_checked(out.sample_losses.detach(), index)
        return out

    def _tell_of_modes(self, lacks_features: bool) -> None:
        """Warn once where the criterion and its fusion disagree in their mode, and of features that are not given."""
        if torch.compiler.is_compiling():
            return
        if lacks_features:
            warn_once(
                self._told,
                "features are not given, though the rule has widths for some: it learns what is typical of the logits "
                "alone. Pass the model's whole output, or features=out.features",
            )
        if self.training != self.fusion.training and torch.is_grad_enabled():
            modes = {True: "training", False: "evaluation"}
            warn_once(
                self._told,
                f"the criterion is in {modes[self.training]} mode and its fusion in {modes[self.fusion.training]} "
                "mode, with gradients on: nothing is recorded or learned from this batch. Call criterion.train() and "
                "criterion.eval() beside the model's, and validate under torch.no_grad()",
            )

    def _watch_rows(self, losses: Tensor, valid: Tensor, mask: Tensor | None, *, recorded: bool) -> None:
        """Warn where none of a modality's losses ``[M, B]`` is one though some should be: of ``valid`` targets."""
        if not torch.compiler.is_compiling():
            self.watch.steps += 1
        wanted = None
        if can_look(losses) and math.isnan(losses.sum().item()):
            valid = valid.view(len(valid), -1)
            if mask is not None:
                valid = mask.view(*mask.shape[:2], -1) & valid
            rows = valid.any(-1).expand(losses.shape)
            self.watch.see(~losses.isnan(), rows, sure=mask is not None)
            wanted = rows.any(1).tolist()
        if recorded:
            self.watch.count_step(self.ranking.trajectory, wanted)

    def train(self, mode: bool = True) -> Self:
        """Leaving training mode looks for modalities that no longer count, and warns of them once."""
        if self.training and not mode:
            self.watch.look(self.ranking.trajectory)
        return super().train(mode)

    def _check_devices(self, device: torch.device) -> None:
        own, of_fusion = self.ranking.trajectory.history.device, self.fusion.calibration.held.device
        if own != of_fusion:
            raise ValueError(
                f"criterion must be on its fusion's device {of_fusion}, got {own}: move both, it owns no fusion"
            )
        if own != device:
            raise ValueError(f"logits must be on the device of criterion and fusion, {own}, got {device}")

    def extra_repr(self) -> str:
        return f"ranking_weight={self.ranking_weight}, label_smoothing={self.label_smoothing}"


def _after_load(criterion: QMFLoss, _: object) -> None:
    """What the loaded history holds is no gain."""
    criterion.watch.forget(criterion.ranking.trajectory)
