"""Random allocations at the cost of a plan: all that exist, each as likely as any other, and what is refused."""

import itertools
from typing import Any

import pytest

from gelora_plugins.compare.allocations import headroom_group, plan_group, random_allocations
from gelora_plugins.compare.bench import Settings
from gelora_plugins.errors import ConfigError
from gelora_plugins.ranks.plan import Site
from tests.support.plans import make_plan

ALIKE = tuple(Site(f"layers.{i}", 56) for i in range(3))
UNLIKE = (Site("a", 8, 4), Site("b", 12, 3), Site("c", 8, 2), Site("d", 20, 9))


def all_of(total: int, sites: tuple[Site, ...], most: int) -> set[tuple[int, ...]]:
    """By trying everything."""
    ranges = (range(1, min(site.most(1), most) + 1) for site in sites)
    costs = [site.parameters_per_rank for site in sites]
    return {r for r in itertools.product(*ranges) if sum(a * b for a, b in zip(r, costs, strict=True)) == total}


@pytest.mark.parametrize(("ranks", "sites"), [((2, 2, 2), ALIKE), ((3, 3, 2, 2), UNLIKE), ((1, 1, 1), ALIKE)])
def test_every_allocation_at_that_cost_can_be_drawn_and_no_other(
    ranks: tuple[int, ...], sites: tuple[Site, ...]
) -> None:
    total = sum(rank * site.parameters_per_rank for rank, site in zip(ranks, sites, strict=True))
    drawn = random_allocations(ranks, sites, 1000, base_rank=1)
    assert len(drawn) == len(set(drawn))
    assert set(drawn) == all_of(total, sites, 10)


def test_allocations_are_drawn_alike_often() -> None:
    """Ten exist. Of 2,000 single draws each comes to 200, with a standard deviation of 13.4: within 5 of those."""
    counts: dict[tuple[int, ...], int] = {}
    for seed in range(2000):
        (drawn,) = random_allocations((2, 2, 2), ALIKE, 1, base_rank=1, seed=seed)
        counts[drawn] = counts.get(drawn, 0) + 1
    assert len(counts) == 10
    assert max(abs(count - 200) for count in counts.values()) < 5 * 13.4


def test_a_draw_is_that_of_its_seed_and_many_ranks_are_no_trouble() -> None:
    sites = tuple(Site(f"layers.{i}", 56, 512) for i in range(48))
    drawn = random_allocations((64,) * 48, sites, 20, base_rank=64)
    assert drawn == random_allocations((64,) * 48, sites, 20, base_rank=64)
    assert len(set(drawn)) == 20
    assert {sum(ranks) for ranks in drawn} == {64 * 48}
    assert drawn != random_allocations((64,) * 48, sites, 20, base_rank=64, seed=1)


def test_where_few_allocations_exist_that_is_a_note() -> None:
    group, notes = headroom_group("mine", 56 * 4, 5, ALIKE, base_rank=2)
    assert group is not None
    assert [arm.name for arm in group.arms] == ["uniform", "random 1", "random 2", "random 3"]
    assert group.name == "headroom of mine"
    assert notes == ("headroom of mine: 3 allocations exist, not 5.",)
    assert headroom_group("mine", 56 * 3, 5, ALIKE, base_rank=2) == (
        None,
        ("headroom of mine: 1 allocations exist, not 5.",),
    )


def test_a_plan_cannot_have_the_name_of_a_group_of_random_allocations() -> None:
    with pytest.raises(ConfigError, match="A plan is called 'headroom of mine'"):
        plan_group("headroom of mine", make_plan(), ("plan",), ["lora"], 3)


@pytest.mark.parametrize("options", [{"headroom": 2}, {"headroom": 3, "seeds": 1}, {"headroom": -1}])
def test_too_few_to_have_a_spread_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(ConfigError, match="at least 3 random allocations and 2 seeds"):
        Settings(**options)


@pytest.mark.parametrize("options", [{"allocations": ("grid",)}, {"methods": ("eva",)}])
def test_without_uniform_ranks_there_is_no_rate_to_take(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="headroom needs uniform among the allocations and lora"):
        Settings(headroom=5, **options)
