"""How much could be won by moving ranks between blocks: random allocations by seeds, a two-way layout. Needs no torch.

score of allocation a with seed s = mean + effect of a + effect of s + rest. The effects of allocations and the rest are
normal: Burdick and Graybill, Confidence Intervals on Variance Components (1992).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from scipy import integrate, stats

from gelora_plugins.errors import PlanError
from gelora_plugins.findings.arms import HEADROOM
from gelora_plugins.findings.record import diverged, read_lines
from gelora_plugins.findings.results import Gap, unit_of
from gelora_plugins.findings.stats import LEVEL, NO_VERDICT

MIN_ALLOCATIONS = 3  # the spread of two is none worth the name
COLUMNS = ("allocation", "ranks", "score", "over uniform", "shrunken")


@dataclass(frozen=True)
class Layout:
    """What random allocations by seeds come to, beside uniform ranks with the same seeds. Positive is better.

    Attributes:
        sd, sd_interval: standard deviation of the effects of the allocations, and its 95 % interval.
        mean, mean_interval: of all allocations that could be drawn, less uniform.
        gain, gain_interval: what the best of as many random allocations is expected to have over uniform where effects
            are normal. Where they are not, because a few allocations fall off, the interval still holds what the best
            is expected to have.
        kept: the share of an allocation's distance from their mean that is not luck of the seeds, 0 to 1.
        allocations, seeds: how many.
    """

    sd: float
    sd_interval: tuple[float, float]
    mean: float
    mean_interval: tuple[float, float]
    gain: float
    gain_interval: tuple[float, float]
    kept: float
    allocations: int
    seeds: int


def two_way_layout(scores: Sequence[Sequence[float]], uniform: Sequence[float]) -> Layout:
    """The layout of (allocations, seeds), at least 3 by 2, and of uniform with the same seeds.

    The variance of the effects is that of the mean squares, 0 where that is negative, which here is what restricted
    maximum likelihood gives; its interval is Tukey's and Williams's (1962). The expected gain is the distance of the
    mean from uniform plus sd times the expected largest of so many standard normals. The two are independent, so their
    intervals are put together by the method of variance estimates recovery (Zou and Donner 2008). Where effects are not
    normal, a few allocations that fall off make the sd as large as a few that excel would: so the lower end is no
    higher than what the best of these is shown to have over uniform, by t with Bonferroni's correction, nor, where the
    allocations are not told apart, than that of the mean. Where the best is shown to be over uniform, the upper end is
    no lower than its own. benchmarks/statistics/headroom.py has how often all these hold.
    """
    table, beside = np.asarray(scores, dtype=float), np.asarray(uniform, dtype=float)
    count, seeds = table.shape
    between, within = count - 1, (count - 1) * (seeds - 1)
    means = table.mean(1)
    rest = table - means[:, None] - table.mean(0) + table.mean()
    small = 1e-12 * float(np.abs(table).max())  # below that all is rounding
    of_arms = 0.0 if np.ptp(means) <= small else float(seeds * means.var(ddof=1))
    of_rest = 0.0 if np.ptp(rest) <= small else float((rest**2).sum() / within)
    tail = (1 - LEVEL) / 2
    low, high = (
        between * (of_arms - float(ratio) * of_rest) / (seeds * float(chi))
        for ratio, chi in (
            (stats.f.isf(tail, between, within), stats.chi2.isf(tail, between)),
            (stats.f.ppf(tail, between, within), stats.chi2.ppf(tail, between)),
        )
    )
    sd, low, high = (math.sqrt(max(variance, 0.0)) for variance in ((of_arms - of_rest) / seeds, low, high))

    mean, best = (
        0.0 if abs(over) <= small else over
        for over in (float(table.mean() - beside.mean()), float(means.max() - beside.mean()))
    )
    parts = ((of_arms / (count * seeds), between), (of_rest / seeds, within))
    squared = sum(part for part, _ in parts)  # Satterthwaite 1946
    freedom = squared**2 / sum(part**2 / n for part, n in parts) if squared else 1.0
    half = float(stats.t.ppf(1 - tail, freedom)) * math.sqrt(squared)
    times = expected_largest(count)
    gain = mean + times * sd
    ends = [gain - math.hypot(half, times * (sd - low)), gain + math.hypot(half, times * (high - sd))]
    error = math.sqrt(2 * of_rest / seeds)  # of a difference from uniform
    shown = best - float(stats.t.isf(tail / count, within)) * error
    ends[0] = min(ends[0], shown, mean - half if low == 0.0 else math.inf)
    if shown > 0:
        ends[1] = max(ends[1], best + float(stats.t.isf(tail, within)) * error)
    kept = max(0.0, 1 - of_rest / of_arms) if of_arms else 0.0
    return Layout(sd, (low, high), mean, (mean - half, mean + half), gain, (ends[0], ends[1]), kept, count, seeds)


@lru_cache
def expected_largest(count: int) -> float:
    """The mean of the largest of `count` standard normal draws."""
    return float(integrate.quad(lambda u: stats.norm.ppf(u ** (1 / count)), 0, 1)[0])


@dataclass(frozen=True)
class Allocation:
    """Ranks, one per block, and a score per seed; None of one that diverged."""

    name: str
    ranks: tuple[int, ...]
    scores: tuple[float | None, ...]

    @property
    def learned(self) -> list[float]:
        """The scores of the seeds that did not diverge."""
        return [score for score in self.scores if score is not None]


@dataclass(frozen=True)
class Headroom:
    """Random allocations of one group on one task, and what could be won by them.

    Attributes:
        task, row: names; the row is the group whose cost, and whose uniform ranks' rate, they have.
        metric: of the scores, which are in hundredths but for a loss.
        parameters: LoRA parameters of each.
        rate: the learning rate of all.
        margin: what is too little to count, in the unit of the scores.
        uniform: uniform ranks at that cost.
        allocations: all that were drawn.
        failures: why the recipes that failed have no scores, by the name of the allocation.
    """

    task: str
    row: str
    metric: str
    parameters: int
    rate: float
    margin: float
    uniform: Allocation
    allocations: tuple[Allocation, ...]
    failures: Mapping[str, str]

    @property
    def layout(self) -> Layout | None:
        """Of the allocations with which no seed diverged; None where too few are left, or uniform ranks are not."""
        whole, sign = self.whole, -1.0 if self.metric == "loss" else 1.0
        if len(whole) < MIN_ALLOCATIONS or None in self.uniform.scores or len(self.uniform.scores) < 2:
            return None
        table = [[sign * score for score in allocation.learned] for allocation in whole]
        return two_way_layout(table, [sign * score for score in self.uniform.learned])

    @property
    def whole(self) -> list[Allocation]:
        """Those that have a score of every seed."""
        return [a for a in self.allocations if a.scores and None not in a.scores]

    @property
    def verdict(self) -> str:
        """In words: what can be won by moving ranks, with 95 % confidence."""
        found = self.layout
        if found is None:
            return (
                f"{NO_VERDICT}uniform ranks, and at least {MIN_ALLOCATIONS} allocations, have to learn with every seed"
            )
        low, high = found.gain_interval
        if high <= self.margin:
            return "nothing can be won by moving ranks between blocks" + (
                f", or no more than the margin of {self.margin:g}" if self.margin else ""
            )
        most = f"at most {high:.2g} can be won by moving ranks between blocks"
        return most + (f", and at least {low:.2g}" if low > 0 else "; that anything can is not shown")

    def __str__(self) -> str:
        said = f"{self.task}, {HEADROOM}{self.row}: at {self.parameters:,} LoRA parameters {self.verdict}"
        if (found := self.layout) is None:
            return f"{said}.{self._left_out()}"
        best, over, shrunken = max(self.gains(), key=lambda gain: gain[1])
        low, high = found.sd_interval
        return (
            f"{said} (95 %, on these test rows). The best of {found.allocations} random allocations is expected at "
            f"{_with_ends(found.gain, found.gain_interval)} over uniform ranks; their standard deviation is "
            f"{found.sd:.2g} ({low:.2g} to {high:.2g}), their mean {found.mean:+.2g} over uniform. {best.name} has the "
            f"best scores, {over:+.2g} over uniform; {shrunken:+.2g} without the luck of having been picked. All have "
            f"the rate of uniform ranks, {self.rate:g}.{self._left_out()}"
        )

    def gains(self) -> list[tuple[Allocation, float, float]]:
        """(allocation, its mean over uniform's, the same shrunken to what is not luck) of the whole ones."""
        found, sign = self.layout, -1.0 if self.metric == "loss" else 1.0
        if found is None:
            return []
        uniform = statistics.fmean(self.uniform.learned)
        over = {a: sign * (statistics.fmean(a.learned) - uniform) for a in self.whole}
        return [(a, gain, found.mean + found.kept * (gain - found.mean)) for a, gain in over.items()]

    def cells(self) -> Iterator[tuple[str, ...]]:
        """What COLUMNS names: of uniform ranks, of the allocations, the best first, then of those that are left out."""
        shown = sorted(self.gains(), key=lambda gain: -gain[1])
        yield (*_cells(self.uniform), "", "")
        yield from ((*_cells(a), f"{over:+.3g}", f"{shrunken:+.3g}") for a, over, shrunken in shown)
        yield from ((*_cells(a), "", "") for a in self.allocations if a not in [of for of, *_ in shown])

    def _left_out(self) -> str:
        gone = [f"{name} ({reason})" for name, reason in self.failures.items()]
        gone += [
            f"{a.name} ({a.scores.count(None)} of {len(a.scores)} seeds diverged)"
            for a in (self.uniform, *self.allocations)
            if None in a.scores
        ]
        return f" Left out: {'; '.join(gone)}." if gone else ""


def read_headroom(path: Path, experiment: Mapping[str, Any]) -> tuple[list[Headroom], list[Gap]]:
    """(those of the random allocations of TASK/experiment.json, which is `path`; what is not finished).

    Raises:
        PlanError: the file is damaged.
    """
    rows = [row for row in experiment["rows"] if row["name"].startswith(HEADROOM)]
    lines = read_lines(path.with_name("runs.jsonl")) if rows else {}
    found, gaps = [], []
    try:
        for row in rows:
            keys = [key for method in row["methods"] if not method["failure"] for key in method["keys"]]
            missing = sum(key not in lines for key in keys)
            if row["methods"][0]["rate"] is None or missing:
                reason = f"{missing} of {len(keys)} runs are not done. Run the same command again; it goes on there."
                reason = reason if missing else "uniform ranks have no learning rate to take."
                gaps.append(Gap(experiment["task"]["name"], f"{row['name']}: {reason}", unfinished=missing > 0))
            else:
                found.append(_headroom(experiment, row, lines))
    except (KeyError, TypeError, IndexError) as error:
        raise PlanError(f"{path} is no record of a comparison: {type(error).__name__} {error}.") from error
    return found, gaps


def _headroom(
    experiment: Mapping[str, Any], row: Mapping[str, Any], lines: Mapping[str, Mapping[str, Any]]
) -> Headroom:
    unit, arms = unit_of(experiment), []
    for method in row["methods"]:
        made = [lines[key] for key in method["keys"]] if not method["failure"] else []
        scores = tuple(None if diverged(line) else unit * line["score"] for line in made)
        arms.append(Allocation(method["name"], tuple(method["recipes"][0]["ranks"]), scores))
    return Headroom(
        task=experiment["task"]["name"],
        row=row["name"].removeprefix(HEADROOM),
        metric=experiment["task"]["metric"],
        parameters=row["methods"][0]["recipes"][0]["parameters"],
        rate=row["methods"][0]["rate"],
        margin=float(experiment["settings"]["margin"]),
        uniform=arms[0],
        allocations=tuple(arms[1:]),
        failures={method["name"]: method["failure"] for method in row["methods"] if method["failure"]},
    )


def _with_ends(value: float, interval: tuple[float, float]) -> str:
    return f"{value:+.2g} ({interval[0]:+.2g} to {interval[1]:+.2g})"


def _cells(allocation: Allocation) -> tuple[str, str, str]:
    """Name, ranks, and mean score; how many seeds diverged in its place."""
    gone = allocation.scores.count(None)
    mean = f"{statistics.fmean(allocation.learned):.4g}" if allocation.scores and not gone else ""
    said = f"{gone} of {len(allocation.scores)} seeds diverged" if gone else mean or "failed"
    return allocation.name, ", ".join(map(str, allocation.ranks)), said
