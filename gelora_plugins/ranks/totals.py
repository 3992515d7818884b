"""How much rank in all: rules (profile, sites, base_rank) -> the rank that every block would get. Integers; no torch.

What they choose is handed to the policy in place of the user's own `r`: `uniform` gives it to every block, and `budget`
spends what it costs.
"""

import math
import statistics
from collections.abc import Callable, Sequence

from gelora_plugins import plugins
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.plan import MAX_RANK, Site

Rule = Callable[[DimensionProfile, Sequence[Site], int], int]

MOST_BY_TOKENS = 256


def total_rank(rank: int | str | None, profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """What `rank` of GeLoRAConfig stands for: itself, what the rule of that name chooses, or `base_rank`.

    Raises:
        ConfigError: the rule does not exist.
        PlanError: the profile lacks what the rule needs, or the rule returned no rank.
    """
    if rank is None or isinstance(rank, int):
        return rank or base_rank
    rule: Rule = plugins.find("rank rule", rank)
    chosen = rule(profile, sites, base_rank)
    if not isinstance(chosen, int) or isinstance(chosen, bool) or not 1 <= chosen <= MAX_RANK:
        raise PlanError(f"The rank rule {rank!r} returned {chosen!r:.80}; expected a whole number, 1 to {MAX_RANK}.")
    return chosen


def auto(profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """8, whatever the data: no rule that was measured beats it. See docs/evidence."""
    return 8


def rows(profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """8, 16, 32 or 64: below 1,000, 10,000 and 100,000 training rows, and above. A table that was proposed to Axolotl.

    Nobody has measured it but as docs/evidence says.
    """
    count = _known(profile.num_rows, "rows", "the number of training rows")
    return next((rank for rank, below in ((8, 1_000), (16, 10_000), (32, 100_000)) if count < below), 64)


def tokens(profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """The least rank with as many LoRA parameters as there are tokens to learn, 1 to 256.

    LoRA wants the capacity for its data set, which for a language model is about as many parameters as completion
    tokens (Schulman et al. 2025, "LoRA Without Regret").
    """
    count = _known(profile.num_targets, "tokens", "how many tokens of the training rows have a label")
    return min(max(math.ceil(count / sum(site.parameters_per_rank for site in sites)), 1), MOST_BY_TOKENS)


def dimension_mean(profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """The mean intrinsic dimension of the boundaries, rounded."""
    return _nearest(statistics.fmean(_dimensions(profile)))


def dimension_max(profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """The largest intrinsic dimension of any boundary, rounded."""
    return _nearest(max(_dimensions(profile)))


def dimension_last(profile: DimensionProfile, sites: Sequence[Site], base_rank: int) -> int:
    """The intrinsic dimension behind the last block, rounded."""
    return _nearest(_dimensions(profile)[-1])


def _dimensions(profile: DimensionProfile) -> list[float]:
    return [estimate.value for estimate in profile.estimates if estimate.value is not None]


def _nearest(value: float) -> int:
    return max(math.floor(value + 0.5), 1)


def _known(value: int | None, rule: str, what: str) -> int:
    if value is None:
        raise PlanError(
            f"The rank rule {rule!r} needs {what}, which this measurement does not know: the data set has no length, "
            "its rows go through a collator, or an earlier version wrote the profile. Set rank to a number."
        )
    return value
