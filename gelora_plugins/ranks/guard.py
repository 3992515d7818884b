"""Whether a plan leaves the late blocks of a model with little. Needs no torch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gelora_plugins.ranks.plan import RankPlan

LATE = 1 / 3  # the share of the blocks of a stack that are its late ones
STARVED = 1 / 2  # of the mean rank of the stack: less is little


def starved(ranks: Sequence[float]) -> tuple[float, float] | None:
    """(mean of the late blocks, mean of all) where the late ones have less than half of the mean; else None.

    Args:
        ranks: of the blocks of one stack, in order, or of what else tells how much each can learn.
    """
    late = ranks[len(ranks) - round(len(ranks) * LATE) :]
    if not late:
        return None
    means = statistics.fmean(late), statistics.fmean(ranks)
    return means if means[0] < STARVED * means[1] else None


def late_note(plan: RankPlan) -> str:
    """One sentence on a plan that starves the late blocks of a stack of the model; empty where none is starved."""
    ranks = {site.name: rank for site, rank in zip(plan.sites, plan.ranks, strict=True)}
    for stack in plan.profile.layout.stacks:
        of_stack = [ranks[block.name] for block in stack if block.name in ranks]
        means = starved(of_stack)
        if means is not None:
            return (
                f"The last third of {len(of_stack)} blocks has a mean rank of {means[0]:.1f}, where all have "
                f"{means[1]:.1f}. Compare with policy 'uniform', or raise min_rank: docs/evidence says what little "
                "rank late in a model cost where that was measured."
            )
    return ""
