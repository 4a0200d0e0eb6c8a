"""LogitNorm (Wei et al., ICML 2022): rows of logits divided by their Euclidean norm times a temperature."""

import torch
from torch import Tensor


def normalize_rows(rows: list[Tensor], temperature: float | None) -> list[Tensor]:
    """M of ``[*, K]``, normalised each; None leaves them as they are."""
    return rows if temperature is None else [normalize_logits(x, temperature) for x in rows]


def normalize_logits(logits: Tensor, temperature: float) -> Tensor:
    """``x / (temperature * |x|)`` over the classes; NaN where a row is not finite throughout. A row of zeros stays one.

    Of ``[*, K]``, floating point, with a positive temperature; in float32, or float64 if the logits are. A second time
    it changes nothing.

    Example:
        >>> normalize_logits(torch.tensor([3.0, 4.0]), 0.1)
        tensor([6., 8.])
    """
    x = logits if logits.dtype == torch.float64 else logits.float()
    finite = torch.isfinite(x).all(-1, keepdim=True)
    x = torch.where(finite, x, 0)
    # Of a row whose largest value is 1, as a row's own squares may be out of the dtype's range.
    largest = x.detach().abs().amax(-1, keepdim=True)
    x = x / torch.where(largest == 0, 1, largest.clamp_min(torch.finfo(x.dtype).tiny))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return torch.where(finite, x / (temperature * torch.where(norm > 0, norm, 1)), torch.nan)
