"""Evidence that grows where p-values stop being uniform: bets, and an e-process over every moment of a change.

If p is uniform on [0, 1], a bet ``f(p)`` with ``f >= 0`` and ``integral of f = 1`` has mean 1: who pays 1 gets 1 back
on average. The bets here are powers, ``f(p) ~ max(p, 1e-12) ** (kappa - 1)`` with kappa below 1: they pay where p is
small.

A fault begins at an unknown row c. Of a fortune of 1, the share ``w_c`` is staked from row c on, and what it makes is
staked again, row by row. After row t, with the rest that is not staked yet,

    ``E_t = S_t + R_t``,   ``S_t = f(p_t) * (S_{t-1} + w_t)``,   ``R_t = 1 - w_1 - ... - w_t``

is a martingale of mean 1 where the p-values are independent and uniform: ``E[E_t | past] = S_{t-1} + w_t + R_t =
E_{t-1}``. By Ville's inequality the chance that it *ever* reaches ``1 / a`` is at most a, however long it runs. The
stakes ``w_t = 1 / log2(t + 1) - 1 / log2(t + 2)``, of sum 1, fall about as slowly as any: a fault after t clean rows
has to make up for ``-log(w_t)``, about ``log(t) + 2 log(log(t))``. An average of such martingales, of several kappas,
is one too; a fault that suits one of J has ``log(J)`` more to make up for.

Sources: Ville, *Étude critique de la notion de collectif*, 1939; Vovk, Gammerman and Shafer, *Algorithmic Learning in a
Random World*, 2005, and Vovk, Nouretdinov and Gammerman, *Testing Exchangeability On-line*, ICML 2003 (bets on
p-values: powers and their mixture); Shin, Ramdas and Rinaldo, *E-detectors: a nonparametric framework for sequential
change detection*, 2022 (sums over the moments of a change; theirs bound how often a false alarm comes, which takes no
stakes, instead of whether one ever does).
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

KAPPAS = (0.05, 0.2, 0.5, 0.8)
LEAST = 1e-12


class Evidence(NamedTuple):
    """J bets on one modality."""

    staked: Tensor  # ``[J]``: log S
    best: Tensor  # ``[J]``: the log of its largest part, what one moment of a change has made
    start: Tensor  # int64 ``[J]``: the row of that moment


def log_bets(p: Tensor, two_sided: bool) -> Tensor:
    """``log f(p)`` of p-values ``[n]`` in (0, 1): ``[J, n]``; two-sided, bets on large ones too.

    Below ``LEAST`` they are constant, so that a rounding of ``1 - p`` never pays; above it they pay more for that.
    """
    sides = [p, 1 - p] if two_sided else [p]
    kappas = p.new_tensor(KAPPAS).unsqueeze(1)
    scale = kappas.log() - torch.log1p((kappas - 1) * LEAST**kappas)  # so that the integral is 1
    return torch.cat([scale + (kappas - 1) * side.clamp_min(LEAST).log() for side in sides])


def log_rest(t: Tensor) -> Tensor:
    """``log R_t``, what is not staked after t rows.

    Example:
        >>> log_rest(torch.tensor([0.0, 2.0])).exp()
        tensor([1.0000, 0.5000])
    """
    return -(torch.log2(t + 2)).log()


def log_stakes(t: Tensor) -> Tensor:
    """``log w_t`` of rows t from 1 up."""
    # Of the difference of two nearly equal numbers, written as a quotient.
    low, high = torch.log2(t + 1), torch.log2(t + 2)
    return (torch.log1p(1 / (t + 1)) / math.log(2)).log() - low.log() - high.log()


def extend(evidence: Evidence, bets: Tensor, t: Tensor, rows: Tensor) -> tuple[Evidence, Tensor]:
    """After n more rows.

    Args:
        evidence: so far.
        bets: ``log f(p)`` of each, ``[J, n]``.
        t: which they are since the start, from 1 up, ``[n]``.
        rows: their numbers in the stream, int64 ``[n]``.

    Returns:
        What it is now, and ``log E_t`` after each of them, ``[n]``: the mean over the J bets.
    """
    grown = bets.cumsum(1)
    # S_t = prod_{i <= t} f_i * (S_0 + sum_{c <= t} w_c / prod_{i < c} f_i)
    parts = torch.cat([evidence.staked.unsqueeze(1), log_stakes(t) - (grown - bets)], 1)
    staked = grown + torch.logcumsumexp(parts, 1)[:, 1:]
    parts[:, 0] = evidence.best
    best, place = parts.max(1)
    start = torch.where(place == 0, evidence.start, rows[(place - 1).clamp_min(0)])
    total = torch.logaddexp(torch.logsumexp(staked, 0) - math.log(len(bets)), log_rest(t))
    return Evidence(staked[:, -1], grown[:, -1] + best, start), total
