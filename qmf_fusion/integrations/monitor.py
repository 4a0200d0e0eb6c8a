"""What a fusion does over an epoch: how it weighs each modality, whether rightly, and what was missing or broken."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from qmf_kernels.eager.plain import is_transformed

from ..correlation import WeightLossCorrelation
from ..fusion import FusionOutput, QualityAwareFusion
from ..objective import QMFLoss
from ..processes import sum_over_processes

ROWS, PRESENT, COUNTED, WEIGHT, DOUBTED = range(5)


class FusionMonitor:
    """Watch a fusion and its criterion, batch by batch, without waiting for a device, until ``compute``.

    Training and evaluation are kept apart, by the mode of the fusion and of the criterion. What a compiled step does,
    or one inside of ``torch.func``'s transforms, is not seen. Of each modality:

    - ``weight``: the mean weight, where the modality counts; for ``robust``, P(clean);
    - ``r``: Pearson's correlation of weight and unimodal loss (Eq. 6), as the criterion sees them: below 0 is right;
    - ``absent``: the share of rows without it;
    - ``broken``: the share of all rows that have it, but with logits or features that are not finite;
    - ``p_clean_below_half``: the share of rows, of those that count, in which the rule takes it for broken rather than
      clean; for a rule whose weights are P(clean).

    Args:
        criterion: whose fusion is watched too.

    Example:
        >>> from qmf_fusion import FusionModel
        >>> model = FusionModel({"rgb": nn.Linear(8, 3), "depth": nn.Linear(4, 3)})
        >>> criterion = QMFLoss(model.fusion, num_samples=6)
        >>> with FusionMonitor(criterion) as monitor:
        ...     out = model({"rgb": torch.randn(6, 8), "depth": None})
        ...     loss = criterion(out, torch.arange(6) % 3, torch.arange(6)).loss
        ...     found = monitor.compute()
        >>> found["absent/rgb"], found["absent/depth"], sorted(found)[-1]
        (0.0, 1.0, 'weight/rgb')
    """

    def __init__(self, criterion: QMFLoss) -> None:
        self.criterion, self.fusion = criterion, criterion.fusion
        self._handles: list[Any] = []
        self._sums: dict[bool, Tensor] = {}
        self._correlations: dict[bool, WeightLossCorrelation] = {}

    def attach(self) -> Self:
        """Start to watch."""
        self.detach()
        self._handles = [
            self.fusion.register_forward_hook(self._see_fusion),
            self.criterion.register_forward_hook(self._see_losses),
        ]
        return self

    def detach(self) -> None:
        """Stop; what was seen stays."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def __enter__(self) -> Self:
        return self.attach()

    def __exit__(self, *_: object) -> None:
        self.detach()

    @torch.no_grad()
    def compute(self, training: bool = True) -> dict[str, float]:
        """Since the last time, in all processes together: by ``"<what>/<modality>"``; what was never seen is left out.

        Where ``torch.distributed`` is initialised, every process calls it. It waits for the device.
        """
        (sums,) = sum_over_processes([self._sums.pop(training, self._no_sums())])
        found = self._correlations.pop(training, self._no_correlation()).compute()
        shares = {
            "weight": (WEIGHT, COUNTED),
            "absent": (PRESENT, ROWS),
            "broken": (COUNTED, PRESENT),
            "p_clean_below_half": (DOUBTED, COUNTED),
        }
        if not self.fusion.rule.gives_p_clean:
            del shares["p_clean_below_half"]
        said = {}
        for name, row, n, r in zip(
            self.fusion.names, sums.tolist(), found.samples.tolist(), found.pearson.tolist(), strict=True
        ):
            for what, (part, whole) in shares.items():
                if not row[whole]:
                    continue
                if what in ("absent", "broken"):
                    said[f"{what}/{name}"] = (row[whole] - row[part]) / row[ROWS]
                else:
                    said[f"{what}/{name}"] = row[part] / row[whole]
            if n > 1:
                said[f"r/{name}"] = r
        return said

    @torch.no_grad()
    def _see_fusion(self, fusion: nn.Module, _: Any, out: FusionOutput) -> None:
        if torch.compiler.is_compiling() or is_transformed():
            return
        weights, counted = out.weights.detach().flatten(1), (out.energy < torch.inf).flatten(1)
        present = torch.ones_like(counted) if out.present is None else out.present.flatten(1)
        kinds: Sequence[Tensor] = [
            torch.ones_like(counted),
            present,
            counted,
            torch.where(counted, weights, 0),
            counted & (weights < 0.5),
        ]
        before = self._sums.get(fusion.training)
        sums = torch.stack([kind.sum(1, dtype=self._no_sums().dtype) for kind in kinds], 1)
        self._sums[fusion.training] = sums if before is None else before + sums

    @torch.no_grad()
    def _see_losses(self, criterion: nn.Module, _: Any, out: Any) -> None:
        if torch.compiler.is_compiling() or is_transformed():
            return
        correlation = self._correlations.setdefault(criterion.training, self._no_correlation())
        correlation.update(out.weights.detach().flatten(2).mean(2) if out.weights.dim() > 2 else out.weights.detach(),
                           out.sample_losses.detach())  # fmt: skip

    @property
    def _like(self) -> Tensor:
        """A tensor of the criterion's device, and of what it counts in."""
        return self.criterion.ranking.trajectory.low

    def _no_sums(self) -> Tensor:
        return self._like.new_zeros(len(self.fusion.names), 5)

    def _no_correlation(self) -> WeightLossCorrelation:
        return WeightLossCorrelation(len(self.fusion.names)).to(self._like.device)


def criteria_of(module: nn.Module) -> list[QMFLoss]:
    """Every criterion that a module holds; a ValueError where it holds none, or one of a fusion that is not in it."""
    modules = list(module.modules())
    found = [part for part in modules if isinstance(part, QMFLoss)]
    if not found:
        raise ValueError(
            f"{type(module).__name__} must hold a QMFLoss as a submodule, self.criterion = QMFLoss(...), got none"
        )
    fusions = [part for part in modules if isinstance(part, QualityAwareFusion)]
    if any(all(criterion.fusion is not fusion for fusion in fusions) for criterion in found):
        raise ValueError(
            f"{type(module).__name__}'s criterion must be of a fusion that is in it too, got one of another: "
            "QMFLoss(self.model.fusion, ...)"
        )
    return found
