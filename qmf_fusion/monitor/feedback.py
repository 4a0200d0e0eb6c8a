"""Odds that follow the stream: a modality that has been broken of late is taken for broken sooner.

The mixture of ``robust`` sees each sample alone, with the same odds of broken to clean for ever. Where a fault lasts,
the share of broken rows of late says more. The odds are multiplied by what the odds of that share have become since the
reference,

    ``factor = (b / (1 - b)) / (b0 / (1 - b0))``,   ``1 - b = P(clean) * (1 - share of repeated rows)``,

with running means for b and those of the reference for b0: a step of EM for the mixture's shares, relative to the
reference, so that nothing changes on a stream like it. A stuck sensor may give a typical row for ever, which the
mixture takes for clean; here it is not.

Fed on itself, this could hold a repaired modality down: high odds make P(clean) low, which keeps odds high. So b is of
P(clean) *at the odds as given*. A modality's own odds stand in ``P(clean) = A / (A + odds * B)``, A and B are free of
them, and so they are taken out again: what is fed back follows from the rows and from the other modalities' odds, not
from itself. The factor is bounded besides.
"""

import torch
from torch import Tensor

from ..precision import KeepsPrecision
from ..rule import Rule

LEAST, MOST = 0.1, 30.0
_SHARE = 0.01  # the least share of broken rows, or of clean ones, that is believed


class OddsOfStream(KeepsPrecision):
    """What a rule's odds of M modalities are as given, and by what they are multiplied."""

    given: Tensor
    """``[M]``."""
    factor: Tensor
    """``[M]``."""

    def __init__(self, num_modalities: int) -> None:
        super().__init__()
        for name in ("given", "factor"):
            self.register_buffer(name, torch.ones(num_modalities, dtype=torch.float64, device="cpu"))

    def ratio(self, rule: Rule) -> Tensor | None:
        """What the rule's odds now are of those as given, ``[M]``, whoever has set them; None for a rule without.

        1 where calibration holds a weight, which no odds change.
        """
        if not rule.has_odds:
            return None
        held = rule.calibration.held.to(self.given)
        return torch.where(held == 0, self._odds(rule) / self.given, 1)

    def start(self, rule: Rule) -> None:
        """Take the rule's odds for the given ones."""
        if rule.has_odds:
            self.given.copy_(self._odds(rule))
            self.factor.fill_(1)

    def are_set(self, rule: Rule) -> bool:
        """Whether the rule's odds are those that this has set."""
        return torch.allclose(self._odds(rule), self.given * self.factor, rtol=1e-5, atol=0)

    def check(self, rule: Rule) -> None:
        """Refuse to go on where somebody else has set the rule's odds."""
        if not self.are_set(rule):
            raise RuntimeError(
                f"the rule's odds are {self._odds(rule).tolist()}, and feedback has set "
                f"{(self.given * self.factor).tolist()}: set_odds, another monitor or a loaded state has changed them. "
                "fit() takes them as given; of a model and a monitor, load the monitor's state last"
            )

    def follow(self, rule: Rule, now: Tensor, usual: Tensor) -> None:
        """Set the rule's odds by the share of clean rows ``[M]`` at the odds as given, of late and of the reference."""
        late, before = ((1 - x).clamp(_SHARE, 1 - _SHARE) for x in (now, usual))
        self.set(rule, (late / (1 - late) * (1 - before) / before).clamp(LEAST, MOST))

    def set(self, rule: Rule, factor: Tensor) -> None:
        """Multiply the odds as given by ``[M]``."""
        self.factor.copy_(factor)
        rule.set_odds(self.given * factor)  # type: ignore[operator]

    def _odds(self, rule: Rule) -> Tensor:
        odds = rule.odds
        assert isinstance(odds, Tensor)
        return odds.to(self.given)
