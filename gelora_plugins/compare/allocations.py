"""What is compared: rows of methods that cost the same number of LoRA parameters. Integers; no model, no torch."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.ranks.plan import RankPlan, Site

TOLERANCE = 0.01  # LoRA parameters of the methods of a row may differ by this share, and no more
GRID = "uniform r = "
METHODS = ("plan", "uniform", "permuted", "reversed", "eva", "adalora", "grid", "full")


@dataclass(frozen=True)
class Recipe:
    """What one training run adapts, and how; with a seed and a learning rate it is a run.

    Attributes:
        kind: "lora", "eva", "adalora" or "full".
        ranks: one per site for "lora", else empty.
        budget: sum of the ranks over all target modules for "eva" and "adalora", else 0.
        keep_alpha: whether lora_alpha is the same everywhere, so that the scaling falls with the rank; else the
            scaling is the same everywhere.
        parameters: LoRA parameters, heads not counted; for "full" all parameters.
    """

    kind: str
    parameters: int
    ranks: tuple[int, ...] = ()
    budget: int = 0
    keep_alpha: bool = False

    def to_dict(self) -> dict[str, Any]:
        """JSON-able values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Recipe:
        """Inverse of `to_dict`."""
        return cls(**{**data, "ranks": tuple(data["ranks"])})


@dataclass(frozen=True)
class Method:
    """A name, and what it trains: seed number s trains `recipes[s % len(recipes)]`; more than one for "permuted"."""

    name: str
    recipes: tuple[Recipe, ...]

    def recipe(self, seed: int) -> Recipe:
        """What this method trains with `seed`."""
        return self.recipes[seed % len(self.recipes)]


@dataclass(frozen=True)
class Row:
    """Methods at equal LoRA parameters.

    Raises:
        PlanError: two methods differ by 1 % or more.
    """

    name: str
    methods: tuple[Method, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [method.name for method in self.methods]
        if len(set(names)) != len(names):
            raise PlanError(f"Two methods of {self.name!r} have one name: {', '.join(names)}. Name the plan otherwise.")
        costs = {method.name: recipe.parameters for method in self.methods for recipe in method.recipes}
        least, most = min(costs, key=lambda name: costs[name]), max(costs, key=lambda name: costs[name])
        if costs[most] - costs[least] >= TOLERANCE * costs[least]:
            raise PlanError(
                f"The methods of {self.name!r} are not at equal parameters: {least} has {costs[least]:,} and {most} "
                f"{costs[most]:,}; expected less than {TOLERANCE:.0%} between them. Adapt target modules of one size, "
                "or leave out the method."
            )

    @property
    def parameters(self) -> int:
        """LoRA parameters of the first method."""
        return self.methods[0].recipes[0].parameters


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


def plan_row(
    name: str,
    plan: RankPlan,
    methods: Sequence[str],
    permutations: int,
    adaptive: Mapping[str, Recipe] | None = None,
    *,
    keep_alpha: bool = False,
) -> Row:
    """The plan and its controls at its own cost: uniform, permuted, reversed, and what `adaptive` holds.

    Args:
        name: of the row; the plan's method has the same name.
        methods: which of METHODS to take.
        permutations: how many other orders; seed number s trains the s-th of them.
        adaptive: EVA and AdaLoRA at the cost of this plan.
        keep_alpha: see `Recipe`; for the plan and its orders, not for uniform.

    Raises:
        ConfigError: the plan is called as a method is, so that the two could not be told apart where runs are read.
    """
    if name in METHODS[1:] or name.startswith(GRID):
        raise ConfigError(
            f"A plan is called {name!r}, as a method of the comparison is. Give its file, which names it, another name."
        )
    sites, notes = plan.sites, []
    found = [Method(name, (lora(plan.ranks, sites, keep_alpha=keep_alpha),))]
    if "uniform" in methods:
        found.append(Method("uniform", (lora(spread(plan.num_parameters, sites), sites),)))
    others = permuted(plan.ranks, sites, permutations) if "permuted" in methods else ()
    if others:
        found.append(Method("permuted", tuple(lora(ranks, sites, keep_alpha=keep_alpha) for ranks in others)))
    elif "permuted" in methods:
        notes.append(f"{name}: the same rank at every block, so there is nothing to permute.")
    backwards = reversed_order(plan.ranks, sites)
    if "reversed" in methods and backwards != plan.ranks:
        found.append(Method("reversed", (lora(backwards, sites, keep_alpha=keep_alpha),)))
    elif "reversed" in methods and others:
        notes.append(f"{name}: reads the same backwards, so there is nothing to reverse.")
    found += [Method(kind, (recipe,)) for kind, recipe in (adaptive or {}).items() if kind in methods]
    return Row(name, tuple(found), tuple(notes))


def grid_rows(ranks: Sequence[int], sites: Sequence[Site]) -> tuple[Row, ...]:
    """One row for each rank that a user would otherwise search."""
    return tuple(Row(f"{GRID}{rank}", (Method("uniform", (lora([rank] * len(sites), sites),)),)) for rank in ranks)


def check_methods(methods: Sequence[str]) -> None:
    """Raises ConfigError when one of `methods` does not exist."""
    for method in methods:
        if method not in METHODS:
            raise ConfigError(f"There is no method {method!r}; expected some of: {', '.join(METHODS)}.")
