"""How far modalities contradict each other, sample by sample: RCML's degree of conflict, as a diagnostic."""

import torch
from torch import Tensor

from .checks import Present, check_logits, check_present
from .fusion import Heads, QualityAwareFusion, check_fusion, parts_of
from .rules import TMC
from .rules.rcml import conflict


def degree_of_conflict(fusion: QualityAwareFusion, logits: Heads, present: Present | None = None) -> Tensor:
    """Of each sample, what RCML's loss holds against it (definition 4 of Xu et al., AAAI 2024).

    The sum over pairs of modalities that are there, by one less than their number: of two from 0 to 2, of M to M.

    Args:
        fusion: of the rule ``"rcml"``, or ``"tmc"``, whose heads give evidence too.
        logits: as ``fusion`` takes them: the heads' logits, or the model's whole output.
        present: bool ``[M]``, ``[M, B]`` or ``[M, *]``, or masks by name; False where a modality is absent.

    Returns:
        ``[*]``, float32, or float64 if any input is; 0 where fewer than two modalities are there. Differentiable.

    Raises:
        TypeError, ValueError: a fusion of another rule, and what ``QualityAwareFusion`` raises.

    Example:
        >>> fusion = QualityAwareFusion(["rgb", "depth"], combine="rcml")
        >>> rgb, depth = torch.tensor([[9.0, -9.0], [9.0, -9.0]]), torch.tensor([[-9.0, 9.0], [9.0, -9.0]])
        >>> degree_of_conflict(fusion, {"rgb": rgb, "depth": depth})
        tensor([1.0954, 0.0000])
    """
    rule = check_fusion(fusion).rule
    if not isinstance(rule, TMC):
        raise ValueError(
            f"fusion must be of the rule rcml or tmc, whose logits are evidence, got {type(rule).__name__}"
        )
    logits, present, _ = parts_of(logits, present, None)
    rows, there = check_logits(logits, fusion.names, fusion.class_dim)
    mask = check_present(present, there, (len(rows), *rows[0].shape[:-1]), rows[0].device, fusion.names)
    weighed = rule.weigh(fusion.prepare(rows), mask)
    assert weighed.present is not None
    return conflict(torch.stack(list(weighed.rows)), weighed.present)
