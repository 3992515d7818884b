"""Groups of arms at equal LoRA parameters: uniform with a remainder, other orders, what is refused."""

from dataclasses import replace

import pytest

from gelora_plugins.compare.allocations import (
    ALLOCATIONS,
    METHODS,
    check_allocations,
    grid_groups,
    lora,
    permuted,
    plan_group,
    rank_group,
    reversed_order,
    spread,
)
from gelora_plugins.compare.bench import Settings
from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.findings.arms import Arm, Group, Recipe
from gelora_plugins.ranks.plan import Site
from tests.support.plans import make_plan

SITES = tuple(Site(f"layers.{i}", 56) for i in range(6))
ALL = ("plan", "uniform", "permuted", "reversed")


def arms_of(group: Group) -> dict[str, list[tuple[int, ...]]]:
    return {arm.name: [recipe.ranks for recipe in arm.recipes] for arm in group.arms}


def test_the_uniform_control_spreads_the_remainder_evenly() -> None:
    assert spread(6 * 2 * 56, SITES) == (2,) * 6
    assert spread((6 * 2 + 2) * 56, SITES) == (2, 3, 2, 2, 3, 2)
    assert spread((6 + 3) * 56, SITES) == (1, 2, 1, 2, 1, 2)


@pytest.mark.parametrize("total", range(6, 40))
def test_the_uniform_control_costs_what_it_is_to_cost(total: int) -> None:
    ranks = spread(total * 56, SITES)
    assert sum(ranks) == total
    assert max(ranks) - min(ranks) <= 1


def test_less_than_rank_one_everywhere_is_refused() -> None:
    with pytest.raises(PlanError, match="not enough for rank 1 at each of 6 blocks"):
        spread(5 * 56, SITES)


def test_permutations_are_other_orders_of_the_same_ranks() -> None:
    ranks = (3, 2, 1, 2, 2, 1)
    found = permuted(ranks, SITES, 5)
    assert len(set(found)) == 5
    assert ranks not in found
    assert all(sorted(order) == sorted(ranks) for order in found)
    assert found == permuted(ranks, SITES, 5)


def test_no_more_permutations_than_there_are() -> None:
    assert set(permuted((2, 1, 1, 1, 1, 1), SITES, 50)) == {
        tuple(2 if i == place else 1 for i in range(6)) for place in range(1, 6)
    }
    assert permuted((1,) * 6, SITES, 5) == ()


def test_ranks_move_only_between_blocks_of_equal_cost() -> None:
    sites = tuple(Site(f"layers.{i}", 56 if i < 3 else 80) for i in range(6))
    ranks = (4, 2, 1, 3, 1, 1)
    cost = lora(ranks, sites).parameters
    orders = [*permuted(ranks, sites, 5), reversed_order(ranks, sites)]
    assert {lora(order, sites).parameters for order in orders} == {cost}
    assert reversed_order(ranks, sites) == (1, 2, 4, 1, 1, 3)


def test_a_row_holds_the_plan_and_its_controls_at_one_cost() -> None:
    plan = make_plan(ranks=(3, 2, 1, 2, 2, 1))
    group = plan_group("published", plan, ALL, ["lora"], 5)
    found = arms_of(group)
    assert found["published"] == [(3, 2, 1, 2, 2, 1)]
    assert sum(found["uniform"][0]) == 11
    assert len(found["permuted"]) == 5
    assert found["reversed"] == [(1, 2, 2, 1, 2, 3)]
    assert {recipe.parameters for arm in group.arms for recipe in arm.recipes} == {11 * 56}
    assert group.notes == ()


def test_each_seed_of_the_permuted_control_has_an_order_of_its_own() -> None:
    group = plan_group("published", make_plan(), ALL, ["lora"], 5)
    arm = next(arm for arm in group.arms if arm.name == "permuted")
    assert len({arm.recipe(seed) for seed in range(5)}) == 5
    assert arm.recipe(5) == arm.recipe(0)


def test_a_uniform_plan_has_nothing_to_permute_and_says_so() -> None:
    group = plan_group("published", make_plan(ranks=(1,) * 6), ALL, ["lora"], 5)
    assert list(arms_of(group)) == ["published", "uniform"]
    assert group.notes == ("published: the same rank at every block, so there is nothing to permute.",)
    assert group.arms[0].recipes == group.arms[1].recipes, "one training serves both"


def test_a_plan_that_reads_the_same_backwards_has_nothing_to_reverse() -> None:
    group = plan_group("mine", make_plan(ranks=(1, 2, 3, 3, 2, 1)), ALL, ["lora"], 5)
    assert "reversed" not in arms_of(group)
    assert group.notes == ("mine: reads the same backwards, so there is nothing to reverse.",)


