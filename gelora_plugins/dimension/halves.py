"""Random halves of the points: how far an estimate would move if the points were others.

The estimates on random halves, drawn without replacement, share the points of the full one and so spread about it
(Politis, Romano, Wolf, "Subsampling", 1999). A bootstrap, which draws with replacement, would put points at distance
zero from themselves. Halves also see that the ratios of mutual neighbours depend on each other, and what two boundaries
have in common when the same halves are taken at both; no formula for independent ratios does.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from gelora_plugins.dimension.neighbours import Neighbours

NUM_HALVES = 100  # the spread of 100 estimates is known to 1 part in sqrt(2 * 100), 7 %
# The variance of the full estimate over the variance among halves. For a smooth statistic it is 1. A half has other
# nearest neighbours than the whole, which adds noise of its own. Where the density is constant, the normalised
# spacings E_j = d j log(r_{j+1} / r_j) of a point are independent exponentials; TwoNN on all points averages E_1,
# and on a half, in the mean over halves, sum_j 2^-j E_j, whose variance is 1/3 of that of E_1. So among halves there
# remains 2 - 1/3 = 5/3. benchmarks/statistics/estimators.py measures it, for estimates and for their differences.
VARIANCE_FACTOR = 3 / 5
_CHUNK = 2**20  # listed neighbours of halves worked on at a time


def list_length(k: int) -> int:
    """How many neighbours of each point to list, so that nearly every half holds k of them.

    Of 3 k + 10 neighbours a half holds fewer than k with probability below 5e-4, for every k.
    """
    return 3 * k + 10


def halves(n: int, seed: int) -> Tensor:
    """NUM_HALVES random halves of n points: (NUM_HALVES, n // 2) int64 rows on the CPU, fixed by n and seed."""
    generator = torch.Generator(device="cpu").manual_seed(seed)
    order = torch.rand(NUM_HALVES, n, generator=generator, dtype=torch.float64, device="cpu").argsort(dim=1)
    return order[:, : n // 2]


def half_distances(found: Neighbours, rows: Tensor, k: int) -> Iterator[Tensor]:
    """Distances to the k nearest neighbours inside each half, for some halves at a time: (halves, n // 2, k) float64.

    Where the list of a point holds fewer than k members of its half, the last listed distance stands in: a lower bound
    of the true one, for less than one point in a thousand. Such a point's next neighbours are far, so its ratio is
    among the largest, of which the TwoNN estimators use only that they are large.
    """
    n, m = found.indices.shape
    rows = rows.to(found.indices.device)
    wanted = torch.arange(k, device=rows.device)
    for part in torch.split(rows, max(1, _CHUNK // (rows.shape[1] * m))):
        member = torch.zeros(len(part), n, dtype=torch.bool, device=rows.device).scatter_(1, part, True)
        inside = member.gather(1, found.indices[part].flatten(1)).view(-1, m)  # one line for each point of each half
        count = inside.sum(dim=1, keepdim=True)
        where = inside.flatten().nonzero().flatten()
        first = count.cumsum(dim=0) - count
        column = where[(first + wanted).clamp(max=len(where) - 1)] % m
        column = torch.where(wanted < count, column, m - 1)
        yield found.distances.take(part.reshape(-1, 1) * m + column).view(*part.shape, k)
