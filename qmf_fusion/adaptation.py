"""Adapting a fusion's few numbers while it runs, without labels, to which modality can be relied on now.

After READ (Yang et al., *Test-time Adaptation against Multi-modal Reliability Bias*, ICLR 2024), which adapts the
attention that fuses two modalities. Here there is no attention: what moves is one factor per modality on the weights
(alpha and beta of Eq. 9), one on its temperature, or one on its odds (``robust``). The heads are neither changed nor
run again.

docs/adaptation.md says what it brought on real data, and where it did harm, before you pay for it.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call

from .checks import Logits, Present, check_number
from .fusion import FusionOutput, Heads, QualityAwareFusion, check_fusion, parts_of
from .precision import KeepsPrecision


def adaptation_loss(fused: Tensor, counted: Tensor, balance: float = 1.0) -> Tensor:
    """READ's self-adaptive loss of a batch of fused logits, a scalar.

    ``mean_i -p_i log p_i + balance * sum_k q_k log q_k`` with ``p_i`` the largest probability of sample i and q the
    mean of all samples' probabilities. The first falls with confidence, the faster the larger ``p_i`` is, and below
    1/e it rises: samples without an opinion pull the least, or the other way. The second keeps the answers from
    becoming all the same, by the assumption that a batch holds every class equally often. (The published code takes
    for q the softmax of the probabilities' sum instead of their mean.)

    Args:
        fused: ``[*, K]``; -inf rules a class out.
        counted: bool ``[*]``, which samples count. The loss is 0 where none does.
        balance: what the second term counts.

    Example:
        >>> sure = torch.tensor([[9.0, 0.0], [0.0, 9.0]])
        >>> both, one = (adaptation_loss(x, torch.ones(2, dtype=torch.bool)) for x in (sure, sure[:1].expand(2, 2)))
        >>> bool(both < one)  # balanced answers are better than sure ones of one class
        True
    """
    log_probs = torch.log_softmax(torch.where(counted.unsqueeze(-1), fused, 0), -1)
    top = log_probs.amax(-1)
    num = counted.sum().clamp(min=1)
    confidence = torch.where(counted, -top.exp() * top, 0).sum() / num
    probs = torch.where(counted.unsqueeze(-1), log_probs.exp(), 0)
    mean = probs.reshape(-1, probs.shape[-1]).sum(0) / num
    smallest = torch.finfo(mean.dtype).tiny  # where no sample has a class, it adds 0, and no gradient of infinity
    return confidence + balance * (mean * mean.clamp_min(smallest).log()).sum()


class TestTimeAdaptation(KeepsPrecision):
    """Follow the stream of a fusion's inputs with its few numbers, by one step of gradient descent a batch.

    ``step`` learns from a batch and answers it; ``forward`` answers without learning. The fusion itself stays as it is
    calibrated: all that is learned is ``log_factors``, which multiply its numbers in the calls of this module, and are
    all that is in ``state_dict``, beside the fusion's names and kind, as no other's state loads. So signs hold
    (``alpha < 0``, ``T > 0``, odds above 0), and ``reset`` is exact.

    For each number the logarithms of the modalities' factors sum to 0: what moves is which modality is relied on, not
    how much all are, by which confidence alone would rise. One that calibration holds does not move. Samples with
    fewer than two modalities say nothing of it, and do not count. Equal inputs make equal steps; nothing is drawn.

    Args:
        fusion: of two modalities and more; it is referred to, and has its own state.
        lr: the step size.
        limit: of each factor, and of what it divides by: above 1.
        balance: what the balancing term counts, see ``adaptation_loss``. 0 leaves it out, for streams in which classes
            come in runs.
        episodic: forget before every step what was learned from other batches.

    Raises:
        TypeError, ValueError: an argument of the wrong kind or out of its range; a fusion of one modality, or
            whose rule has nothing to adapt.

    Example:
        >>> fusion = QualityAwareFusion.robust(["rgb", "depth"], num_classes=4)
        >>> adaptation = TestTimeAdaptation(fusion)
        >>> noise = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
        >>> seen = 6 * torch.eye(4).repeat(16, 1)
        >>> for _ in range(20):
        ...     out = adaptation.step({"rgb": seen, "depth": noise})
        >>> [round(f, 2) for f in adaptation.factors["odds"].tolist()]  # the rgb's fall
        [0.85, 1.17]
        >>> out = adaptation.reset().step({"rgb": seen, "depth": None})  # says nothing of the two
        >>> adaptation.factors["odds"].tolist()
        [1.0, 1.0]
    """

    __test__ = False  # pytest takes classes whose names begin so for tests
    log_factors: Tensor

    def __init__(
        self,
        fusion: QualityAwareFusion,
        *,
        lr: float = 1.0,
        limit: float = 4.0,
        balance: float = 1.0,
        episodic: bool = False,
    ) -> None:
        super().__init__()
        check_fusion(fusion)
        if fusion.num_modalities < 2:
            raise ValueError(f"fusion must be of at least 2 modalities, got {list(fusion.names)}")
        for name, value, least in (("lr", lr, 0.0), ("limit", limit, 1.0)):
            check_number(name, value)
            if not least < value < math.inf:
                raise ValueError(f"{name} must be finite and above {least:g}, got {value}")
        check_number("balance", balance)
        if not 0 <= balance < math.inf:
            raise ValueError(f"balance must be finite and at least 0, got {balance}")
        if not isinstance(episodic, bool):
            raise TypeError(f"episodic must be True or False, got {episodic!r}")
        if not fusion.rule.adaptable:
            rule = f"{type(fusion.rule).__name__}({fusion.rule.extra_repr()})"
            raise ValueError(f"fusion must have numbers to adapt that its fused logits send gradients to, got {rule}")
        # In a tuple, where nn.Module does not take it for a part of its own.
        self._fusion = (fusion,)
        self.lr, self.limit, self.balance, self.episodic = lr, limit, balance, episodic
        held = fusion.calibration.held
        size = len(fusion.rule.adaptable), fusion.num_modalities
        with torch.inference_mode(False):  # whose tensors could not be changed outside it
            start = torch.zeros(size, dtype=held.dtype, device=held.device)
        self.register_buffer("log_factors", start)

    @property
    def fusion(self) -> QualityAwareFusion:
        """The layer, which the model owns."""
        return self._fusion[0]

    @property
    def factors(self) -> dict[str, Tensor]:
        """What each modality's numbers are multiplied by, ``[M]`` each, by their names."""
        return dict(zip(self.fusion.rule.adaptable, self._allowed(self.log_factors).exp(), strict=True))

    def reset(self) -> "TestTimeAdaptation":
        """Forget all that was learned: the fusion answers as it was calibrated, exactly."""
        self._learn(torch.zeros_like(self.log_factors))
        return self

    def forward(self, logits: Heads, present: Present | None = None, features: Logits | None = None) -> FusionOutput:
        """What the fusion answers with its numbers as they have been learned; arguments and errors are the fusion's."""
        return self._fuse(self._allowed(self.log_factors), logits, present, features)

    def step(self, logits: Heads, present: Present | None = None, features: Logits | None = None) -> FusionOutput:
        """Learn from a batch, and answer it; arguments and errors are the fusion's, most often a model's whole output.

        Nothing is learned from a batch in which no sample has two modalities, or whose gradient is not finite.
        """
        logits, present, features = parts_of(logits, present, features)
        with torch.inference_mode(False), torch.enable_grad():
            if self.episodic:
                self.reset()
            start = self._allowed(self.log_factors).requires_grad_()
            out = self._fuse(start, *(_copied(each) for each in (logits, present, features)))
            gradient = torch.autograd.grad(self.loss(out), start, materialize_grads=True)[0]
            finite = torch.isfinite(gradient).all()
            moved = start.detach() - self.lr * torch.where(finite, gradient, 0)
            self._learn(self._allowed(moved))
        return self(logits, present, features)

    def loss(self, out: FusionOutput) -> Tensor:
        """What a step descends: ``adaptation_loss`` of the samples in which two modalities and more count."""
        fused = out.logits.movedim(self.fusion.class_dim, -1)
        # Nothing is said of a sample whose modalities rule every class out between them.
        some = torch.isfinite(torch.logsumexp(fused.detach(), -1))
        counted = ((out.energy != torch.inf).sum(0) > 1) & some
        return adaptation_loss(fused, counted, self.balance)

    def _learn(self, log_factors: Tensor) -> None:
        """In place, unless they were loaded or moved in inference mode, whose tensors cannot be changed outside it."""
        with torch.inference_mode(False):
            if self.log_factors.is_inference():
                self.log_factors = torch.empty_like(self.log_factors)
            self.log_factors.copy_(log_factors)

    def _allowed(self, log_factors: Tensor) -> Tensor:
        """As they may act while calibration stands so: 0 for what is held, the others of sum 0, none over the limit."""
        free = (self.fusion.calibration.held == 0).to(log_factors)
        mean = (log_factors * free).sum(-1, keepdim=True) / free.sum().clamp(min=1)
        moved = (log_factors - mean) * free
        most = moved.abs().amax(-1, keepdim=True) / math.log(self.limit)
        return moved / most.clamp_min(1)

    def _fuse(self, log_factors: Tensor, *given: Any) -> FusionOutput:
        numbers = {f"rule.{name}": x for name, x in self.fusion.rule.adapted(log_factors.exp()).items()}
        out: FusionOutput = functional_call(self.fusion, numbers, given)
        return out

    def get_extra_state(self) -> Tensor:
        """What the factors belong to: the fusion's own."""
        return self.fusion.get_extra_state()

    def set_extra_state(self, state: Tensor) -> None:
        """Refuse what was learned of another fusion, as the fusion refuses another's state."""
        self.fusion.set_extra_state(state)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        """Refuse it before anything of it is taken: PyTorch asks last."""
        if (state := state_dict.get(f"{prefix}_extra_state")) is not None:
            self.set_extra_state(state)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        return f"lr={self.lr}, limit={self.limit}, balance={self.balance}, episodic={self.episodic}"


def _copied(given: Any) -> Any:
    """Tensors in it without gradients, and such as a backward pass may save, which those of inference mode are not."""
    if isinstance(given, Tensor):
        return given.detach().clone()
    if isinstance(given, Mapping):
        return {name: _copied(each) for name, each in given.items()}
    return [_copied(each) for each in given] if isinstance(given, list | tuple) else given