def test_methods_that_differ_by_a_hundredth_are_refused() -> None:
    ours, near, far = (Recipe("lora", cost, (1,)) for cost in (10_000, 10_099, 10_100))
    Group("a group", (Arm("plan", (ours,)), Arm("eva", (near,))))
    with pytest.raises(
        PlanError, match=r"'a group' are not at equal parameters: plan has 10,000 and eva 10,100; expec"
    ):
        Group("a group", (Arm("plan", (ours,)), Arm("eva", (far,))))


@pytest.mark.parametrize("name", [*ALLOCATIONS[1:], *METHODS, "uniform r = 3"])
def test_a_plan_named_like_a_method_is_refused_whether_or_not_that_takes_part(name: str) -> None:
    with pytest.raises(ConfigError, match=f"A plan is called '{name}', as an arm of the comparison is"):
        plan_group(name, make_plan(), ("plan",), ["lora"], 5)


def test_a_plan_may_be_called_plan() -> None:
    """As the file is that a training writes."""
    assert plan_group("plan", make_plan(), ALL, ["lora"], 5).arms[0].name == "plan"


def test_two_methods_of_one_name_are_refused() -> None:
    arm = Arm("mine", (Recipe("lora", 100, (1,)),))
    with pytest.raises(PlanError, match="Two arms of 'mine' have one name"):
        Group("mine", (arm, arm))


def test_the_grid_has_a_row_for_each_rank() -> None:
    groups = grid_groups((1, 4), SITES)
    assert [(group.name, group.parameters) for group in groups] == [("uniform r = 1", 336), ("uniform r = 4", 1344)]


def test_an_unknown_allocation_is_named() -> None:
    with pytest.raises(ConfigError, match="There is no allocation 'evil'; expected some of: plan, uniform, permuted"):
        check_allocations(["plan", "evil"])
    with pytest.raises(ConfigError, match="There are no allocations; expected some of: plan"):
        check_allocations([])


def test_an_unknown_method_is_named_and_an_allocation_is_none() -> None:
    with pytest.raises(ConfigError, match=r"method 'evil' does not exist; there are: .*flat_lora"):
        Settings(methods=("lora", "evil"))
    with pytest.raises(ConfigError, match="There is no method 'plan': it is an allocation of ranks"):
        Settings(methods=("plan", "lora"))
    with pytest.raises(ConfigError, match="There are no methods; expected at least lora"):
        Settings(methods=())


def test_each_method_trains_each_allocation() -> None:
    flat = "flat_lora sigma=0.1"
    group = plan_group("mine", make_plan(ranks=(3, 2, 1, 2, 2, 1)), ("plan", "uniform"), ["lora", flat], 5)
    assert [arm.name for arm in group.arms] == ["mine", "uniform", f"{flat} on mine", flat]
    assert [recipe.kind for arm in group.arms for recipe in arm.recipes] == ["lora", "lora", flat, flat]
    assert arms_of(group)[flat] == arms_of(group)["uniform"]
    alone = rank_group(2, SITES, ["lora", flat])
    assert arms_of(alone) == {"uniform": [(2,) * 6], flat: [(2,) * 6]}
    assert alone.name == "r = 2"


def test_rate_only_has_uniform_ranks_and_the_scalings_of_the_plan() -> None:
    """A block's part of the output is scaling times B A, whose size grows with its rank: the plan's, at one rank."""
    group = plan_group("mine", make_plan(ranks=(4, 2, 1, 2, 2, 1)), ("plan", "rate_only"), ["lora"], 5)
    (recipe,) = group.arms[1].recipes
    assert group.arms[1].name == "rate_only"
    assert recipe.ranks == (2,) * 6
    assert recipe.scalings == (2, 1, 0.5, 1, 1, 0.5)
    assert recipe.parameters == group.parameters


def test_recipes_of_before_are_told_as_they_were() -> None:
    """The key of a recorded run is a digest of these."""
    assert list(lora((1,) * 6, SITES).to_dict()) == ["kind", "parameters", "ranks", "budget", "keep_alpha"]


def test_a_recipe_survives_json() -> None:
    recipe = replace(lora((1, 2, 3, 1, 2, 3), SITES), keep_alpha=True)
    assert Recipe.from_dict(recipe.to_dict() | {"ranks": list(recipe.ranks)}) == recipe
    scaled = replace(recipe, scalings=(1.0,) * 6)
    assert Recipe.from_dict(scaled.to_dict() | {"scalings": [1.0] * 6}) == scaled
