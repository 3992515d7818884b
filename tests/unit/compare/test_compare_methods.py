"""Rows of methods at equal LoRA parameters: uniform with a remainder, other orders, what is refused."""

from dataclasses import replace

import pytest

from gelora_plugins.compare.allocations import (
    METHODS,
    Method,
    Recipe,
    Row,
    check_methods,
    grid_rows,
    lora,
    permuted,
    plan_row,
    reversed_order,
    spread,
)
from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.ranks.plan import Site
from tests.support.plans import make_plan

SITES = tuple(Site(f"layers.{i}", 56) for i in range(6))
ALL = ("plan", "uniform", "permuted", "reversed")


def methods_of(row: Row) -> dict[str, list[tuple[int, ...]]]:
    return {method.name: [recipe.ranks for recipe in method.recipes] for method in row.methods}


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
    row = plan_row("published", plan, ALL, 5)
    found = methods_of(row)
    assert found["published"] == [(3, 2, 1, 2, 2, 1)]
    assert sum(found["uniform"][0]) == 11
    assert len(found["permuted"]) == 5
    assert found["reversed"] == [(1, 2, 2, 1, 2, 3)]
    assert {recipe.parameters for method in row.methods for recipe in method.recipes} == {11 * 56}
    assert row.notes == ()


def test_each_seed_of_the_permuted_control_has_an_order_of_its_own() -> None:
    row = plan_row("published", make_plan(), ALL, 5)
    method = next(method for method in row.methods if method.name == "permuted")
    assert len({method.recipe(seed) for seed in range(5)}) == 5
    assert method.recipe(5) == method.recipe(0)


def test_a_uniform_plan_has_nothing_to_permute_and_says_so() -> None:
    row = plan_row("published", make_plan(ranks=(1,) * 6), ALL, 5)
    assert list(methods_of(row)) == ["published", "uniform"]
    assert row.notes == ("published: the same rank at every block, so there is nothing to permute.",)
    assert row.methods[0].recipes == row.methods[1].recipes, "one training serves both"


def test_a_plan_that_reads_the_same_backwards_has_nothing_to_reverse() -> None:
    row = plan_row("mine", make_plan(ranks=(1, 2, 3, 3, 2, 1)), ALL, 5)
    assert "reversed" not in methods_of(row)
    assert row.notes == ("mine: reads the same backwards, so there is nothing to reverse.",)


def test_methods_that_differ_by_a_hundredth_are_refused() -> None:
    ours, near, far = (Recipe("lora", cost, (1,)) for cost in (10_000, 10_099, 10_100))
    Row("a row", (Method("plan", (ours,)), Method("eva", (near,))))
    with pytest.raises(PlanError, match=r"'a row' are not at equal parameters: plan has 10,000 and eva 10,100; expec"):
        Row("a row", (Method("plan", (ours,)), Method("eva", (far,))))


@pytest.mark.parametrize("name", [*METHODS[1:], "uniform r = 3"])
def test_a_plan_named_like_a_method_is_refused_whether_or_not_that_takes_part(name: str) -> None:
    with pytest.raises(ConfigError, match=f"A plan is called '{name}', as a method of the comparison is"):
        plan_row(name, make_plan(), ("plan",), 5)


def test_a_plan_may_be_called_plan() -> None:
    """As the file is that a training writes."""
    assert plan_row("plan", make_plan(), ALL, 5).methods[0].name == "plan"


def test_two_methods_of_one_name_are_refused() -> None:
    method = Method("mine", (Recipe("lora", 100, (1,)),))
    with pytest.raises(PlanError, match="Two methods of 'mine' have one name"):
        Row("mine", (method, method))


def test_the_grid_has_a_row_for_each_rank() -> None:
    rows = grid_rows((1, 4), SITES)
    assert [(row.name, row.parameters) for row in rows] == [("uniform r = 1", 336), ("uniform r = 4", 1344)]


def test_an_unknown_method_is_named() -> None:
    with pytest.raises(ConfigError, match="There is no method 'evil'; expected some of: plan, uniform, permuted"):
        check_methods(["plan", "evil"])


def test_a_recipe_survives_json() -> None:
    recipe = replace(lora((1, 2, 3, 1, 2, 3), SITES), keep_alpha=True)
    assert Recipe.from_dict(recipe.to_dict() | {"ranks": list(recipe.ranks)}) == recipe
