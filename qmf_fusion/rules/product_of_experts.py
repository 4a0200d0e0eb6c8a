"""Product of experts: modalities that are independent given the class (ProbEn; Chen et al., ECCV 2022)."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_prior
from ..precision import KeepsPrecision, without_autocast
from ..rows import Features, stack_rows
from ..rule import Rule, Weighed, ready_rule
from ..typicality import LARGEST
from ..uncertainty import entropy_uncertainty


def multiply_experts(x: Tensor, counted: Tensor, log_prior: Tensor | None = None) -> Tensor:
    """Log-probabilities ``[*, K]`` of a product of experts, 0 where no modality counts.

    ``p(y | x_1, ..., x_M)  ~  prod_m p(y | x_m) / p(y) ** (M - 1)``, where M counts the modalities that are there: one
    that is absent has exactly no part in Bayes' rule.

    Args:
        x: logits ``[M, *, K]``, finite.
        counted: bool ``[M, *]``.
        log_prior: ``log p(y)``, of a shape that broadcasts against ``[*, K]``; None for a uniform one.

    Example:
        >>> x = torch.tensor([[0.8, 0.2], [0.7, 0.3]]).log()
        >>> multiply_experts(x, torch.ones(2, dtype=torch.bool)).exp()
        tensor([0.9032, 0.0968])
    """
    log_probs = torch.log_softmax(x, -1)
    total = torch.where(counted.unsqueeze(-1), log_probs, 0).sum(0)
    if log_prior is not None:
        total = total - (counted.sum(0).unsqueeze(-1) - 1) * log_prior
    return torch.where(counted.any(0).unsqueeze(-1), torch.log_softmax(total, -1), 0)


class ProductOfExperts(KeepsPrecision, Rule):
    """Bayes' rule for modalities that are independent given the class: ProbEn, without a parameter.

    Fused logits are log-probabilities, exact whatever is missing if the heads' are. Independence is what breaks: two
    modalities that err alike count twice, and one that is sure of a wrong class has a veto, as nothing bounds its vote.
    Every modality that is there has weight 1. It trains by Eq. 18, and has nothing to calibrate.

    Args:
        num_modalities: M.
        prior: positive numbers ``[K]``, a sequence or a tensor, such as the classes' counts in the training set,
            divided by their sum here; by default uniform, as in the published code.

    A row with any value that is not finite is absent.

    Raises:
        TypeError, ValueError: a prior that is none of positive numbers; in use, other classes than its.

    Source: Chen, Shi, Ye, Mertz, Ramanan and Kong, *Multimodal Object Detection via Probabilistic Ensembling*, ECCV
    2022, of which this is the fusion of class scores: the fusion of boxes is left out, and so is its background class,
    which is one class more here. The product itself is Hinton's (*Training Products of Experts*, 2002).

    Example:
        >>> from qmf_fusion import QualityAwareFusion
        >>> fusion = QualityAwareFusion(2, combine=ProductOfExperts(2, prior=[0.9, 0.1]))
        >>> even = torch.zeros(1, 2)  # a head that knows the prior and says one half has seen evidence against it
        >>> fusion([even, even]).logits.exp()
        tensor([[0.1000, 0.9000]])
    """

    log_prior: Tensor | None
    gives_log_probabilities = True

    def __init__(self, num_modalities: int, prior: Sequence[float] | Tensor | None = None) -> None:
        super().__init__(num_modalities)
        if prior is None:
            self.register_buffer("log_prior", None)
            return
        log_prior = check_prior(prior)
        self.num_classes = len(log_prior)
        # In one row, so that it is not taken for a number per modality (see ``Rule``).
        self.register_buffer("log_prior", log_prior.unsqueeze(0))

    def kind(self) -> str:
        return f"{super().kind()}({'uniform' if self.log_prior is None else 'with a prior'})"

    def weigh(
        self, rows: list[Tensor], present: Tensor | None, features: Features | None = None, *, plain: bool = False
    ) -> Weighed:
        known, got = self.num_classes, rows[0].shape[-1]
        if known is not None and got != known:
            raise ValueError(f"logits must have the {known} classes of prior, got {got}")
        with without_autocast(rows[0].device):
            x, counted = stack_rows(rows, present)
            x = x.clamp(-LARGEST, LARGEST)  # of which sums and differences stay finite
            prior = None if self.log_prior is None else self.log_prior[0].to(x.dtype)
            return Weighed(x.unbind(0), counted, ready_rule(counted.to(x.dtype), multiply_experts(x, counted, prior)))

    def uncertainties(self, rows: list[Tensor], features: Features | None = None) -> Tensor:
        """The entropy over its maximum, which the constant weights do not look at."""
        x, counted = stack_rows(rows, None)
        return torch.where(counted, entropy_uncertainty(x), torch.nan)

    def extra_repr(self) -> str:
        return "" if self.log_prior is None else f"num_classes={self.num_classes}"
