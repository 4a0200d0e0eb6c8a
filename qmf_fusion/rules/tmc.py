"""TMC: each modality's logits are evidence, combined by Dempster's rule (Han et al., ICLR 2021 and TPAMI 2022)."""

import torch
from torch import Tensor

from ..checks import check_integer
from ..evidential import evidential, evidential_loss
from ..general_objective import RowLoss
from ..precision import without_autocast
from ..rows import Features, stack_rows
from ..rule import Rule, Weighed, ready_rule

ANNEALING_STEPS = 400
"""50 epochs of 8 steps, as published for the Handwritten set."""


def combine_evidence(rows: Tensor) -> Tensor:
    """What Dempster's rule (definition 4) makes of M modalities' evidence: ``log(1 + e)``, ``[*, K]`` of ``[M, *, K]``.

    With ``b = e / S`` and ``u = K / S``, the combined evidence of two is ``e1 + e2 + e1 * e2 / K``: the conflict
    cancels. So of M it is ``K * (prod_m (1 + e_m / K) - 1)``, which is computed here by its logarithm, as a product of
    many overflows. No evidence, ``e = 0``, changes nothing: a modality that is absent says no more than that.

    Example:
        >>> evidence = torch.tensor([[2.0, 0.0], [4.0, 1.0]])
        >>> torch.expm1(combine_evidence(torch.log1p(evidence)))
        tensor([10.0000,  1.0000])
    """
    classes = rows.shape[-1]
    # log(1 + e / K) = z + log((1 + (K - 1) exp(-z)) / K), of e = exp(z) - 1, which may overflow
    product = (rows + torch.log1p((classes - 1) * torch.exp(-rows)) - torch.log1p(rows.new_tensor(classes - 1.0))).sum(
        0
    )
    return product + torch.log1p((classes - 1) * -torch.expm1(-product))


def vacuity(rows: Tensor) -> Tensor:
    """``u = K / sum_k (1 + e_k)`` (Eq. 3), in (0, 1], ``[*]`` of ``log(1 + e)`` ``[*, K]``."""
    return rows.shape[-1] * torch.exp(-torch.logsumexp(rows, -1))


class TMC(Rule):
    """Trusted multi-view classification: evidence ``softplus(x)``, combined by Dempster's rule, and its own loss.

    Fused logits are ``log(1 + e)`` of the combined evidence, whose softmax is the Dirichlet's mean. A modality's weight
    is its belief mass ``1 - u`` (what the QMF paper's Table 3 and Figure 3 correlate with the loss as "evidence"): it
    says how much it has to say and multiplies nothing. Every cross-entropy of ``QMFLoss`` becomes the evidential loss.

    An absent modality has no evidence; a row with any value that is not finite is absent.

    Args:
        num_modalities: M.
        annealing_steps: over how many steps the loss's divergence comes in, at least 1. A step is a call of ``QMFLoss``
            in training with gradients on, each of accumulated batches too.

    Raises:
        TypeError, ValueError: ``annealing_steps`` is no whole number, or below 1.

    Source: Han, Zhang, Fu and Zhou, *Trusted Multi-View Classification*, ICLR 2021 (Eq. 3 to 7, definition 4) and
    *Trusted Multi-View Classification with Dynamic Evidential Fusion*, TPAMI 2022, whose pseudo-view is one more
    modality here: a head on all features side by side.

    Example:
        >>> from qmf_fusion import QualityAwareFusion
        >>> fusion = QualityAwareFusion(["rgb", "depth"], combine="tmc")
        >>> out = fusion({"rgb": torch.tensor([[4.0, -4.0]]), "depth": torch.tensor([[0.0, 0.0]])})
        >>> out.weights
        tensor([[0.6687],
                [0.4094]])
        >>> out.logits.softmax(-1)
        tensor([[0.8053, 0.1947]])
    """

    steps: Tensor

    def __init__(self, num_modalities: int, annealing_steps: int = ANNEALING_STEPS) -> None:
        super().__init__(num_modalities)
        self.annealing_steps = check_integer("annealing_steps", annealing_steps)
        if annealing_steps < 1:
            raise ValueError(f"annealing_steps must be at least 1, got {annealing_steps}")
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64, device="cpu"))

    @property
    def judged_by(self) -> str:
        return "what is measured: Theorem 1 is about weighted averages of logits, and evidence is not averaged"

    def combine(self, rows: Tensor, counted: Tensor) -> Tensor:
        """``log(1 + e)`` of the fused evidence ``[*, K]``, of ``[M, *, K]``, 0 where not ``counted`` ``[M, *]``."""
        return combine_evidence(rows)

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        with without_autocast(rows[0].device):
            x, counted = stack_rows(rows, present)
            z = torch.where(counted.unsqueeze(-1), evidential(x), 0)
            weights = torch.where(counted, 1 - vacuity(z), 0)
            energy = torch.where(counted, -torch.logsumexp(x, -1), torch.inf)
            return Weighed(z.unbind(0), counted, ready_rule(weights, self.combine(z, counted)), energy)

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """The vacuity u."""
        x, counted = stack_rows(rows, None)
        return torch.where(counted, vacuity(evidential(x)), torch.nan)

    def likelihood(self, rows: Tensor) -> Tensor:
        return evidential(rows)

    def annealing(self) -> Tensor:
        """How much of the divergence counts by now, from 0 to 1."""
        # As the largest of equal numbers: of a mere quotient, torch.compile saves the steps instead and divides them
        # again in the backward pass, when ``observe`` has counted on.
        return (self.steps / self.annealing_steps).clamp_max(1).expand(64).amax()

    def extra_repr(self) -> str:
        return f"annealing_steps={self.annealing_steps}"

    def row_loss(self) -> RowLoss:
        annealing = self.annealing()
        return lambda rows, label: evidential_loss(rows, label, annealing)

    @torch.no_grad()
    def observe(
        self,
        rows: list[Tensor],
        target: Tensor,
        present: Tensor | None,
        ignore_index: int,
        features: Features | None = None,
    ) -> None:
        """Count the step."""
        self.steps.add_(1)
