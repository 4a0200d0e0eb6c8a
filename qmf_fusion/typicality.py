"""How typical a row is of its modality's clean ones: plain moments, fitted at once or gathered in training.

Energy only asks whether the logits are large. Noise makes them larger and a blank makes them smaller than any clean
sample's, and both are *untypical*: far from every class (a distance), or of an unusual size (a two-sided z-score). Much
damage hardly shows in the logits, and plainly in the features that the head sees: those are measured alike.

Everything kept is a number of rows and sums over them: such sums add up over batches and processes, and the average of
two models' is again that of some data. A row costs O(K + D), the state is O(M (K + D)): no matrix between classes.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qmf_kernels.eager.fusion import per_modality

from .precision import KeepsPrecision
from .processes import sum_over_processes
from .rows import Features

MOMENTUM = 0.99  # of the sums, per step: about the last 100 steps count
CLASS_MOMENTUM = 0.95  # of a class's own mean, per sample of the class: about the last 20 samples count
MOST_ROWS = 4096  # per step, process and modality; a dense prediction's positions beyond that are thinned out evenly
LARGEST = 1e15  # what float32 can square and sum: larger values are measured as this, and not learned from
UNSEEN = 1e18  # by how much a class without samples lies higher: farther from every row than any other
LOGIT_FLOOR = 1e-5  # of the logarithm of a size or distance of logits: less is how float32 rounds equal ones
FEATURE_FLOOR = 0.02  # the least standard deviation believed of the logarithm of a distance of features

SIZE, NEAREST, OWN, FEATURE = range(4)  # what is measured of a row: see ``Sums.measured``


class Centers(NamedTuple):
    """Where M modalities' clean rows lie, K classes, in the dtype of the rows to be measured."""

    others: Tensor  # ``[M, K]``: mean of logit k over the samples of other classes
    rise: Tensor  # ``[M, K]``: by how much its mean is higher over the samples of class k; ``UNSEEN`` without any
    features: Sequence[tuple[Tensor, Tensor]]  # ``[D]`` each: the mean, and one over the standard deviation


class Statistics(NamedTuple):
    """What is known of M modalities' clean rows, in the dtype of the rows to be measured."""

    centers: Centers
    known: Tensor  # ``[M, 4]`` bool: whether there is any measurement of the kind
    mean: Tensor  # ``[M, 4]``: of the measurements; 1 where there are none
    deviation: Tensor  # ``[M, 4]``: their standard deviation


class Sums(NamedTuple):
    """What statistics follow from; D is the widest modality's, beyond the others' all is 0."""

    classes: Tensor
    """``[M, 2, 2, K]``: number of rows and sum of logit k, over the samples of class k, and over all others."""
    measured: Tensor
    """``[M, 3, 4]``: number, sum and sum of squares of log |x|; log squared distance to the nearest class; squared
    distance to the own class; log distance of the features, which is not there where no modality has any."""
    features: Tensor | None = None
    """``[M, 3, D]``: the same of each feature."""

    def centers(self, widths: Sequence[int | None], dtype: torch.dtype) -> Centers:
        own, others = _mean(*self.classes.unbind(2)).unbind(1)
        rise = torch.where(self.classes[:, 0, 0] > 0, own - others, UNSEEN)
        features = []
        for m, width in enumerate(() if self.features is None else widths):
            sums = self.features[m, :, : width or 0]  # type: ignore[index]
            first, second = _moments(sums[None])
            # As of one more row, of the average variance: what did not vary in n rows may in the next.
            n = sums[0, :1]
            second = ((n * second + second.mean()) / (n + 1)).clamp_min(1e-30)
            features.append((first[0].to(dtype), second[0].rsqrt().to(dtype)))
        return Centers(others.to(dtype), rise.to(dtype), features)

    def statistics(self, widths: Sequence[int | None], dtype: torch.dtype) -> Statistics:
        mean, variance = _moments(self.measured)
        known = self.measured[:, 0] > 0
        mean, deviation = torch.where(known, mean, 1).to(dtype), variance.sqrt().to(dtype)
        return Statistics(self.centers(widths, dtype), known, mean, deviation)


