"""The paper's equations written out a second time: float64, loops, nothing of the package."""

import math

import torch
import torch.nn.functional as F


def energy(x, temperature=1.0):
    """Eq. 13, in logarithms taken about the maximum; ``[*, K] -> [*]``."""
    scaled = x.double() / temperature
    top = scaled.amax(-1, keepdim=True)
    return -temperature * (top.squeeze(-1) + (scaled - top).exp().sum(-1).log())


def msp(x):
    p = x.double().softmax(-1)
    return 1 - p.max(-1).values


def entropy(x):
    p = x.double().softmax(-1)
    h = -(p * torch.where(p > 0, p, 1).log()).sum(-1)
    return h / math.log(x.shape[-1]) if x.shape[-1] > 1 else torch.zeros_like(h)


def evidence(x):
    return x.shape[-1] / (torch.logaddexp(x.double(), torch.zeros((), dtype=torch.float64)) + 1).sum(-1)


UNCERTAINTIES = {"energy": energy, "msp": msp, "entropy": entropy, "evidence": evidence}


def weights(
    logits,
    uncertainty="energy",
    alpha=-0.1,
    beta=0.0,
    temperature=1.0,
    nonnegative=False,
    normalize=False,
    present=None,
):
    """Eq. 9 ``[M, *]``, one modality at a time; coefficients are numbers or ``[M]``."""
    rows = []
    for m, x in enumerate(logits):
        a, b, t = (c[m] if isinstance(c, torch.Tensor | list) else c for c in (alpha, beta, temperature))
        measure = UNCERTAINTIES.get(uncertainty, uncertainty) if isinstance(uncertainty, str) else uncertainty
        u = energy(x, t) if uncertainty == "energy" else measure(x.double() / t)
        rows.append(a * u + b)
    w = torch.stack(rows)
    if nonnegative or normalize:
        w = w.clamp(min=0)
    there = torch.ones_like(w, dtype=torch.bool) if present is None else present
    w = torch.where(there, w, 0)
    if normalize:
        total = w.sum(0)
        share = there.double() / there.sum(0).clamp(min=1)
        w = torch.where(total > 0, w / torch.where(total > 0, total, 1), share)
    return w


def fuse(logits, w, present=None):
    """Eq. 11."""
    total = torch.zeros_like(logits[0], dtype=torch.float64)
    for m, x in enumerate(logits):
        x = x.double() if present is None else torch.where(present[m].unsqueeze(-1), x.double(), 0)
        total = total + w[m].unsqueeze(-1) * x
    return total


def hinge(form, w_i, w_j, k_i, k_j):
    """One pair of the three published forms, each as it is printed; python floats or 0-d tensors."""
    if form == "paper":
        g = 1 if w_i > w_j else -1 if w_i < w_j else 0
        return 0 if g == 0 else max(0, g * (k_i - k_j) + abs(w_i - w_j))
    g = 1 if k_i > k_j else -1 if k_i < k_j else 0
    if g == 0:
        return 0
    if form == "margin":  # the smaller history must weigh more, by the gap at least
        return max(0, g * (w_i - w_j) + abs(k_i - k_j))
    return max(0, g * (w_i - w_j) - abs(k_i - k_j))


def pairs_of(batch, pairs):
    if pairs == "adjacent":
        return [(i, (i + 1) % batch) for i in range(batch)]
    return [(i, j) for i in range(batch) for j in range(i + 1, batch)]


def ranking(w, kappa, form="paper", pairs="adjacent"):
    """Eq. 15 to 17 by brute force; ``w`` may carry a graph."""
    chosen = pairs_of(w.shape[1], pairs)
    total = w.sum() * 0
    for m in range(len(w)):
        for i, j in chosen:
            if not (math.isnan(kappa[m, i]) or math.isnan(kappa[m, j])):
                total = total + hinge(form, w[m, i], w[m, j], kappa[m, i], kappa[m, j]) / len(chosen)
    return total


def cross_entropy(x, target, there=None, weight=None, label_smoothing=0.0, ignore_index=-100):
    """``F.cross_entropy`` over the rows that are there, 0 where none is; ``[B, *, K]``, ``[B, *]``."""
    flat, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    keep = labels != ignore_index
    if there is not None:
        keep = keep & there.reshape(-1)
    if not keep.any():
        return flat[keep].sum()
    weight = None if weight is None else weight.to(x.dtype)
    return F.cross_entropy(flat[keep], labels[keep], weight=weight, label_smoothing=label_smoothing)


def sample_losses(logits, target, present=None, ignore_index=-100):
    """Plain cross-entropies ``[M, B]``, means over a sample's positions, NaN where there are none."""
    out = torch.full((len(logits), len(target)), torch.nan, dtype=torch.float64)
    for m, x in enumerate(logits):
        for b in range(len(target)):
            labels = target[b].reshape(-1)
            keep = labels != ignore_index
            if present is not None:
                keep = keep & present[m, b].reshape(-1)
            if keep.any():
                out[m, b] = F.cross_entropy(x[b].detach().double().reshape(-1, x.shape[-1])[keep], labels[keep])
    return out


def objective(
    logits,
    target,
    kappa=None,
    present=None,
    *,
    ranking_weight=0.1,
    form="paper",
    pairs="adjacent",
    detach_weights=False,
    weight=None,
    label_smoothing=0.0,
    ignore_index=-100,
    **weight_options,
):
    """Eq. 18 and its parts, by autograd through ``F.cross_entropy``; float64 leaves carry the graph."""
    w = weights(logits, present=present, **weight_options)
    f = fuse(logits, w.detach() if detach_weights else w, present)
    options = {"weight": weight, "label_smoothing": label_smoothing, "ignore_index": ignore_index}
    anybody = None if present is None else present.any(0)
    fused_loss = cross_entropy(f, target, anybody, **options)
    unimodal = torch.stack(
        [
            cross_entropy(x.double(), target, None if present is None else present[m], **options)
            for m, x in enumerate(logits)
        ]
    )
    rank = w.sum() * 0
    if kappa is not None:
        losses = sample_losses(logits, target, present, ignore_index)
        kappa = torch.where(losses.isnan(), torch.nan, kappa.double())
        mean = w
        if w.dim() > 2:
            there = torch.ones_like(w) if present is None else present.double()
            mean = (w * there).flatten(2).sum(2) / there.flatten(2).sum(2).clamp(min=1)
        rank = ranking(mean, kappa, form, pairs)
    loss = fused_loss + unimodal.sum() + ranking_weight * rank
    return {
        "loss": loss,
        "fused_loss": fused_loss,
        "unimodal_losses": unimodal,
        "ranking_loss": rank,
        "logits": f,
        "weights": w,
    }
