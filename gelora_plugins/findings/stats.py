"""What a comparison says: intervals by seed, paired differences, corrections, verdicts. Numbers only; no torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from scipy import stats

LEVEL = 0.95
POWER = 0.8
NOT_TOLD = "not told apart"
NO_VERDICT = "no verdict: "
MIN_SEEDS = 3  # two differences have no spread worth the name


@dataclass(frozen=True)
class Difference:
    """Paired differences, one per seed, summed up. Positive is better.

    Attributes:
        mean: of the differences.
        interval: 95 % interval of the mean; None with fewer than three seeds.
        p: two-sided; 1.0 with fewer than three seeds.
        smallest: the smallest true difference that this many seeds show with 80 % power at the 5 % level, where no
            other is tested; None with fewer than three seeds.
        seeds: how many differences.
        rows: how many test rows the interval takes for a draw, too; 0 where it takes them as they are.
    """

    mean: float
    interval: tuple[float, float] | None
    p: float
    smallest: float | None
    seeds: int
    rows: int = 0


def mean_interval(scores: Sequence[float]) -> tuple[float, float | None]:
    """Mean, and half the width of its 95 % interval by Student's t; None for a single score."""
    n = len(scores)
    mean = math.fsum(scores) / n
    if n < 2:
        return mean, None
    return mean, float(stats.t.ppf((1 + LEVEL) / 2, n - 1) * np.std(scores, ddof=1) / math.sqrt(n))


def paired_difference(
    ours: Sequence[float],
    theirs: Sequence[float],
    parts: tuple[Sequence[Sequence[float]], Sequence[Sequence[float]]] | None = None,
) -> Difference:
    """`ours` minus `theirs`, seed by seed, by Student's paired t test; with `parts` by `two_way`, where they differ.

    Args:
        parts: of ours and of theirs what each test row adds to the score, one sequence for each seed.

    For five normal differences the 95 % interval of the percentile bootstrap holds the true mean 84 % of the time, that
    of t 94 %. A studentised bootstrap comes to 98 %, but with five seeds some resamples have next to no spread, and one
    interval in twenty is five times as wide as t's usual one (benchmarks/statistics/coverage.py).
    """
    differences = np.asarray(ours, dtype=float) - np.asarray(theirs, dtype=float)
    n, mean = len(differences), float(differences.mean())
    if n < MIN_SEEDS:
        return Difference(mean, None, 1.0, None, n)
    if np.ptp(differences) <= 1e-12 * abs(mean):  # the same difference at every seed: a sign test is what is left
        return Difference(mean, (mean, mean), 1.0 if mean == 0 else 2.0 / 2**n, 0.0, n)
    of_rows = (
        np.empty((n, 0)) if parts is None else np.asarray(parts[0], dtype=float) - np.asarray(parts[1], dtype=float)
    )
    # A record keeps six digits of a part: scores that differ by less have parts that are the same.
    error, freedom = two_way(of_rows) if of_rows.size > n and np.ptp(of_rows) > 0 else (0.0, 0.0)
    if error > 0:
        quantile = float(stats.t.ppf((1 + LEVEL) / 2, freedom))
        interval = (mean - quantile * error, mean + quantile * error)
        p, least = 2 * float(stats.t.sf(abs(mean) / error, freedom)), quantile + float(stats.t.ppf(POWER, freedom))
        return Difference(mean, interval, p, least * error, n, of_rows.shape[1])
    found = stats.ttest_1samp(differences, 0.0)
    low, high = found.confidence_interval(LEVEL)
    return Difference(
        mean, (float(low), float(high)), float(found.pvalue), smallest_difference(differences.tolist()), n
    )


def two_way(differences: np.ndarray) -> tuple[float, float]:
    """(standard error, degrees of freedom) of the mean of (seeds, rows), where both are draws.

    From the mean squares of the two-way layout without replication: seeds + rows - rest, over their number, is without
    bias for the variance of the mean; where it is below either alone, the larger of those is taken. Degrees of freedom
    are Satterthwaite's (1946).
    """
    seeds, rows = differences.shape
    by_seed, by_row, mean = differences.mean(1), differences.mean(0), differences.mean()
    rest = differences - by_seed[:, None] - by_row[None, :] + mean
    freedoms = (seeds - 1, rows - 1, (seeds - 1) * (rows - 1))
    squares = (rows * by_seed.var(ddof=1), seeds * by_row.var(ddof=1), (rest**2).sum() / freedoms[2])
    of_seeds, of_rows, of_rest = squares
    both = of_seeds + of_rows - of_rest
    if both >= max(of_seeds, of_rows):
        freedom = both**2 / sum(square**2 / count for square, count in zip(squares, freedoms, strict=True))
        return math.sqrt(both / (seeds * rows)), freedom
    alone = (of_seeds, seeds - 1) if of_seeds > of_rows else (of_rows, rows - 1)
    return math.sqrt(alone[0] / (seeds * rows)), alone[1]


def worst(differences: Sequence[Difference]) -> Difference:
    """The first, no surer than all of them: with the interval that holds all of theirs, and the largest p.

    Where one is above 0 and another below, p is 1.
    """
    first, intervals = differences[0], [d.interval for d in differences if d.interval is not None]
    if not intervals:
        return first
    low, high = min(low for low, _ in intervals), max(high for _, high in intervals)
    same_side = len({d.mean > 0 for d in differences}) == 1
    return replace(first, interval=(low, high), p=max(d.p for d in differences) if same_side else 1.0)


def smallest_difference(differences: Sequence[float]) -> float:
    """The true mean difference that a t test of so many pairs with this spread finds with 80 % power at 5 %."""
    n = len(differences)
    quantiles = stats.t.ppf((1 + LEVEL) / 2, n - 1) + stats.t.ppf(POWER, n - 1)
    return float(quantiles * np.std(differences, ddof=1) / math.sqrt(n))


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's correction (1979) for the number of p values, in the order given."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    corrected, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[i]))
        corrected[i] = highest
    return corrected


def verdict(difference: Difference, corrected_p: float, margin: float = 0.0) -> str:
    """Says "equal within x", "better", "worse", or "not told apart".

    Equal is what differs, with 95 % confidence, by no more than x, and x is within `margin`: two one-sided tests
    (Schuirmann 1987) at 2.5 % each, of this difference alone. Whatever its p, because enough seeds show any difference.
    A difference that no p shows is not equality; it may be as large as its interval.
    """
    if difference.interval is None:
        return f"{NO_VERDICT}{difference.seeds} seeds, at least {MIN_SEEDS} are needed"
    bound = max(abs(end) for end in difference.interval)
    if bound <= margin:
        return f"equal within {bound:.3g}"
    if corrected_p < 1 - LEVEL:
        return "better" if difference.mean > 0 else "worse"
    return NOT_TOLD


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the (parameters, score) that no other point beats: fewer or equal parameters, higher score."""
    return [
        i
        for i, (cost, score) in enumerate(points)
        if not any(c <= cost and s >= score and (c, s) != (cost, score) for c, s in points)
    ]
