"""Rank policies: (profile, sites, base_rank, config) -> one rank per site. Integers out; no model, no torch."""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.dimension.profile import DimensionProfile, growth
from gelora_plugins.errors import DimensionError, PlanError
from gelora_plugins.ranks.plan import Site


def needs(profile: DimensionProfile, sites: Sequence[Site]) -> list[float]:
    """max(d_{i+1} - d_i, 0) + 1 for the block of each site; 1 where boundary i has no dimension.

    GeLoRA, arXiv 2412.09250, the rank before it is made whole.
    """
    of_block = dict(zip((block.name for block in profile.layout.blocks), profile.growth(), strict=True))
    return [_need(of_block[site.name]) for site in sites]


def gelora(profile: DimensionProfile, sites: Sequence[Site], base_rank: int, config: GeLoRAConfig) -> list[int]:
    """Ranks as published: r_i = max(d_{i+1} - d_i, 0) + 1, made whole as `config.rounding` says.

    The paper does not say how it rounds. `base_rank` plays no part.
    """
    if config.rounding == "dimensions":
        whole = [None if e.value is None else _nearest(e.value) for e in profile.estimates]
        of_block = dict(zip((b.name for b in profile.layout.blocks), growth(whole, profile.layout), strict=True))
        return [int(_need(of_block[site.name])) for site in sites]
    return [_ROUND[config.rounding](need) for need in needs(profile, sites)]


def budget(profile: DimensionProfile, sites: Sequence[Site], base_rank: int, config: GeLoRAConfig) -> list[int]:
    """The relative need of `gelora`, fractions kept, within the LoRA parameters that `base_rank` everywhere costs."""
    return within_budget(needs(profile, sites), sites, base_rank, config.min_rank)


def within_budget(needs: Sequence[float], sites: Sequence[Site], base_rank: int, min_rank: int = 1) -> list[int]:
    """Ranks proportional to `needs`, one per site, within the LoRA parameters that `base_rank` everywhere costs.

    No rank is below `min_rank`, or above what the matrices of its site can hold; where all are at that bound, the rest
    of the budget is not spent. What whole ranks leave over goes to the largest remainders, one rank each, where it
    fits. So no rank is further than 1 from its share, and the cost is exactly the budget where all sites cost the same,
    else under it by less than one rank of any site that got none.

    Args:
        needs: finite numbers, none below 0 and not all 0.

    Raises:
        PlanError: the least ranks alone cost more than the budget.
    """
    if min_rank > base_rank:
        raise PlanError(
            f"min_rank is {min_rank} and r is {base_rank}: the least ranks alone cost more than the budget, which is r "
            "everywhere. Lower min_rank, or raise r."
        )
    costs = [site.parameters_per_rank for site in sites]
    total = base_rank * sum(costs)
    most = [site.most(base_rank) for site in sites]
    least = [min(min_rank, bound) for bound in most]
    exact = proportional([Fraction(need) for need in needs], costs, least, most, total)
    ranks = [math.floor(share) for share in exact]
    left = total - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    order = sorted(range(len(sites)), key=lambda i: (ranks[i] - exact[i], i))  # largest remainder first
    for i in order:
        if costs[i] <= left and ranks[i] < most[i]:
            ranks[i] += 1
            left -= costs[i]
    return ranks


def uniform(profile: DimensionProfile, sites: Sequence[Site], base_rank: int, config: GeLoRAConfig) -> list[int]:
    """`base_rank` at every site: the control that every comparison needs."""
    return [base_rank] * len(sites)


def proportional(
    needs: Sequence[Fraction], costs: Sequence[int], least: Sequence[int], most: Sequence[int], total: int
) -> list[Fraction]:
    """Shares proportional to `needs`, from `least` to `most`, that cost `total` together. Exact arithmetic.

    Of the shares that the common factor puts out of bounds, those on the side that costs more stay at their bound
    whatever the factor becomes; so they are fixed, and the others share the rest (Bitran and Hax 1981).
    """
    shares = [Fraction(bound) for bound in least]
    free = set(range(len(needs)))
    while free:
        left = total - sum(shares[i] * costs[i] for i in range(len(needs)) if i not in free)
        wanted = sum(needs[i] * costs[i] for i in free)
        for i in free:
            shares[i] = needs[i] * left / wanted if wanted else Fraction(0)
        below = {i for i in free if shares[i] < least[i]}
        above = {i for i in free if shares[i] > most[i]}
        if not below and not above:
            break
        over = sum((shares[i] - most[i]) * costs[i] for i in above)
        short = sum((least[i] - shares[i]) * costs[i] for i in below) - over
        fixed = (below if short >= 0 else set()) | (above if short <= 0 else set())
        for i in fixed:
            shares[i] = Fraction(least[i] if i in below else most[i])
        free -= fixed
    return shares


def _need(difference: float | None) -> float:
    return 1.0 if difference is None else max(difference, 0.0) + 1.0


def _nearest(value: float) -> int:
    return math.floor(value + 0.5)


_ROUND: dict[str, Callable[[float], int]] = {
    "nearest": _nearest,
    "ceil": lambda value: math.ceil(value),
    "floor": lambda value: math.floor(value),
}


def check_dimensions(profile: DimensionProfile) -> None:
    """Raises DimensionError unless every boundary but those that enter a stack has a dimension."""
    outputs = {after for _, after in profile.layout.block_boundaries()}
    for boundary, estimate in enumerate(profile.estimates):
        if estimate.degenerate and boundary in outputs:
            raise DimensionError(
                f"Boundary {boundary} has no dimension: {estimate.degenerate} Measure on more varied data, or choose "
                "another pooling (pooling is " + repr(profile.pooling) + ")."
            )
