"""Intrinsic dimension from nearest neighbours: points (n, D) in, DimensionEstimate out.

TwoNN: Facco, d'Errico, Rodriguez, Laio, "Estimating the intrinsic dimension of datasets by a minimal neighborhood
information", Scientific Reports 7 (2017). With mu_j = r2_j / r1_j, the ratio of the distances from point j to its
second and first neighbour, log mu is exponential with the dimension as its rate where the density is locally constant.
"""

import math

import torch
from torch import Tensor

from gelora_plugins.dimension import DimensionEstimate
from gelora_plugins.errors import DimensionError

KEPT_FRACTION = 0.9  # the largest tenth of the mu depends most on the density not being constant (Facco et al., 2017)
REPEAT_TOLERANCE = 1e-5  # in units of the root mean square distance of the points from their mean
_CANDIDATES = 8  # neighbours looked at exactly beyond the ones asked for
_TILE_BYTES = 64 * 2**20


def centred(points: Tensor) -> Tensor:
    """`points` (n, D) minus their mean, float64: a large constant coordinate costs float32 all its digits."""
    points = points.double()
    return points - points.mean(dim=0)


def neighbour_distances(points: Tensor, k: int = 2) -> Tensor:
    """Distances from each point to its k nearest others: (n, D) -> (n, k) float64, ascending, exact.

    Candidates come from a matrix product of the centred points; their distances are computed again from differences,
    and a row whose candidates the product cannot vouch for is searched again by differences alone. All in float64:
    float32 cannot vouch for any row where one coordinate dwarfs the others, and TF32 or autocast would spoil it.

    Raises:
        ValueError: fewer than k + 1 points.
    """
    if len(points) <= k:
        raise ValueError(f"{len(points)} points have no {k} neighbours each.")
    points = points.double()
    x = centred(points)
    n, dim = x.shape
    num_candidates = min(n - 1, k + _CANDIDATES)
    norms = x.square().sum(dim=1)
    # |error| of |x|^2 + |y|^2 - 2xy: about sqrt(D) roundings of products no larger than the norms.
    slack = 4 * torch.finfo(torch.float64).eps * math.sqrt(dim) * (norms + norms.max())
    rows = max(1, _TILE_BYTES // (8 * max(n, num_candidates * dim)))
    result = torch.empty(n, k, dtype=torch.float64, device=x.device)
    for start in range(0, n, rows):
        stop = min(start + rows, n)
        here = torch.arange(start, stop, device=x.device)
        squared = torch.addmm(norms + norms[start:stop, None], x[start:stop], x.T, alpha=-2)
        squared[here - start, here] = torch.inf
        approximate, candidate = squared.topk(num_candidates, largest=False)
        # The differences are of the points as given: centring rounds, which tight clusters far out would show.
        exact = (points[start:stop, None] - points[candidate]).square().sum(dim=2).sort(dim=1).values[:, :k].sqrt()
        unsure = here[exact[:, -1].square() + 2 * slack[start:stop] > approximate[:, -1]]
        if num_candidates < n - 1 and len(unsure):
            every = torch.cdist(points[unsure], points, compute_mode="donot_use_mm_for_euclid_dist")
            every[torch.arange(len(unsure), device=x.device), unsure] = torch.inf
            exact[unsure - start] = every.topk(k, largest=False).values
        result[start:stop] = exact
    return result


def repeats(points: Tensor) -> Tensor:
    """Which points of (n, D) coincide with an earlier one: (n,) bool. The first of each group is kept.

    Two points coincide when they are nearer than REPEAT_TOLERANCE times the root mean square distance from the mean.
    """
    x = centred(points)
    n = len(x)
    found = torch.zeros(n, dtype=torch.bool, device=x.device)
    if n < 2:
        return found
    tolerance = REPEAT_TOLERANCE * x.square().sum(dim=1).mean().sqrt()
    if tolerance == 0:
        found[1:] = True
        return found
    suspects = (neighbour_distances(x, 1)[:, 0] <= tolerance).nonzero().flatten()
    kept: list[int] = []
    for i in suspects.tolist():
        if kept and bool(((x[kept] - x[i]).square().sum(dim=1).sqrt() <= tolerance).any()):
            found[i] = True
        else:
            kept.append(i)
    return found


def log_ratios(points: Tensor) -> Tensor:
    """log mu of each of the distinct `points` (n, D): (n,) float64, ascending.

    Raises:
        DimensionError: fewer than 4 points, points that coincide or are not finite, or no point with a nearest
            neighbour nearer than the second (corners of a lattice, say).
    """
    if len(points) < 4:
        raise DimensionError(f"{len(points)} points were given; TwoNN expects at least 4.")
    r = neighbour_distances(points, 2)
    log_mu = (r[:, 1] / r[:, 0]).log().sort().values  # NaN comes last
    if not log_mu[-1].isfinite():
        raise DimensionError("Some points coincide, or are not finite; TwoNN expects distinct, finite points.")
    if log_mu[int(len(log_mu) * KEPT_FRACTION) - 1] == 0:
        raise DimensionError("The two nearest neighbours of most points are equally far; TwoNN has no dimension then.")
    return log_mu


def twonn(points: Tensor) -> DimensionEstimate:
    """TwoNN by linear fit (Facco et al. 2017, eq. 6): distinct points (n, D) -> dimension, without an interval.

    A line through the origin is fitted to -log(1 - F) against log mu on the smallest nine tenths of the mu.
    """
    log_mu = log_ratios(points)
    n = len(log_mu)
    m = int(n * KEPT_FRACTION)
    kept = log_mu[:m]
    survival = -torch.log1p(-torch.arange(1, m + 1, dtype=torch.float64, device=kept.device) / n)
    return DimensionEstimate(value=float((kept @ survival) / (kept @ kept)), num_points=n)


def twonn_mle(points: Tensor) -> DimensionEstimate:
    """TwoNN by censored maximum likelihood: distinct points (n, D) -> dimension with standard error and interval.

    The m smallest log mu are used, and of the others only that they are at least as large (type II censoring):
    T = sum of the m smallest + (n - m) times the largest of them, d = (m - 1) / T, and 2 d T follows chi-squared
    with 2 m degrees of freedom (Epstein and Sobel, "Life testing", JASA 48, 1953). The mu of mutual neighbours are
    dependent, which makes the true error 5 to 30 % larger than this one: the 95 % interval holds the estimator's mean
    88 to 94 % of the time (benchmarks/results/estimators.json).
    """
    from scipy.special import chdtri

    log_mu = log_ratios(points)
    n = len(log_mu)
    m = int(n * KEPT_FRACTION)
    total = float(log_mu[:m].sum() + (n - m) * log_mu[m - 1])
    value = (m - 1) / total
    interval = (float(chdtri(2 * m, 0.975)) / (2 * total), float(chdtri(2 * m, 0.025)) / (2 * total))
    return DimensionEstimate(value=value, num_points=n, std_error=value / math.sqrt(m - 2), interval=interval)
