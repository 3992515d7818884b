"""Whether the data tell the blocks of a model apart, in one sentence that comes before every table. Needs no torch."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from typing import Any

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.plan import RankPlan, Site
from gelora_plugins.ranks.planning import make_plan

logger = logging.getLogger(__name__)

LEVEL = 0.05  # the share of data without any difference in which blocks are said to differ, at most
SETTLED = 0.05  # a rank that changes in no more redraws than this is settled
WORTH_SAYING = 20  # times the documents there are; what needs more is as good as no difference


@dataclass(frozen=True)
class Apart:
    """What the data say of "every block needs the same".

    Attributes:
        p: how often data for which that is true look at least as uneven; None where the estimator gives no errors.
        documents: about how many would show this much unevenness; None where it is shown, or never would be.
    """

    p: float | None
    documents: int | None = None

    @property
    def differ(self) -> bool:
        """Whether the blocks differ."""
        return self.p is not None and self.p <= LEVEL


def tell_apart(profile: DimensionProfile) -> Apart:
    """Test that max(d_{i+1} - d_i, 0) is the same at every block.

    A block's need is its growth g, or 0 where that is less, give or take t of its standard errors s. The statistic is
    the smallest t that leaves one need which all blocks can have: the largest of min(g_i / s_i, (g_i - g_j) / (s_i +
    s_j)) over all pairs. It is compared with what the replicates make of it around growths that are all alike, where
    the bound at 0 plays no part and the statistic is largest; each replicate moves all boundaries together, as a draw
    of the documents does, and is measured by the standard errors of the others, as the growths are.
    """
    known = [
        (growth, error, _moves(profile, *boundaries))
        for growth, error, boundaries in zip(
            profile.growth(), profile.growth_std_errors(), profile.layout.block_boundaries(), strict=True
        )
        if growth is not None and error
    ]
    if len(known) < 2 or len(known[0][2]) < 3:
        return Apart(None)
    growths, errors, moves = zip(*known, strict=True)
    seen = _unevenness(growths, errors)
    squares, count = [math.fsum(x * x for x in of_block) for of_block in moves], len(moves[0])
    alike = sorted(
        _unevenness(move, [_error_of_others(*pair, count) for pair in zip(squares, move, strict=True)], bounded=False)
        for move in zip(*moves, strict=True)
    )
    p = (1 + sum(t >= seen for t in alike)) / (1 + len(alike))
    if p <= LEVEL or not seen:
        return Apart(p)
    wanted = alike[min(len(alike) - 1, int((1 - LEVEL) * len(alike)))]
    times = (wanted / seen) ** 2  # standard errors fall as one over the root of the documents
    return Apart(p, round(times * profile.num_documents) if times <= WORTH_SAYING else None)


def sure_plan(
    profile: DimensionProfile, config: GeLoRAConfig, sites: Sequence[Site], base_rank: int, **how: Any
) -> RankPlan:
    """`make_plan`, and what `config.on_unsure` makes of ranks that the data do not settle.

    Raises:
        PlanError: see `make_plan`; or they do not, and `on_unsure` is "raise".
    """
    plan = make_plan(profile, config, sites, base_rank, **how)
    if config.on_unsure == "warn" or len(set(plan.ranks)) == 1 or tell_apart(profile).differ:
        return plan
    if config.on_unsure == "raise":
        raise PlanError(
            f"{verdict(plan)} on_unsure is 'raise': give more documents (probe_samples), or choose 'warn' or 'uniform'."
        )
    alike = make_plan(profile, replace(config, policy="uniform"), sites, base_rank, **how)
    logger.warning(
        "%s Every block gets %s instead, because on_unsure is 'uniform'.",
        verdict(plan),
        "your own r" if plan.total_rank is None else f"r = {plan.total_rank}",
    )
    return alike


def verdict(plan: RankPlan) -> str:
    """One or two sentences: whether the blocks differ, and what the ranks are then."""
    if len(set(plan.ranks)) == 1:
        return f"Every block has the same rank: this is LoRA with r = {plan.ranks[0]}."
    profile, apart = plan.profile, tell_apart(plan.profile)
    if apart.p is None:
        return f"How sure these ranks are is not known: the estimator {profile.estimator} gives no standard errors."
    if apart.differ:
        settled = sum(change <= SETTLED for change in plan.rank_changes)
        return f"Blocks differ: {settled} of {len(plan.ranks)} ranks are settled by your data."
    enough = f"; about {_rounded(apart.documents):,} would" if apart.documents else ""
    return (
        f"Your data do not tell the blocks apart ({profile.num_documents:,} documents{enough}): these ranks are one "
        "draw of many."
    )


def _moves(profile: DimensionProfile, before: int, after: int) -> list[float]:
    """How far each replicate moves the growth between two boundaries from their mean."""
    pairs = zip(profile.estimates[before].replicates, profile.estimates[after].replicates, strict=True)
    growths = [b - a for a, b in pairs]
    mean = sum(growths) / len(growths)
    return [growth - mean for growth in growths]


def _error_of_others(squares: float, move: float, count: int) -> float:
    """The standard deviation of `count` moves, of sum 0 and sum of squares `squares`, without one of them."""
    return math.sqrt(max((squares - move * move * count / (count - 1)) / (count - 2), sys.float_info.min))


def _unevenness(growths: Sequence[float], errors: Sequence[float], *, bounded: bool = True) -> float:
    pairs = permutations(zip(growths, errors, strict=True), 2)
    return max(min(g / s if bounded else math.inf, (g - low) / (s + error)) for (g, s), (low, error) in pairs)


def _rounded(count: int) -> int:
    """To two digits: it is known no better."""
    return round(count, 2 - len(str(count)))
