"""Whether a training has diverged: no logits of a modality finite over an epoch, no finite loss, or broken weights."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import CommandError
from .learners import Answer, Learner, trajectories


class DivergenceWatch:
    """Counts over an epoch what can be counted on. Fusion takes logits that are not finite for an absent modality, so
    that a loss alone does not show heads that have broken for good.

    Nothing waits for the device before ``problem`` is called.
    """

    def __init__(self) -> None:
        self._counts: Tensor | int = 0
        self._modalities = 0

    @torch.no_grad()
    def add(self, answer: Answer, loss: Tensor | None = None) -> None:
        """Count a batch: of each modality's logits, and of the scores, the finite rows and those there are."""
        scores, num = answer.scores, len(answer.scores)
        self._modalities = len(answer.unimodal_logits)
        # Scores may be logarithms of probabilities that are 0, so -inf is none of a broken row; NaN and +inf are.
        finite, expected = [scores.logsumexp(-1).isfinite().sum()[None]], [scores.new_tensor([num], dtype=torch.int64)]
        if answer.unimodal_logits:
            rows = torch.stack(answer.unimodal_logits).isfinite().all(-1)
            there = torch.ones_like(rows) if answer.present is None else answer.present
            finite.append((rows & there).sum(1))
            expected.append(there.sum(1))
        if loss is not None:
            finite.append(loss.isfinite().long()[None])
            expected.append(torch.ones_like(finite[-1]))
        self._counts = self._counts + torch.stack([torch.cat(finite), torch.cat(expected)])

    def problem(self, learner: Learner, total: Callable[[Tensor], Tensor] = lambda x: x) -> str | None:
        """What is broken for good, in words, or None; and begin to count anew.

        Args:
            learner: whose answers were counted.
            total: the sum of a tensor over all processes that work together.
        """
        if isinstance(self._counts, int):
            return None
        broken = weights_not_finite(learner)
        own = self._counts.new_tensor([[int(bool(broken))], [0]])
        (anywhere, _), (scored, scores), *counts = total(torch.cat([own, self._counts], 1)).T.tolist()
        self._counts = 0
        modalities = counts[: self._modalities]
        steady, steps = counts[self._modalities] if counts[self._modalities :] else (0, 0)
        names = list(learner.encoders) if len(learner.encoders) == len(modalities) else list(range(len(modalities)))
        dead = [f"{name} (0 of {n})" for name, (finite, n) in zip(names, modalities, strict=True) if n and not finite]
        if dead:
            return f"logits are finite for no sample of {', '.join(dead)}"
        if scores and not scored:
            return f"the fused scores are finite for none of {scores} samples"
        if steps and not steady:
            return f"the loss is finite in none of {steps} steps"
        return f"weights are not finite: {broken or 'in another process'}" if anywhere else None


def diverged(run: str, epoch: int, problem: str, learning_rate: float) -> CommandError:
    """The error that ends a training."""
    return CommandError(
        f"{run}: the training has diverged in epoch {epoch}: {problem}; look at the learning rate "
        f"({learning_rate:g}), the precision and the values of the inputs"
    )


def check_probabilities(probabilities: Tensor, run: str) -> None:
    """Whether a test can go by these probabilities ``[B, K]``: NaN would count as the first class, without a word.

    Raises:
        CommandError: some are not finite.
    """
    broken = int((~probabilities.isfinite().all(-1)).sum())
    if broken:
        raise CommandError(
            f"{run}: the scores of {broken} of {len(probabilities)} test samples are not finite: the training has "
            "diverged, or the inputs are far from those that it saw"
        )


def weights_not_finite(learner: Learner) -> str | None:
    """The names of the weights and statistics that hold a value which is not finite; None where there is none."""
    # A trajectory has seen nothing of some samples, and says so with an infinity.
    histories = tuple(f"{name}." for name in trajectories(learner))
    state = {name: x for name, x in learner.state_dict().items() if not (histories and name.startswith(histories))}
    floating = {name: x for name, x in state.items() if x.is_floating_point()}
    finite = torch.stack([x.isfinite().all() for x in floating.values()]).tolist() if floating else []
    return shortened([name for name, good in zip(floating, finite, strict=True) if not good]) or None


def shortened(names: Sequence[str], most: int = 2) -> str:
    """The first names, and how many more there are.

    Example:
        >>> shortened(["a", "b", "c"])
        'a, b and 1 more'
    """
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
