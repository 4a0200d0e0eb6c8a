"""How typical a modality's logits are of its own clean ones: class statistics, fitted at once or gathered in training.

Energy only asks whether the logits are large. Noise makes them larger and a blank makes them smaller than any clean
sample's, and both are *untypical*: far from every class (a distance), or of an unusual size (a two-sided z-score).
"""

from collections.abc import Mapping
from typing import ClassVar, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from .precision import KeepsPrecision
from .processes import place_of_process, sum_over_processes

MOMENTUM = 0.99  # of the running covariance: about the last 100 steps count
CLASS_MOMENTUM = 0.95  # of a class mean, per sample of the class: about the last 20 samples count
MOST_ROWS = 4096  # per step, process and modality; a dense prediction's positions beyond that are thinned out evenly


class Statistics(NamedTuple):
    """What is known of M modalities' clean logits, K classes; all float64 but ``seen``."""

    whiten: Tensor  # ``[M, K, K]``: ``|(x - mean) @ whiten|^2`` is the squared distance in the within-class covariance
    centre: Tensor  # ``[M, K, K]``: the class means, whitened; row y is class y's
    seen: Tensor  # ``[M, K]`` bool: whether the class has a mean
    scale: Tensor  # ``[M]``: mean squared distance of a sample to its own class; 0 for a modality not known
    norm: Tensor  # ``[M, 2]``: mean and standard deviation of ``log |x|``
    distance: Tensor  # ``[M, 2]``: mean and standard deviation of the log squared distance to the nearest class
    prior: Tensor  # ``[K]``: class frequencies, ``(n_y + 1) / (N + K)``


_SHAPES = {"whiten": "mkk", "centre": "mkk", "seen": "mk", "scale": "m", "norm": "m2", "distance": "m2", "prior": "k"}
_RUNNING = {"mean": "mkk", "scatter": "mkk", "moments": "m5", "steps": "m", "count": "k"}
OF_CLASSES = ("prior", "count", "known")  # the buffers whose first dimension is not the modalities


class ClassStatistics(KeepsPrecision):
    """``Statistics`` as buffers, float64 throughout; without any data they are those of which nothing follows.

    Flags are numbers, 1 and 0, as averages of models, which take every buffer, subtract no truth values. ``spread`` is
    the least within-class variance believed, as a share of the variance between the class means: the logits of training
    samples collapse onto their class; those of test samples do not.
    """

    _shapes: ClassVar[Mapping[str, str]] = _SHAPES
    whiten: Tensor
    centre: Tensor
    seen: Tensor
    scale: Tensor
    norm: Tensor
    distance: Tensor
    prior: Tensor
    known: Tensor

    def __init__(self, num_modalities: int, num_classes: int, spread: float = 0.1) -> None:
        super().__init__()
        self.num_modalities, self.num_classes, self.spread = num_modalities, num_classes, spread
        sizes = {"m": num_modalities, "k": num_classes, "2": 2, "5": 5}
        for name, shape in self._shapes.items():
            self.register_buffer(name, torch.zeros([sizes[s] for s in shape], dtype=torch.float64))
        self.prior.fill_(1 / num_classes)
        self.register_buffer("known", torch.zeros((), dtype=torch.float64))

    def statistics(self) -> Statistics:
        return Statistics(*(self.whiten, self.centre, self.seen > 0, self.scale, self.norm, self.distance, self.prior))

    def clear(self) -> None:
        """Forget everything."""
        for name in (*self._shapes, "known"):
            getattr(self, name).zero_()
        self.prior.fill_(1 / self.num_classes)

    @torch.no_grad()
    def fit(self, logits: Tensor, target: Tensor, counted: Tensor) -> None:
        """From clean samples at once: logits ``[M, R, K]``, target ``[R]``, counted bool ``[M, R]``.

        Sums in float64, so that the order of the samples matters only to its rounding. A sample's distance to its own
        class is to the mean of the class's *other* samples.
        """
        self.clear()
        self.known.fill_(1)
        num_classes, dtype = self.num_classes, self.whiten.dtype
        some = counted.any(0)
        count = torch.bincount(target[some], minlength=num_classes).to(dtype)
        self.prior.copy_((count + 1) / (count.sum() + num_classes))
        for m, keep in enumerate(counted):
            x, y = logits[m, keep].to(dtype), target[keep]
            if len(x) == 0:
                continue
            n = torch.bincount(y, minlength=num_classes).to(dtype)
            mean = x.new_zeros(num_classes, num_classes).index_add_(0, y, x) / n.clamp_min(1).unsqueeze(-1)
            residual = (x - mean[y]) * (n / (n - 1).clamp_min(1))[y].unsqueeze(-1)
            whiten = _whitener(residual.T @ residual / len(x), mean, n, self.prior, self.spread)
            to_own = (residual @ whiten).square().sum(-1)
            to_all = _squared_distances(x @ whiten, mean @ whiten, n > 0)
            to_all = to_all.scatter(-1, y.unsqueeze(-1), to_own.unsqueeze(-1))
            several = n[y] > 1
            self.whiten[m], self.centre[m], self.seen[m] = whiten, mean @ whiten, (n > 0).to(dtype)
            self.scale[m] = (to_own[several] if several.any() else to_own).mean().clamp_min(1e-12)
            for name, values in (("norm", _log(x.norm(dim=-1))), ("distance", _log(to_all.amin(-1)))):
                getattr(self, name)[m] = torch.stack([values.mean(), values.std(unbiased=False)])


