"""What is compared: groups of arms at equal LoRA parameters. An arm is an allocation of ranks, and a training method.

Integers and names; no model, no torch.
"""

from __future__ import annotations

import math
import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.findings.arms import GRID, HEADROOM, Arm, Group, Recipe
from gelora_plugins.ranks.plan import RankPlan, Site

OF_A_PLAN = ("plan", "permuted", "reversed", "rate_only")
ALLOCATIONS = ("plan", "uniform", "permuted", "reversed", "grid", "rate_only")
USUAL = ALLOCATIONS[:-1]
METHODS = ("lora", "eva", "adalora", "full")


def lora(ranks: Sequence[int], sites: Sequence[Site], *, keep_alpha: bool = False) -> Recipe:
    """The recipe of LoRA with these ranks, one per site."""
    cost = sum(rank * site.parameters_per_rank for rank, site in zip(ranks, sites, strict=True))
    return Recipe("lora", cost, tuple(ranks), keep_alpha=keep_alpha)


def spread(total: int, sites: Sequence[Site]) -> tuple[int, ...]:
    """Ranks that cost as near `total` as they can and differ by at most 1: the larger ones evenly over the blocks.

    The uniform control where the equal uniform rank is not a whole number.
    """
    costs = [site.parameters_per_rank for site in sites]
    low = total // sum(costs)
    candidates = [_raised(low, count, len(sites)) for count in range(len(sites) + 1)]
    ranks = min(candidates, key=lambda ranks: abs(sum(r * c for r, c in zip(ranks, costs, strict=True)) - total))
    if min(ranks) < 1:
        raise PlanError(f"{total:,} LoRA parameters are not enough for rank 1 at each of {len(sites)} blocks.")
    return ranks


def _raised(low: int, count: int, size: int) -> tuple[int, ...]:
    """`size` ranks: `low`, and `low + 1` at `count` places as far from each other as they can be."""
    places = {int((j + 0.5) * size / count) for j in range(count)}
    return tuple(low + (i in places) for i in range(size))


def permuted(ranks: Sequence[int], sites: Sequence[Site], count: int, seed: int = 0) -> tuple[tuple[int, ...], ...]:
    """Up to `count` other orders of `ranks`, drawn at random, each different from the others and from `ranks`.

    Ranks move only between blocks where one rank costs the same, so the parameters stay as they were. Empty where no
    other order exists.
    """
    rng = random.Random(seed)
    found: dict[tuple[int, ...], None] = {}
    for _ in range(100 * count):
        order = _within_equal_cost(ranks, sites, lambda group: rng.sample(group, len(group)))
        if order != tuple(ranks):
            found[order] = None
        if len(found) == count:
            break
    return tuple(found)


def reversed_order(ranks: Sequence[int], sites: Sequence[Site]) -> tuple[int, ...]:
    """The ranks from the last block to the first, among blocks where one rank costs the same."""
    return _within_equal_cost(ranks, sites, lambda group: group[::-1])


def _within_equal_cost(
    ranks: Sequence[int], sites: Sequence[Site], reorder: Callable[[list[int]], list[int]]
) -> tuple[int, ...]:
    groups = defaultdict(list)
    for i, site in enumerate(sites):
        groups[site.parameters_per_rank].append(i)
    result = list(ranks)
    for places in groups.values():
        for place, rank in zip(places, reorder([ranks[i] for i in places]), strict=True):
            result[place] = rank
    return tuple(result)


def plan_group(
    name: str,
    plan: RankPlan,
    allocations: Sequence[str],
    methods: Sequence[str],
    permutations: int,
    adaptive: Mapping[str, Recipe] | None = None,
    *,
    keep_alpha: bool = False,
) -> Group:
    """The plan and its controls at its own cost, each trained by each method, and what `adaptive` holds.

    Args:
        name: of the group, and of the plan as an allocation.
        allocations: which of ALLOCATIONS to take.
        methods: how each of them is trained: "lora" and others that take ranks as they are given.
        permutations: how many other orders; seed number s trains the s-th of them.
        adaptive: methods that choose ranks themselves, at the cost of this plan.
        keep_alpha: see `Recipe`; for the plan and its orders, not for uniform.

    Raises:
        ConfigError: the plan is called as an arm is, so that the two could not be told apart where runs are read.
    """
    if name in {*ALLOCATIONS[1:], *METHODS, *methods, *(adaptive or {})} or name.startswith((GRID, HEADROOM)):
        raise ConfigError(
            f"A plan is called {name!r}, as an arm of the comparison is. Give its file, which names it, another name."
        )
    sites, notes = plan.sites, []
    found: dict[str, tuple[Recipe, ...]] = {}
    uniform = lora(spread(plan.num_parameters, sites), sites)
    if "plan" in allocations:
        found[name] = (lora(plan.ranks, sites, keep_alpha=keep_alpha),)
    if "uniform" in allocations:
        found["uniform"] = (uniform,)
    others = permuted(plan.ranks, sites, permutations) if "permuted" in allocations else ()
    if others:
        found["permuted"] = tuple(lora(ranks, sites, keep_alpha=keep_alpha) for ranks in others)
    elif "permuted" in allocations:
        notes.append(f"{name}: the same rank at every block, so there is nothing to permute.")
    backwards = reversed_order(plan.ranks, sites)
    if "reversed" in allocations and backwards != plan.ranks:
        found["reversed"] = (lora(backwards, sites, keep_alpha=keep_alpha),)
    elif "reversed" in allocations and others:
        notes.append(f"{name}: reads the same backwards, so there is nothing to reverse.")
    if "rate_only" in allocations:
        scalings = tuple(rank / own for rank, own in zip(plan.ranks, uniform.ranks, strict=True))
        found["rate_only"] = (replace(uniform, scalings=scalings),)
    return Group(name, _arms(found, methods, adaptive), tuple(notes))


