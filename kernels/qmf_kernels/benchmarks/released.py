"""The objective as the paper's published training code computes it, in eager PyTorch and NumPy: what ours is timed
against. Its steps, their order and its trips to the host are kept (per modality: four from the device, two back); the
words are ours.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

try:
    import numpy as np
    import numpy.typing
except ImportError as error:
    raise ImportError("the released formulation needs NumPy: pip install 'qmf-fusion[examples]'") from error


class LossHistory:
    """One modality's summed losses per training sample, in the host's memory."""

    def __init__(self, num_samples: int) -> None:
        self.sums: np.typing.NDArray[np.float64] = np.random.default_rng(0).random(num_samples)

    def update(self, index: Tensor, losses: Tensor) -> None:
        losses = losses.cpu()
        self.sums[index.cpu().numpy()] += (losses.float() if losses.dtype == torch.bfloat16 else losses).numpy()

    def scaled(self, index: Tensor) -> np.typing.NDArray[np.float64]:
        """The samples' sums, min-max scaled over all samples."""
        values = self.sums[index.cpu().numpy()]
        least, most = self.sums.min(), float(self.sums.max())
        return np.asarray((values - least) / (most - least))

    def compare(self, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        """Which of each pair has the larger history (1, 0 or -1), and by how much."""
        a, b = self.scaled(first), self.scaled(second)
        sign = np.array(a > b, dtype="float") - np.array(a < b, dtype="float")
        margin = torch.from_numpy(abs(a - b)).float()
        return torch.from_numpy(sign).float().to(first.device), margin.to(first.device)


def ranking_loss(weight: Tensor, index: Tensor, history: LossHistory) -> Tensor:
    """Adjacent pairs around the batch; the target's sign is flipped, the margin's is not."""
    sign, margin = history.compare(index, torch.roll(index, -1))
    divisor = sign.clone()
    divisor[divisor == 0] = 1
    neighbour = torch.roll(weight, -1) + (margin / divisor).reshape(-1, 1)
    loss: Tensor = nn.MarginRankingLoss(margin=0.0)(weight, neighbour, -sign.reshape(-1, 1))
    return loss


def released_objective(
    logits: Sequence[Tensor],
    target: Tensor,
    index: Tensor,
    histories: Sequence[LossHistory],
    ranking_weight: float = 0.1,
) -> Tensor:
    """The loss of a batch, M of ``[B, K]``, ``[B]`` and ``[B]``; its unimodal losses go into the histories."""
    weights = []
    for x in logits:
        energy = torch.logsumexp(x, dim=1)
        weights.append(torch.reshape(0.1 * energy, (-1, 1)))
    fused = sum(x * w for x, w in zip(logits, weights, strict=True))
    loss = nn.CrossEntropyLoss()(fused, target) + sum(nn.CrossEntropyLoss()(x, target) for x in logits)
    ranking: Tensor | float = 0.0
    for x, weight, history in zip(logits, weights, histories, strict=True):
        sample_losses = nn.CrossEntropyLoss(reduction="none")(x, target).detach()
        ranking = ranking + ranking_loss(weight, index, history)
        history.update(index, sample_losses)
    return torch.as_tensor(loss + ranking_weight * ranking)
