"""Which learning rate to try next, with which seed, and which one to take. Numbers only; no model, no torch.

What is searched over is `Found`: by rate and by seed, how far a run's loss lies above that of the constant answer to
the same rows. Below 0 something was learned; at 0 or above, and where it is no number (inf), the run has diverged.

The search has three levels. The grid is tried with one seed, and widened until its best rate has a neighbour on either
side. The best is tried with a second seed, and so are its neighbours and the geometric means between, until these are
within FACTOR. Then the best and its neighbours get all seeds. At each level, a neighbour that turns out to be the best
gets neighbours of its own. Last, one seed goes up to where it diverges: methods differ in that, too. A seed is the same
rows and the same draws for every rate, so rates are compared in pairs.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

Found = Mapping[float, Mapping[int, float]]
FACTOR = 1.5  # between a chosen rate and its neighbours, at the most
WIDEN = 3.0  # between a rate at the edge and the one that is tried beyond it
FURTHEST = 100.0  # times the highest rate of the grid, or its lowest divided by it, and no rate beyond
TO_CLIFF = 2.0  # between the largest rate that is known to be stable and the smallest that is known not to be
WINDOW = 3.5  # within this factor the loss is a cubic over the logarithm of the rate, near enough
SHARE = 0.05  # of resamples of the seeds: a rate that is the best in as many could as well have been chosen
RESAMPLES = 200


@dataclass(frozen=True)
class Choice:
    """What a search came to.

    Attributes:
        rate: the chosen one; None where no rate has learned with all seeds.
        near: its neighbours that were tried with all seeds and did not diverge: one below, one above, or fewer.
        as_good: those of `near` that could as well have been chosen, by other seeds of the same kind.
        stable: the largest rate without a diverged seed below the cliff; None as `rate`.
        cliff: the smallest rate above those that learn at which a seed diverged; None where none was met.
        at_edge: whether no higher, or no lower, rate was tried than the chosen one.
        why: a sentence, where the chosen rate is not the one with the lowest loss, or there is none.
    """

    rate: float | None
    near: tuple[float, ...] = ()
    as_good: tuple[float, ...] = ()
    stable: float | None = None
    cliff: float | None = None
    at_edge: bool = False
    why: str = ""


def next_runs(found: Found, grid: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """The (rate, seed) to run next, all at the same time; empty where the search has ended."""
    for count, factor in ((1, math.inf), (min(2, len(seeds)), FACTOR), (len(seeds), FACTOR)):
        runs = _missing(found, _wanted(found, grid, seeds[:count], factor), seeds[:count])
        if runs:
            return runs
    rate, _ = _chosen(found, seeds)
    return [] if rate is None else _missing(found, _neighbours(found, rate, grid, FACTOR), seeds)


def cliff_runs(found: Found, grid: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """The (rate, seed) to run next, after a search has ended, to find where runs diverge: one seed, to TO_CLIFF."""
    rate, _ = _chosen(found, seeds)
    if rate is None:
        return []
    cliff = _cliff(found)
    if cliff is None:
        return [(further, seeds[0]) for further in _beyond(max(found), WIDEN, grid)]
    stable = max(r for r in found if r < cliff)
    return [(rounded(math.sqrt(stable * cliff)), seeds[0])] if cliff / stable > TO_CLIFF else []


def choose(found: Found, seeds: Sequence[int]) -> Choice:
    """What a search that has ended comes to."""
    rate, why = _chosen(found, seeds)
    if rate is None:
        return Choice(None, why=why)
    cliff, tried = _cliff(found), sorted(found)
    place = tried.index(rate)
    beside = [tried[i] for i in (place - 1, place + 1) if 0 <= i < len(tried)]
    near = tuple(other for other in beside if _whole(found, other, seeds) and (cliff is None or other < cliff))
    stable = max(r for r in tried if _learned(found[r]) and (cliff is None or r < cliff))
    return Choice(rate, near, _as_good(found, rate, near, seeds), stable, cliff, len(beside) < 2, why)


def _chosen(found: Found, seeds: Sequence[int]) -> tuple[float | None, str]:
    """(the rate with the lowest loss, see `_fitted`, or the one below where that is next to a cliff, `Choice.why`).

    The one below is taken unless it is worse by more than one standard error of the paired differences: a rate that
    learned with these seeds may diverge with others, where its neighbour did with these.
    """
    rate, cliff, tried = _best(found, seeds), _cliff(found), sorted(found)
    if rate is None or not _learned(found[rate]):
        return None, f"No rate from {tried[0]:g} to {tried[-1]:g} learned with every seed"
    place = tried.index(rate)
    if cliff is not None and place and tried[place + 1] == cliff:
        below = tried[place - 1]
        if _whole(found, below, seeds) and not _worse([found[below][s] - found[rate][s] for s in seeds]):
            return below, f"{rate:g} is not better beyond noise, and next to {cliff:g}, where seeds diverge"
    return rate, ""


def _wanted(found: Found, grid: Sequence[float], seeds: Sequence[int], factor: float) -> list[float]:
    """The rates that these seeds are wanted for: the grid to begin with, then the best and what is around it."""
    if any(rate not in found for rate in grid):
        return sorted(grid)
    best = _best(found, seeds)
    if best is not None and _learned(found[best]):
        return _neighbours(found, best, grid, factor)
    if best is None:  # what learned has not all these seeds: the best with one seed less, or with the two of before
        return [rate for rate in (_best(found, seeds[:count]) for count in (2, 1)) if rate is not None][:1]
    edges = _beyond(min(found), 1 / WIDEN, grid) + _beyond(max(found), WIDEN, grid)
    return [rate for rate in edges if best in (min(found), max(found))]


def _neighbours(found: Found, rate: float, grid: Sequence[float], factor: float) -> list[float]:
    """The rate below and the one above; beyond the edge another, and the mean where they are further than `factor`."""
    tried = sorted(found)
    place = tried.index(rate)
    wanted = [] if place else _beyond(rate, 1 / WIDEN, grid)
    wanted += [] if place + 1 < len(tried) else _beyond(rate, WIDEN, grid)
    for other in tried[max(place - 1, 0) : place] + tried[place + 1 : place + 2]:
        wanted.append(rounded(math.sqrt(rate * other)) if max(rate / other, other / rate) > factor else other)
    return wanted


def _beyond(rate: float, step: float, grid: Sequence[float]) -> list[float]:
    further = rounded(rate * step)
    return [further] if min(grid) / FURTHEST <= further <= max(grid) * FURTHEST else []


def rounded(rate: float) -> float:
    """To three digits, so that a rate reads the same wherever it is written."""
    return float(f"{rate:.3g}")


def _missing(found: Found, rates: Sequence[float], seeds: Sequence[int]) -> list[tuple[float, int]]:
    """The runs that are left; none at a rate where one has diverged, which is all that there is to know of it."""
    known = {rate: found.get(rate, {}) for rate in rates}
    return [(r, s) for r, losses in known.items() if _learned(losses) for s in seeds if s not in losses]


def _learned(losses: Mapping[int, float]) -> bool:
    return all(loss < 0 for loss in losses.values())


def _whole(found: Found, rate: float, seeds: Sequence[int]) -> bool:
    return _learned(found[rate]) and all(seed in found[rate] for seed in seeds)


def _mean(losses: Mapping[int, float], seeds: Sequence[int] | None = None) -> float:
    taken = list(losses.values()) if seeds is None else [losses[seed] for seed in seeds]
    return sum(taken) / len(taken)


def _best(found: Found, seeds: Sequence[int]) -> float | None:
    """The rate with the lowest loss below the cliff, of those that have all seeds; of equals the lowest.

    Where none has learned, the one whose loss is lowest. None where all that learned lack some of the seeds.
    """
    if not any(_learned(losses) for losses in found.values()):
        return min(sorted(found), key=lambda rate: _mean(found[rate]))
    cliff = _cliff(found) or math.inf
    whole = [rate for rate in sorted(found) if rate < cliff and _whole(found, rate, seeds)]
    if not whole:
        return None
    fitted = _fitted(found, min(whole, key=lambda rate: _mean(found[rate], seeds)), seeds)
    return min(whole, key=lambda rate: fitted.get(rate, math.inf))


def _fitted(found: Found, middle: float, seeds: Sequence[int]) -> dict[float, float]:
    """The losses of the rates within WINDOW of `middle` that have all `seeds`, read off a curve; up to a constant.

    Neighbours differ by less than their noise. A cubic over the logarithm of the rate (a parabola through four rates),
    in which each seed has a level of its own, pools what all rates around say. A rate whose own losses are worse than
    the lowest mean by more than their noise is out (inf), whatever the curve says. `seeds` may hold one several times,
    which then counts so often.
    """
    cliff, places = _cliff(found) or math.inf, sorted(set(seeds))
    near = [r for r in sorted(found) if max(r / middle, middle / r) < WINDOW and r < cliff and _learned(found[r])]
    fitted = {r: _mean(found[r], seeds) for r in near if _whole(found, r, places)}
    lowest = min(fitted, key=lambda r: fitted[r])
    worse = {r: math.inf for r in fitted if _worse([found[r][s] - found[lowest][s] for s in seeds])}
    points = [(math.log(r / middle), s, found[r][s]) for r in near for s in places if s in found[r]]
    degree = 3 if len(near) > 4 else 2
    if len(near) >= 4:
        levels = [[float(seed == place) for place in places] for _, seed, _ in points]
        powers = [[x, x**2, x**3][:degree] for x, *_ in points]
        weights = np.sqrt([seeds.count(seed) for _, seed, _ in points])
        design = np.hstack([levels, powers]) * weights[:, None]
        losses = np.array([loss for *_, loss in points]) * weights
        curve = np.linalg.lstsq(design, losses, rcond=None)[0][len(places) :]
        fitted = {r: float(sum(c * math.log(r / middle) ** (i + 1) for i, c in enumerate(curve))) for r in fitted}
    return fitted | worse


def _cliff(found: Found) -> float | None:
    """The lowest rate with a diverged seed above one that has learned.

    At a rate that is too low losses are about those of the constant answer, on either side. So what lies below the
    cliff has learned half of what the best has.
    """
    gains = {rate: -_mean(losses) for rate, losses in found.items() if _learned(losses)}
    if not gains:
        return None
    first = min(rate for rate, gain in gains.items() if gain >= max(gains.values()) / 2)
    return min((rate for rate in found if rate > first and not _learned(found[rate])), default=None)


def _worse(differences: Sequence[float]) -> bool:
    """Whether losses are higher, by more than one standard error of their mean."""
    n, mean = len(differences), sum(differences) / len(differences)
    return mean > (math.sqrt(sum((d - mean) ** 2 for d in differences) / (n - 1) / n) if n > 1 else 0.0)


def _as_good(found: Found, rate: float, near: Sequence[float], seeds: Sequence[int]) -> tuple[float, ...]:
    """Those of `near` that have the lowest loss in a share of the resamples of the seeds; all for one seed."""
    if len(seeds) == 1:
        return tuple(near)
    rng, counts = random.Random(0), dict.fromkeys((rate, *near), 0)
    for _ in range(RESAMPLES):
        fitted = _fitted(found, rate, rng.choices(seeds, k=len(seeds)))
        counts[min(counts, key=fitted.__getitem__)] += 1
    return tuple(other for other in near if counts[other] >= SHARE * RESAMPLES)
