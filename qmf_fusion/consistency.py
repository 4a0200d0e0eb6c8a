"""Terms of a training loss that hold the answers by all and by fewer modalities together, from logits alone.

With ``p_S`` the softmax of the fused logits by the modalities S:

* **confidence must not fall when a modality is added**: ``sum_m max(0, max_k p_(all but m) - max_k p_all)``, of Ma,
  Zhang, Zhang, Wu, Fu, Zhou and Hu, *Calibrating Multimodal Learning*, ICML 2023. They draw pairs of nested subsets;
  here each pair is all modalities and all but one.
* **the answers agree**: ``mean_m KL(p_all || p_(all but m))``, with ``p_all`` as a teacher that gets no gradient.

Beside ``QMFLoss``, in one line::

    loss = criterion(out, target, index).loss + consistency_terms(fusion, out).rise

docs/missing.md says what they brought on real sets before you pay for them: a fusion for each modality and step.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from .checks import Logits, Present, check_logits, check_present
from .fusion import Heads, QualityAwareFusion, check_fusion, parts_of


class ConsistencyTerms(NamedTuple):
    """Two scalars, means over the samples that have at least two modalities; 0 where there are none."""

    rise: Tensor
    """By how much confidence rises where a modality is taken away, summed over modalities: 0 to M."""
    disagreement: Tensor
    """Kullback-Leibler divergence of the answers by all but one modality from that by all, in nats."""


def consistency_terms(
    fusion: QualityAwareFusion, logits: Heads, present: Present | None = None, features: Logits | None = None
) -> ConsistencyTerms:
    """How far the fused answers of a batch by all modalities and by all but one are apart, differentiable.

    Args:
        fusion: any fusion of this package.
        logits: the heads' logits, ``[B, K]`` or ``[B, *, K]`` each, as ``fusion`` takes them.
        present: as ``fusion`` takes it; a modality that a sample lacks cannot be taken away from it.
        features: as ``fusion`` takes them.

    Raises:
        TypeError, ValueError: arguments of the wrong kind, count, shape, dtype or device, naming them.

    Example:
        >>> fusion = QualityAwareFusion(2, combine="probabilities", alpha=-1e-9, beta=1.0)
        >>> sure, unsure = torch.tensor([[4.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> terms = consistency_terms(fusion, [sure, unsure])  # the sure one alone is surer than both
        >>> [round(float(term), 3) for term in terms]
        [0.241, 0.302]
    """
    check_fusion(fusion)
    logits, present, features = parts_of(logits, present, features)
    rows, there = check_logits(logits, fusion.names, fusion.class_dim)
    shape, device = (len(rows), *rows[0].shape[:-1]), rows[0].device
    mask = check_present(present, there, shape, device, fusion.names)
    seen = fusion.check_features(features, rows)
    mask = torch.ones(shape, dtype=torch.bool, device=device) if mask is None else mask
    rows, num = fusion.prepare(rows), len(rows)
    full, _, energy = fusion.rule.fuse(rows, mask, seen)
    # Nothing is said of a sample whose modalities rule every class out between them.
    some = torch.isfinite(torch.logsumexp(full.detach(), -1))
    counted = (energy != torch.inf) & mask & some
    log_full = torch.log_softmax(torch.where(some.unsqueeze(-1), full, 0), -1)
    confidence, teacher = log_full.amax(-1).exp(), log_full.detach()
    rise, apart = full.new_zeros(shape[1:]), full.new_zeros(shape[1:])
    pairs = torch.zeros(shape[1:], dtype=torch.bool, device=device)
    for m in range(num):
        left = mask.clone()
        left[m] = False
        # Where the modality is not there to be taken away, or is the only one, the answer is left as it is.
        paired = counted[m] & (counted.sum(0) > 1)
        fused = fusion.rule.fuse(rows, torch.where(paired, left, mask), seen)[0]
        partial = torch.log_softmax(torch.where(some.unsqueeze(-1), fused, 0), -1)
        rise = rise + torch.where(paired, (partial.amax(-1).exp() - confidence).clamp(min=0), 0)
        # A class that all modalities rule out adds nothing, where 0 * inf would be NaN.
        divergence = torch.where(teacher > -torch.inf, teacher.exp() * (teacher - partial), 0).sum(-1)
        apart = apart + torch.where(paired, divergence / counted.sum(0).clamp(min=1), 0)
        pairs = pairs | paired
    count = pairs.sum().clamp(min=1)
    return ConsistencyTerms(rise.sum() / count, apart.sum() / count)