def rank_group(
    rank: int, sites: Sequence[Site], methods: Sequence[str], adaptive: Mapping[str, Recipe] | None = None
) -> Group:
    """One rank everywhere, trained by each method, and what `adaptive` holds: where there is no plan to compare."""
    return Group(f"r = {rank}", _arms({"uniform": (lora([rank] * len(sites), sites),)}, methods, adaptive))


def _arms(
    allocations: Mapping[str, tuple[Recipe, ...]], methods: Sequence[str], adaptive: Mapping[str, Recipe] | None
) -> tuple[Arm, ...]:
    found = [
        Arm(arm_name(allocation, method), tuple(replace(recipe, kind=method) for recipe in recipes))
        for method in methods
        for allocation, recipes in allocations.items()
    ]
    return tuple(found) + tuple(Arm(kind, (recipe,)) for kind, recipe in (adaptive or {}).items())


def arm_name(allocation: str, method: str) -> str:
    """The allocation alone where LoRA trains it, the method alone where ranks are uniform."""
    if method == "lora":
        return allocation
    return method if allocation == "uniform" else f"{method} on {allocation}"


def grid_groups(ranks: Sequence[int], sites: Sequence[Site]) -> tuple[Group, ...]:
    """One group for each rank that a user would otherwise search."""
    return tuple(Group(f"{GRID}{rank}", (Arm("uniform", (lora([rank] * len(sites), sites),)),)) for rank in ranks)


def headroom_group(
    name: str, total: int, count: int, sites: Sequence[Site], base_rank: int
) -> tuple[Group | None, tuple[str, ...]]:
    """Uniform ranks at `total` parameters and up to `count` random allocations at the same; notes.

    No group where fewer than two exist, so that there is nothing to move.
    """
    ranks = spread(total, sites)
    drawn = random_allocations(ranks, sites, count, base_rank)
    notes = () if len(drawn) == count else (f"{HEADROOM}{name}: {len(drawn)} allocations exist, not {count}.",)
    if len(drawn) < 2:
        return None, notes
    arms = {"uniform": ranks} | {f"random {i}": found for i, found in enumerate(drawn, 1)}
    return Group(HEADROOM + name, tuple(Arm(arm, (lora(found, sites),)) for arm, found in arms.items())), notes


def random_allocations(
    ranks: Sequence[int], sites: Sequence[Site], count: int, base_rank: int, seed: int = 0
) -> tuple[tuple[int, ...], ...]:
    """Up to `count` different allocations that cost exactly what `ranks` do, each as likely as any other.

    They are drawn from all that give each site a whole rank from 1 to the largest that it can use (`Site.most`). Where
    one rank costs the same everywhere those are the compositions of the sum of the ranks. All, in random order, where
    there are no more than `count`.
    """
    unit = math.gcd(*(site.parameters_per_rank for site in sites))
    costs = [site.parameters_per_rank // unit for site in sites]
    total = sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    mosts = [min(site.most(base_rank), total // cost) for site, cost in zip(sites, costs, strict=True)]
    ways = [[1] + [0] * total]  # ways[i][s]: in how many ways the first i sites cost s
    for cost, most in zip(costs, mosts, strict=True):
        before, found = ways[-1], [0] * (total + 1)
        for s in range(cost, total + 1):
            too_high = s - (most + 1) * cost
            found[s] = found[s - cost] + before[s - cost] - (before[too_high] if too_high >= 0 else 0)
        ways.append(found)
    rng, exist = random.Random(seed), ways[-1][total]
    places: dict[int, None] = {}
    while len(places) < min(count, exist):
        places[rng.randrange(exist)] = None
    return tuple(_at_place(place, total, costs, ways) for place in places)


def _at_place(place: int, left: int, costs: Sequence[int], ways: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The allocation number `place` of those that cost `left`, counted by the rank of the last site, then the next."""
    ranks = []
    for cost, before in zip(costs[::-1], ways[-2::-1], strict=True):
        rank = 1
        while place >= before[left - rank * cost]:
            place -= before[left - rank * cost]
            rank += 1
        ranks.append(rank)
        left -= rank * cost
    return tuple(ranks[::-1])


def check_allocations(names: Sequence[str]) -> None:
    """Raises ConfigError when one of `names` does not exist, or there is none."""
    for name in names:
        if name not in ALLOCATIONS:
            raise ConfigError(f"There is no allocation {name!r}; expected some of: {', '.join(ALLOCATIONS)}.")
    if not names:
        raise ConfigError(f"There are no allocations; expected some of: {', '.join(ALLOCATIONS)}.")