class RunningStatistics(ClassStatistics):
    """``Statistics`` gathered batch by batch in training, with exponential forgetting: no pass over the data.

    A sample is compared with the class means of *earlier* batches, so that none is measured against itself.
    ``everywhere`` (see ``ContaminatedProduct``) takes two collectives a step, the second for what the first's
    covariance measures; all processes then hold the statistics of one that sees the same rows, to float64's rounding.
    """

    _shapes: ClassVar[Mapping[str, str]] = {**_SHAPES, **_RUNNING}
    mean: Tensor
    scatter: Tensor
    moments: Tensor
    steps: Tensor
    count: Tensor

    def __init__(self, num_modalities: int, num_classes: int, spread: float = 0.1, everywhere: bool = True) -> None:
        super().__init__(num_modalities, num_classes, spread)
        self.everywhere = everywhere

    @torch.no_grad()
    def update(self, logits: Tensor, target: Tensor, counted: Tensor) -> None:
        """A batch: logits ``[M, R, K]``, finite; target ``[R]``, a class everywhere; counted bool ``[M, R]``.

        Rows so large that their squares overflow are left out. With ``everywhere`` a collective: every process of the
        default group calls it, each with rows of its own.
        """
        num_classes, seen = self.num_classes, self.seen > 0
        stride = -(-logits.shape[1] // MOST_ROWS)
        x, y, c = logits[:, ::stride], target[::stride], counted[:, ::stride]
        x = x.to(self.whiten.dtype)
        # Squares of residuals, up to four times a row's own, are summed: one that overflows would spoil them for good.
        most = MOST_ROWS * (place_of_process()[1] if self.everywhere else 1)
        usable = x.square().sum(-1) < torch.finfo(x.dtype).max / (4 * most)
        x, c = torch.where(usable.unsqueeze(-1), x, 0), (c & usable).to(x.dtype)
        label = torch.nn.functional.one_hot(y, num_classes).to(x.dtype)

        old = c * seen[:, y]  # [M, R]: the samples that there is a mean to compare with
        residual = (x - self.mean[:, y]) * old.unsqueeze(-1)
        here = torch.einsum("mr,rk->mk", c, label)
        sums = torch.einsum("mr,rk,mrj->mkj", c, label, x)
        number, total, scatter, here, sums = self._add_up(
            label.T @ c.amax(0), old.sum(1), residual.mT @ residual, here, sums
        )
        self.count += number
        self.prior.copy_((self.count + 1) / (self.count.sum() + num_classes))
        learn = total > 0
        self.steps += learn
        keep = torch.where(learn, (1 - 1 / self.steps.clamp_min(1)).clamp_max(MOMENTUM), 1.0)
        mean_of = total.clamp_min(1)
        self.scatter.copy_(torch.lerp(scatter / mean_of.view(-1, 1, 1), self.scatter, keep.view(-1, 1, 1)))
        known = self.seen * self.count
        whiten = _whitener(self.scatter, self.mean, known, self.prior, self.spread)

        to_all = _squared_distances(x @ whiten, self.mean @ whiten, seen)
        nearest, size = _log(to_all.amin(-1)), _log(x.norm(dim=-1))
        to_own = to_all.gather(-1, y.expand(len(x), -1).unsqueeze(-1)).squeeze(-1)
        # Classes without a mean are at an infinite distance, which no weight of 0 would cancel.
        to_own, nearest = (torch.where(old > 0, v, 0) for v in (to_own, nearest))
        values = torch.stack([to_own, size, size.square(), nearest, nearest.square()], -1)
        (measured,) = self._add_up((values * old.unsqueeze(-1)).sum(1))
        self.moments.copy_(torch.lerp(measured / mean_of.unsqueeze(-1), self.moments, keep.unsqueeze(-1)))

        forget = torch.where(seen, CLASS_MOMENTUM**here, torch.where(here > 0, 0.0, 1.0)).unsqueeze(-1)
        self.mean.copy_(torch.lerp(sums / here.clamp_min(1).unsqueeze(-1), self.mean, forget))
        self.seen.copy_(seen | (here > 0))
        self.known.fill_(1)

        self.whiten.copy_(whiten)
        self.centre.copy_(self.mean @ whiten)
        self.scale.copy_(torch.where(self.steps > 0, self.moments[:, 0].clamp_min(1e-12), 0))
        for name, first, second in (("norm", 1, 2), ("distance", 3, 4)):
            mean, square = self.moments[:, first], self.moments[:, second]
            getattr(self, name).copy_(torch.stack([mean, (square - mean * mean).clamp_min(0).sqrt()], -1))

    def _add_up(self, *sums: Tensor) -> list[Tensor]:
        return sum_over_processes(sums) if self.everywhere else list(sums)


def class_distances(logits: Tensor, statistics: Statistics) -> Tensor:
    """Squared distance of each row to each class, ``[M, *, K]``; infinite for a class without a mean.

    ``(x - mean_y)' S^-1 (x - mean_y)`` with the modality's pooled within-class covariance S (Mahalanobis; for
    detecting what lies outside of the training distribution, Lee et al., NeurIPS 2018).
    """
    flat = rearrange(logits, "m ... k -> m (...) k")
    distances = _squared_distances(flat @ statistics.whiten.to(flat), statistics.centre.to(flat), statistics.seen)
    return distances.view(logits.shape)


def untypicality(
    logits: Tensor, distances: Tensor, statistics: Statistics, *, norm: bool, distance: bool, floor: float
) -> Tensor:
    """``u >= 0``, ``[M, *]``: by how many standard deviations a row is untypical of its modality's clean logits.

    ``u = max(|z(log |x|)|, z(log min_y distance_y), 0)``: of an unusual size either way, or far from every class, where
    ``norm`` and ``distance`` let these count; ``floor`` is the least standard deviation believed, in logarithms.
    Logits ``[M, *, K]`` are finite, distances those of ``class_distances``.
    """
    u = torch.zeros_like(logits[..., 0])
    if norm:
        u = _z_score(_log(torch.linalg.vector_norm(logits, dim=-1)), statistics.norm, floor).abs()
    if distance:
        nearest = torch.nan_to_num(distances.amin(-1), posinf=1.0)
        u = torch.maximum(u, _z_score(_log(nearest), statistics.distance, floor))
    known = (statistics.scale > 0).view(-1, *(1,) * (u.dim() - 1))
    return torch.where(known, u.clamp_min(0), 0)


def _z_score(values: Tensor, moments: Tensor, floor: float) -> Tensor:
    mean, deviation = (v.to(values.dtype).view(-1, *(1,) * (values.dim() - 1)) for v in moments.unbind(-1))
    return (values - mean) / deviation.clamp_min(floor)


def _log(values: Tensor) -> Tensor:
    return values.clamp_min(1e-12).log()


def _squared_distances(rows: Tensor, centres: Tensor, seen: Tensor) -> Tensor:
    # |x|^2 - 2 x'c + |c|^2 is the faster way, but cancels where it matters in less than float64.
    mode = f"{'' if rows.dtype == torch.float64 else 'donot_'}use_mm_for_euclid_dist"
    distances = torch.cdist(rows, centres, compute_mode=mode).square()
    # Beyond what the dtype holds, far is far.
    distances = torch.nan_to_num(distances, nan=1e30, posinf=1e30)
    return distances.masked_fill(~seen.unsqueeze(-2), torch.inf)


def _whitener(within: Tensor, mean: Tensor, count: Tensor, prior: Tensor, spread: float) -> Tensor:
    """``[..., K, K]``: W with ``W W' = (within + spread * between * I)^-1``; no host synchronisation."""
    share = torch.where(count > 0, prior, 0)
    share = (share / share.sum(-1, keepdim=True).clamp_min(1e-12)).unsqueeze(-1)
    overall = (share * mean).sum(-2, keepdim=True)
    between = (share * (mean - overall).square()).sum((-2, -1)) / mean.shape[-1]
    eye = torch.eye(mean.shape[-1], dtype=mean.dtype, device=mean.device)
    # The last term keeps what is numerically singular (no spread at all) invertible.
    least = spread * between + 1e-9 * within.diagonal(dim1=-2, dim2=-1).mean(-1) + 1e-12
    lower, _ = torch.linalg.cholesky_ex(within + least[..., None, None] * eye)
    inverse: Tensor = torch.linalg.solve_triangular(lower, eye.expand_as(lower), upper=False)
    return inverse.mT
