"""What is compared: groups of arms at equal LoRA parameters. An arm is an allocation of ranks, and a training method.

Integers and names; no model, no torch.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.findings.arms import GRID, Arm, Group, Recipe
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
    if name in {*ALLOCATIONS[1:], *METHODS, *methods, *(adaptive or {})} or name.startswith(GRID):
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


def check_allocations(names: Sequence[str]) -> None:
    """Raises ConfigError when one of `names` does not exist, or there is none."""
    for name in names:
        if name not in ALLOCATIONS:
            raise ConfigError(f"There is no allocation {name!r}; expected some of: {', '.join(ALLOCATIONS)}.")
    if not names:
        raise ConfigError(f"There are no allocations; expected some of: {', '.join(ALLOCATIONS)}.")
