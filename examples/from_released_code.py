"""The ranking loss and the objective exactly as the code published with the paper computes them, on this package.

For those who have its ``rank_loss`` and ``History`` in a project and want the same numbers before they change
anything: ``python examples/from_released_code.py`` trains two heads on random data. docs/from-released-code.md says
which lines of theirs go, and which option is which variant. Copy what you need.
"""

import argparse
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from qmf_fusion import LossTrajectory
from qmf_fusion.functional import ObjectiveOutput, qmf_objective


class SummedLosses(nn.Module):
    """The released ``History`` of all modalities: sums of losses, in ``state_dict`` and on the model's device."""

    def __init__(self, num_samples: int, num_modalities: int) -> None:
        super().__init__()
        self.register_buffer("sums", torch.zeros(num_modalities, num_samples, dtype=torch.float64))

    def kappa(self, index: Tensor) -> Tensor:
        """``[M, B]``, scaled to [0, 1] over all N samples, of which those not yet seen stand at 0."""
        low, high = self.sums.amin(1, keepdim=True), self.sums.amax(1, keepdim=True)
        # 0 / 0 while nothing is recorded: NaN, which counts in no pair. Theirs makes the loss NaN, and no gradient.
        return (self.sums[:, index] - low) / (high - low)

    def record(self, losses: Tensor, index: Tensor) -> None:
        """Add ``[M, B]``; of a sample that stands in the batch twice once, as NumPy does."""
        self.sums[:, index] = self.sums[:, index] + losses.detach().double()


def released_objective(
    logits: Sequence[Tensor],
    target: Tensor,
    index: Tensor,
    history: SummedLosses,
    *,
    ranking_weight: float = 0.1,
    detach_weights: bool = False,
    record_first: bool = False,
) -> ObjectiveOutput:
    """One training step's objective. As it stands, that of the RGB-D code.

    The text-image code's: ``ranking_weight=1.0, detach_weights=True, record_first=True``.
    """
    options = {"form": "released", "ranking_weight": ranking_weight, "detach_weights": detach_weights}
    if record_first:
        losses = [nn.functional.cross_entropy(x, target, reduction="none") for x in logits]
        history.record(torch.stack(losses), index)
    out = qmf_objective(logits, target, history.kappa(index), **options)
    if not record_first:
        history.record(out.sample_losses, index)
    return out


def main(arguments: Sequence[str] | None = None) -> float:
    """Train on random data, then hand the history on to this package's own; returns the last loss."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    torch.manual_seed(options.seed)
    num, classes, widths = 64, 5, (12, 8)
    target = torch.randint(classes, (num,))
    inputs = [torch.randn(num, width) + nn.functional.one_hot(target, width) for width in widths]
    heads = nn.ModuleList(nn.Linear(width, classes) for width in widths)
    history = SummedLosses(num, len(widths))
    optimizer = torch.optim.Adam(heads.parameters(), lr=1e-2)
    for epoch in range(options.epochs):
        for index in torch.randperm(num).split(16):
            logits = [head(x[index]) for head, x in zip(heads, inputs, strict=True)]
            out = released_objective(logits, target[index], index, history)
            optimizer.zero_grad()
            out.loss.backward()
            optimizer.step()
        print(f"epoch {epoch + 1}: loss {out.loss.item():.4f}, of which ranking {out.ranking_loss.item():.4f}")
    trajectory = LossTrajectory(num, len(widths))
    trajectory.load_sums(history.sums, visits=options.epochs)
    print(f"mean loss by modality: {(trajectory.total / trajectory.count).mean(1).tolist()}")
    return out.loss.item()


if __name__ == "__main__":
    main()
