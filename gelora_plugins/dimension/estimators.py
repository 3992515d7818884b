"""Intrinsic dimension from nearest neighbours: points (n, D) in, DimensionEstimate out.

TwoNN: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal neighborhood
information", Scientific Reports 7 (2017). With mu_j = r2_j / r1_j, the ratio of the distances from point j to its
second and first neighbour, log mu is exponential with the dimension as its rate where the density is locally constant.
"""

import math
import statistics
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from gelora_plugins.dimension.halves import VARIANCE_FACTOR, half_distances, halves, list_length
from gelora_plugins.dimension.neighbours import Neighbours, find_neighbours
from gelora_plugins.dimension.profile import MIN_POINTS, DimensionEstimate
from gelora_plugins.errors import DimensionError

KEPT_FRACTION = 0.9  # the largest tenth of the mu depends most on the density not being constant (Facco et al., 2017)


@dataclass(frozen=True)
class NeighbourEstimator:
    """An estimator that looks at nothing but the distances from each point to its nearest neighbours.

    Called with distinct points (n, D) it searches the neighbours itself; where they are known, `estimate` shares them.

    Attributes:
        num_neighbours: k, how many neighbours of each point it looks at.
        from_distances: distances (..., n, k) float64, ascending along k -> dimensions (...).
    """

    num_neighbours: int
    from_distances: Callable[[Tensor], Tensor]

    def __call__(self, points: Tensor) -> DimensionEstimate:
        """The dimension of distinct `points` (n, D), with the standard error that random halves of them show.

        Raises:
            DimensionError: as `estimate`; or a point is not finite.
        """
        return self.estimate(self.search(points), halves(len(points), 0))

    def search(self, points: Tensor) -> Neighbours:
        """The neighbours that `estimate` needs.

        Raises:
            DimensionError: fewer than 4 points, or than k + 1; or a point is not finite.
        """
        least = max(4, self.num_neighbours + 1)
        if len(points) < least:
            raise DimensionError(f"{len(points)} points were given; expected at least {least}.")
        return find_neighbours(points, self.num_neighbours, list_length(self.num_neighbours))

    def estimate(self, found: Neighbours, rows: Tensor) -> DimensionEstimate:
        """The dimension of n points whose neighbours are known.

        Args:
            found: what `search` gave.
            rows: random halves of the points (see `resampling.halves`); below 50 points they are not used, and
                there is no standard error.

        Raises:
            DimensionError: points coincide, or most have neighbours at one distance (the corners of a lattice, say).
        """
        k = self.num_neighbours
        n = len(found.distances)
        distances = found.distances[:, :k]
        if not distances[:, 0].min() > 0:
            raise DimensionError("Some points coincide; expected distinct points.")
        value = float(self.from_distances(distances))
        if not (math.isfinite(value) and value > 0):
            raise DimensionError("The nearest neighbours of most points are equally far; there is no dimension then.")
        estimate = DimensionEstimate(value=value, num_points=n)
        if n < MIN_POINTS:
            return estimate
        of_halves = torch.cat([self.from_distances(half) for half in half_distances(found, rows, k)])
        replicates = (value + math.sqrt(VARIANCE_FACTOR) * (of_halves - of_halves.mean())).tolist()
        if not all(math.isfinite(x) and x > 0 for x in replicates):  # neighbours equally far in most of some half
            return estimate
        std_error = statistics.stdev(replicates)
        factor = math.exp(1.96 * std_error / value)
        return replace(
            estimate,
            std_error=std_error,
            interval=(value / factor, value * factor),
            replicates=tuple(float(f"{x:.6g}") for x in replicates),
        )


def _log_ratios(distances: Tensor) -> Tensor:
    """log mu, ascending: (..., n, 2) -> (..., n)."""
    return (distances[..., 1] / distances[..., 0]).log().sort(dim=-1).values


def _linear_fit(distances: Tensor) -> Tensor:
    """A line through the origin, fitted to -log(1 - F) against log mu on the smallest nine tenths of the mu."""
    log_mu = _log_ratios(distances)
    n = log_mu.shape[-1]
    m = int(n * KEPT_FRACTION)
    kept = log_mu[..., :m]
    survival = -torch.log1p(-torch.arange(1, m + 1, dtype=torch.float64, device=kept.device) / n)
    return (kept * survival).sum(dim=-1) / kept.square().sum(dim=-1)


def _censored_likelihood(distances: Tensor) -> Tensor:
    """(m - 1) / T with T = sum of the m smallest log mu + (n - m) times the largest of them.

    Type II censoring: of the largest tenth only that they are at least as large (Epstein and Sobel, "Life testing",
    JASA 48, 1953). Unbiased for independent exponential log mu.
    """
    log_mu = _log_ratios(distances)
    n = log_mu.shape[-1]
    m = int(n * KEPT_FRACTION)
    return (m - 1) / (log_mu[..., :m].sum(dim=-1) + (n - m) * log_mu[..., m - 1])


def _gride(distances: Tensor, scale: int) -> Tensor:
    """Maximum likelihood for the ratios r_2n / r_n, n the `scale` (Denti et al. 2022, with n1 = n and n2 = 2 n).

    With u the N log ratios, the score is N / d + (n - 1) sum u / (1 - exp(-d u)) - (2 n - 1) sum u. As in DADApy 0.3.4,
    N - 1 stands for N, which at n = 1 removes the bias. The score falls and is convex in d, and is not negative at
    d = (N - 1) / (n sum u): from there Newton's steps climb to the root and not beyond.
    """
    u = (distances[..., 2 * scale - 1] / distances[..., scale - 1]).log()
    num, total = u.shape[-1] - 1, u.sum(dim=-1)
    d = num / (scale * total)
    for _ in range(50):
        x = (d[..., None] * u).clamp(min=1e-12)  # x / (1 - exp(-x)) -> 1 where neighbours are equally far
        e = torch.expm1(-x)
        score = num - (scale - 1) * (x / e).sum(dim=-1) - (2 * scale - 1) * d * total  # times d
        slope = num + (scale - 1) * (x.square() * (1 + e) / e.square()).sum(dim=-1)  # times -d^2
        step = d * score / slope
        d = d + step
        if not (step.abs() > 1e-12 * d).any():
            break
    return d


def _levina_bickel(distances: Tensor) -> Tensor:
    """One over the mean of log(r_k / r_j) over all points and j < k."""
    logs = distances.log()
    return 1 / (logs[..., -1:] - logs[..., :-1]).mean(dim=(-2, -1))


def gride_at(scale: int) -> NeighbourEstimator:
    """GRIDE at one scale n >= 1, from the ratios r_2n / r_n: the larger n, the less short-range noise it sees.

    Denti, Doimo, Laio, Mira, "The generalized ratios intrinsic dimension estimator", Scientific Reports 12 (2022).
    """
    return NeighbourEstimator(2 * scale, partial(_gride, scale=scale))


twonn = NeighbourEstimator(2, _linear_fit)
twonn_mle = NeighbourEstimator(2, _censored_likelihood)
gride = gride_at(2)
# Levina and Bickel, NIPS 2004, with the average of MacKay and Ghahramani (2005): of the inverse local estimates.
mle = NeighbourEstimator(10, _levina_bickel)