class CleanStatistics(KeepsPrecision):
    """``Sums`` as buffers, float64 throughout: 0 without any data, from which nothing follows.

    In training, each batch's sums are added to those of the batches before, which are forgotten exponentially. A sample
    is compared with the means of *earlier* batches, so that none is measured against itself.

    Args:
        num_modalities: M.
        num_classes: K.
        widths: of each modality's features, None for one without.
        everywhere: where ``torch.distributed`` is initialised, a step's batch is that of all its processes together.
            One collective a step adds up their sums, so that all hold the statistics of one process that sees the same
            rows, to float64's rounding.
    """

    classes: Tensor
    measured: Tensor
    features: Tensor | None

    def __init__(
        self, num_modalities: int, num_classes: int, widths: Sequence[int | None], everywhere: bool = True
    ) -> None:
        super().__init__()
        self.widths, self.everywhere = tuple(widths), everywhere
        widest = max(width or 0 for width in widths)
        kinds = 4 if widest else 3
        for name, shape in {"classes": (2, 2, num_classes), "measured": (3, kinds), "features": (3, widest)}.items():
            sums = torch.zeros(num_modalities, *shape, dtype=torch.float64)
            self.register_buffer(name, sums if widest or name != "features" else None)

    def sums(self) -> Sums:
        return Sums(self.classes, self.measured, self.features)

    def clear(self) -> None:
        """Forget everything."""
        for buffer in self.buffers():
            buffer.zero_()

    def keep_features(self, other: "CleanStatistics", modalities: Sequence[bool]) -> None:
        """Take what others know of these modalities' features."""
        for m, taken in enumerate(modalities):
            if taken and self.features is not None and other.features is not None:
                self.features[m] = other.features[m]
                self.measured[m, :, FEATURE] = other.measured[m, :, FEATURE]

    @torch.no_grad()
    def fit(
        self, x: Tensor, target: Tensor, counted: Tensor, features: Features, former: "CleanStatistics | None" = None
    ) -> None:
        """From clean samples at once; arguments as those of ``update``. Of a class without any it takes ``former``'s.

        A sample's distance to its own class is to the mean of the class's *other* samples, if there are any.
        """
        x, sizes, counts = _learned(x, counted, features, self.classes.dtype)
        classes = _sum_classes(x, target, counts)
        if former is not None:
            classes[:, 0] = torch.where(classes[:, 0, :1] > 0, classes[:, 0], former.classes[:, 0])
        of_features = None if self.features is None else _sum_features(self.features, features, counts)
        centers = Sums(classes, self.measured, of_features).centers(self.widths, x.dtype)
        number = classes[:, 0, 0].gather(1, target.expand(len(x), -1))
        several = counts * (number > 1)
        values = _measure(x, sizes, target, features, centers, number.to(x.dtype))
        self._store([classes, _sum_measures(values, [counts, several, several, counts], features), of_features])

    @torch.no_grad()
    def update(self, x: Tensor, target: Tensor, counted: Tensor, features: Features) -> None:
        """A batch: x ``[M, R, K]``, finite; target ``[R]``, a class everywhere; counted bool ``[M, R]``; features
        ``[R, D]``, finite, or None.

        Rows of a norm beyond ``LARGEST`` are left out. With ``everywhere`` a collective: every process of the
        default group calls it, each with rows of its own.
        """
        stride = -(-x.shape[1] // MOST_ROWS)
        if stride > 1:
            x, target, counted = x[:, ::stride], target[::stride], counted[:, ::stride]
            features = [None if f is None else f[::stride] for f in features]
        x, sizes, counts = _learned(x, counted, features, self.classes.dtype)
        old = self.sums().centers(self.widths, x.dtype)
        met = counts * (self.classes[:, 0, 0] > 0)[:, target]  # there is a mean to compare with
        felt = counts if self.features is None else counts * (self.features[:, 0, :1] > 1)  # and a variance
        measured = _sum_measures(_measure(x, sizes, target, features, old), [counts, met, met, felt], features)
        added = [_sum_classes(x, target, counts), measured]
        if self.features is not None:
            added.append(_sum_features(self.features, features, counts))
        if self.everywhere:
            added = sum_over_processes(added)
        number = added[0][:, :, :1]
        step = torch.where(number[:, 0].sum(-1, keepdim=True) > 0, MOMENTUM, 1.0)
        keep = torch.stack([torch.exp(math.log(CLASS_MOMENTUM) * number[:, 0]), step.expand_as(number[:, 0])], 1)
        kept = [keep * self.classes, step * self.measured, *([] if self.features is None else [step * self.features])]
        self._store([a + b for a, b in zip(kept, added, strict=True)])

    def _store(self, sums: Sequence[Tensor | None]) -> None:
        """In tensors of their own: a forward whose backward is still to come may have kept the former ones.

        A captured CUDA graph reads again what it wrote, and so writes in place.
        """
        in_place = (
            not torch.compiler.is_compiling() and self.classes.is_cuda and torch.cuda.is_current_stream_capturing()
        )
        for number, value in enumerate(sums):
            name = Sums._fields[number]
            if in_place and value is not None:
                getattr(self, name).copy_(value)
            else:
                setattr(self, name, value)


def class_distances(x: Tensor, centers: Centers) -> Tensor:
    """Squared distance of each row ``[M, *, K]`` to each class, ``[M, *, K]``; beyond all others' for a class unseen.

    A class's mean differs from the common one mostly in its own logit. Taking that for the whole difference,
    ``|x - mean_y|^2 = |x - mu|^2 - 2 rise_y (x_y - mu_y) + rise_y^2``: all classes at the cost of one.
    """
    lead = (len(x), *(1,) * (x.dim() - 2), -1)
    centred = x - centers.others.view(lead)
    rise = centers.rise.view(lead)
    common = torch.linalg.vector_norm(centred, dim=-1, keepdim=True).square()
    distances = torch.addcmul(common, rise, torch.sub(rise, centred, alpha=2))
    return torch.maximum(distances, 1e-6 * common)  # the last digits of the common part are lost in the difference


def untypicality(
    x: Tensor,
    distances: Tensor,
    features: Features,
    statistics: Statistics,
    *,
    norm: bool,
    distance: bool,
    floor: float,
) -> Tensor:
    """``u >= 0``, ``[M, *]``: by how many standard deviations a row is untypical of its modality's clean ones.

    ``u = max(|z(log |x|)|, z(log min_y distance_y), |z(log feature distance)|, 0)``: of an unusual size either way, far
    from every class, or seen through unusual features, where ``norm`` and ``distance`` let the first two count;
    ``floor``, or ``LOGIT_FLOOR``, is the least standard deviation believed of these. Logits ``[M, *, K]`` are finite
    and at most ``LARGEST``, distances those of ``class_distances``.
    """

    def z_score(values: Tensor, kind: int, least: float) -> Tensor:
        mean, deviation = statistics.mean[:, kind], statistics.deviation[:, kind].clamp_min(least)
        z = (values - per_modality(mean, values)) / per_modality(deviation, values)
        return torch.where(statistics.known[:, kind].view(-1, *(1,) * (z.dim() - 1)), z, 0)

    u, floor = torch.zeros_like(x[..., 0]), max(floor, LOGIT_FLOOR)
    if norm:
        u = z_score(_log(torch.linalg.vector_norm(x, dim=-1)), SIZE, floor).abs()
    if distance:
        u = torch.maximum(u, z_score(_log(distances.amin(-1)), NEAREST, floor))
    if any(f is not None for f in features):
        distances_of_features = feature_distances(features, statistics.centers)
        apart = [torch.zeros_like(u[0]) if d is None else d for d in distances_of_features]
        z = z_score(torch.stack(apart), FEATURE, FEATURE_FLOOR).abs()
        given = [torch.full_like(u[0], f is not None) for f in features]
        u = torch.maximum(u, z * torch.stack(given))
    return u


def feature_distances(features: Features, centers: Centers) -> list[Tensor | None]:
    """Log of the mean squared deviation of each row's features, in standard deviations: ``[*]``, None without any."""
    return [
        None if f is None else _log(((f.clamp(-LARGEST, LARGEST) - mean) * inverse).square().mean(-1).clamp_max(1e30))
        for f, (mean, inverse) in zip(features, centers.features, strict=True)
    ]


def _log(values: Tensor) -> Tensor:
    return values.clamp_min(1e-12).log()


def _mean(number: Tensor, total: Tensor) -> Tensor:
    # Without a row, what roundings leave of a difference of sums is not to be divided by next to nothing.
    return total / number.masked_fill(number == 0, torch.inf)


def _moments(sums: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance ``[M, ...]`` of ``[M, 3, ...]``."""
    mean, square = _mean(sums[:, :1], sums[:, 1:]).unbind(1)
    return mean, (square - mean * mean).clamp_min(0)


def _learned(x: Tensor, counted: Tensor, features: Features, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Rows ``[M, R, K]``, 0 where they are not learned from; their norms, ``[M, R]``; and 1 where they are, else 0."""
    sizes = largest = torch.linalg.vector_norm(x, dim=-1)
    if any(f is not None for f in features):
        pairs = zip(sizes, features, strict=True)
        norms = [s if f is None else torch.maximum(s, torch.linalg.vector_norm(f, dim=-1)) for s, f in pairs]
        largest = torch.stack(norms)
    learned = counted & (largest < LARGEST)
    return x * learned.unsqueeze(-1).to(x.dtype), torch.where(learned, sizes, 0), learned.to(dtype)


def _sum_classes(x: Tensor, target: Tensor, counts: Tensor) -> Tensor:
    """``Sums.classes`` of a batch."""
    y = target.expand(len(x), -1)
    of_rows = torch.stack([counts, x.gather(-1, y.unsqueeze(-1)).squeeze(-1).to(counts)], 1)  # [M, 2, R]
    own = counts.new_zeros(len(x), 2, x.shape[-1]).scatter_add(-1, y.unsqueeze(1).expand_as(of_rows), of_rows)
    every = torch.stack([counts.sum(1, keepdim=True).expand(-1, x.shape[-1]), x.sum(1, dtype=counts.dtype)], 1)
    return torch.stack([own, every - own], 1)


def _sum_features(like: Tensor, features: Features, counts: Tensor) -> Tensor:
    """``Sums.features`` of a batch."""
    sums = torch.zeros_like(like)
    for m, f in enumerate(features):
        if f is not None:
            f = torch.where(counts[m].unsqueeze(-1) > 0, f, 0).to(like)
            sums[m, :, : f.shape[-1]] = torch.stack([counts[m].sum().expand(f.shape[-1]), f.sum(0), f.square().sum(0)])
    return sums


def _measure(
    x: Tensor, sizes: Tensor, target: Tensor, features: Features, centers: Centers, number: Tensor | None = None
) -> list[Tensor]:
    """Of each row ``[M, R]`` what ``Sums.measured`` sums up. ``number`` ``[M, R]`` says of how many samples its class's
    mean is, where it is one of them: its distance is then that to the mean of the others.
    """
    y = target.expand(len(x), -1).unsqueeze(-1)
    distances = class_distances(x, centers)
    own = distances.gather(-1, y)
    if number is not None:
        to_own = x.gather(-1, y).squeeze(-1) - (centers.others + centers.rise).gather(-1, y.squeeze(-1))
        farther = (number / (number - 1).clamp_min(1)).square() - 1
        own = own + (to_own.square() * farther).unsqueeze(-1)
        distances = distances.scatter(-1, y, own)
    measures = [_log(sizes), _log(distances.amin(-1)), own.squeeze(-1)]
    if centers.features:
        apart = feature_distances(features, centers)
        measures.append(torch.stack([torch.zeros_like(sizes[0]) if d is None else d for d in apart]))
    return measures


def _sum_measures(measures: Sequence[Tensor], counts: Sequence[Tensor], features: Features) -> Tensor:
    """``[M, 3, 4]``, or ``[M, 3, 3]`` where no modality has features."""
    values = torch.stack(list(measures), -1).to(counts[0])
    if len(measures) > FEATURE:
        given = [torch.full_like(c, f is not None) for c, f in zip(counts[0], features, strict=True)]
        counts = [*counts[:FEATURE], counts[FEATURE] * torch.stack(given)]
    weight = torch.stack(list(counts[: len(measures)]), -1)
    first = weight * values
    return torch.stack([weight, first, first * values], 1).sum(2)
