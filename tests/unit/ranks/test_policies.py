from dataclasses import replace
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import DimensionError, PlanError
from gelora_plugins.ranks.planning import make_plan
from gelora_plugins.ranks.policies import budget, check_dimensions, gelora, needs, uniform
from gelora_plugins.report.rank_report import RankReport
from tests.support.plans import SST2, make_profile, make_sites

CONFIG = GeLoRAConfig()


def ranks_of(policy, *stacks, base_rank=8, costs=None, rounding="nearest"):
    profile = make_profile(*stacks)
    return policy(profile, make_sites(profile, costs), base_rank, GeLoRAConfig(rounding=rounding))


# --- gelora, as published


@pytest.mark.parametrize(
    ("rounding", "ranks"),
    [
        ("dimensions", [3, 2, 1, 2, 2, 1]),  # 15 17 18 17 18 19 16
        ("nearest", [3, 2, 1, 1, 2, 1]),  # 3.2 1.6 1 1.4 2.3 1
        ("ceil", [4, 2, 1, 2, 3, 1]),
        ("floor", [3, 1, 1, 1, 2, 1]),
    ],
)
def test_gelora_on_the_dimensions_of_sst2(rounding, ranks):
    assert ranks_of(gelora, SST2, rounding=rounding) == ranks


@pytest.mark.parametrize(
    ("rounding", "ranks"),
    [("dimensions", [1, 3]), ("nearest", [2, 3]), ("ceil", [2, 3]), ("floor", [1, 2])],
)
def test_halves_are_rounded_up_and_not_to_even(rounding, ranks):
    assert ranks_of(gelora, [10.5, 11.0, 12.5], rounding=rounding) == ranks


@pytest.mark.parametrize("rounding", ["nearest", "ceil", "floor", "dimensions"])
def test_gelora_gives_rank_one_where_the_dimension_does_not_grow(rounding):
    assert ranks_of(gelora, [20.0, 20.0, 12.0, 3.0], rounding=rounding) == [1, 1, 1]


def test_gelora_does_not_look_at_the_base_rank():
    assert ranks_of(gelora, SST2, base_rank=1) == ranks_of(gelora, SST2, base_rank=64)


@pytest.mark.parametrize("rounding", ["nearest", "ceil", "floor", "dimensions"])
def test_a_first_boundary_without_dimension_gives_its_block_rank_one(rounding):
    assert ranks_of(gelora, [None, 30.0, 32.0], rounding=rounding) == [1, 3]


@pytest.mark.parametrize("rounding", ["nearest", "ceil", "floor", "dimensions"])
def test_two_stacks_do_not_grow_into_each_other(rounding):
    # From the encoder's last boundary, 12, to the decoder's first, 30, there is no block.
    assert ranks_of(gelora, [10.0, 11.0, 12.0], [30.0, 32.0, 29.0], rounding=rounding) == [2, 2, 3, 1]
    assert ranks_of(gelora, [10.0, 11.0, 12.0], [None, 32.0, 33.0], rounding=rounding) == [2, 2, 1, 2]


def test_sites_may_be_fewer_than_blocks_and_in_another_order():
    profile = make_profile(SST2)
    sites = make_sites(profile)
    assert gelora(profile, [sites[4], sites[0]], 8, GeLoRAConfig(rounding="dimensions")) == [2, 3]
    assert needs(profile, [sites[4], sites[0]]) == pytest.approx([2.3, 3.2])


# --- budget


def test_budget_by_hand():
    # Needs 3, 1, 1 within 12 ranks: 7.2, 2.4, 2.4. One rank is left over; the first of the largest remainders has it.
    assert ranks_of(budget, [10.0, 12.0, 12.0, 11.0], base_rank=4) == [7, 3, 2]


def test_budget_floors_at_one_and_takes_what_that_costs_from_the_others():
    # Needs 21, 1, 1 within 6 ranks: 5.5, 0.3, 0.3 in proportion.
    assert ranks_of(budget, [10.0, 30.0, 30.0, 30.0], base_rank=2) == [4, 1, 1]


def test_budget_takes_the_least_rank_from_the_others():
    # Needs 21, 1, 1 within 12 ranks: 10.96, 0.52, 0.52 in proportion, and 3 is the least.
    profile = make_profile([10.0, 30.0, 30.0, 30.0])
    assert budget(profile, make_sites(profile), 4, GeLoRAConfig(min_rank=3)) == [6, 3, 3]
    assert budget(profile, make_sites(profile), 4, GeLoRAConfig(min_rank=4)) == [4, 4, 4]


def test_a_least_rank_that_costs_more_than_the_budget_is_refused():
    profile = make_profile(SST2)
    with pytest.raises(PlanError, match=r"min_rank is 5 and r is 4: .* Lower min_rank, or raise r\."):
        budget(profile, make_sites(profile), 4, GeLoRAConfig(min_rank=5))


def test_a_least_rank_above_what_a_matrix_can_hold_is_held_to_that():
    profile = make_profile([10.0, 30.0, 30.0])
    sites = (replace(make_sites(profile)[0], max_rank=16), replace(make_sites(profile)[1], max_rank=2))
    assert budget(profile, sites, 4, GeLoRAConfig(min_rank=3)) == [5, 3]  # the user's own r may be more than it holds
    assert make_plan(profile, GeLoRAConfig(min_rank=3), sites, 2, lora_alpha=4).ranks == (16, 2)


@pytest.mark.parametrize("policy", ["gelora", "uniform"])
def test_no_policy_chooses_below_the_least_rank(policy):
    profile = make_profile(SST2)
    config = GeLoRAConfig(policy=policy, min_rank=2)
    plan = make_plan(profile, config, make_sites(profile), 1, lora_alpha=2)
    assert min(plan.ranks) == plan.min_rank == 2
    assert max(plan.ranks) == (3 if policy == "gelora" else 2)


def test_budget_counts_parameters_and_not_ranks():
    # Needs 3, 1 at costs 10, 30 within 4 * 40 parameters: ranks 8, 2.67; the 20 left over buy one of the cheap ones.
    assert ranks_of(budget, [10.0, 12.0, 12.0], base_rank=4, costs=[10, 30]) == [9, 2]


def test_budget_spreads_a_first_boundary_without_dimension_as_the_smallest_need():
    assert ranks_of(budget, [None, 30.0, 31.0], base_rank=6) == [4, 8]


def test_budget_over_two_stacks():
    assert ranks_of(budget, [10.0, 12.0], [40.0, 40.0], base_rank=8) == [12, 4]


def test_budget_of_a_profile_that_never_grows_is_uniform():
    assert ranks_of(budget, [20.0, 19.0, 18.0], base_rank=8) == [8, 8]


@pytest.mark.parametrize("costs", [None, [10, 20, 30, 40, 50, 60]])
def test_budget_of_rank_one_is_rank_one_everywhere(costs):
    assert ranks_of(budget, SST2, base_rank=1, costs=costs) == [1] * 6


def test_a_large_budget_is_spent_in_proportion_to_the_needs():
    profile = make_profile(SST2)
    sites = make_sites(profile)
    ranks = budget(profile, sites, 10_000, CONFIG)
    exact = [60_000 * need / sum(needs(profile, sites)) for need in needs(profile, sites)]
    assert all(abs(rank - share) < 1 for rank, share in zip(ranks, exact, strict=True))


def shares(stack, costs, base_rank):
    """Ranks in proportion to the needs, not below 1, that cost the budget: by bisection on the factor."""
    profile = make_profile(stack)
    wanted = [Fraction(need) for need in needs(profile, make_sites(profile))]
    low, high = Fraction(0), Fraction(10**12)
    for _ in range(120):
        middle = (low + high) / 2
        cost = sum(c * max(need * middle, 1) for need, c in zip(wanted, costs, strict=True))
        low, high = (middle, high) if cost <= base_rank * sum(costs) else (low, middle)
    return [float(max(need * low, 1)) for need in wanted]


dimensions = st.floats(0.5, 200)


@st.composite
def problems(draw, equal_costs):
    blocks = draw(st.integers(1, 40))
    first = draw(st.none() | dimensions)
    rest = draw(st.lists(dimensions, min_size=blocks, max_size=blocks))
    cost = st.integers(1, 100_000)
    costs = [draw(cost)] * blocks if equal_costs else draw(st.lists(cost, min_size=blocks, max_size=blocks))
    return [first, *rest], costs, draw(st.integers(1, 300))


@settings(max_examples=100)
@given(problems(equal_costs=False))
def test_budget_is_never_exceeded_and_every_rank_is_within_one_of_its_share(problem):
    stack, costs, base_rank = problem
    ranks = ranks_of(budget, stack, costs=costs, base_rank=base_rank)
    left = sum(base_rank * cost for cost in costs) - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    assert all(type(rank) is int and rank >= 1 for rank in ranks)
    assert left >= 0
    assert left == 0 or left < max(costs), "a site that got none of it costs more than what is left"
    exact = shares(stack, costs, base_rank)
    assert all(abs(rank - share) <= 1 + 1e-6 for rank, share in zip(ranks, exact, strict=True))


@settings(max_examples=100)
@given(problems(equal_costs=True))
def test_budget_is_spent_exactly_and_in_the_order_of_the_needs_where_all_costs_are_equal(problem):
    stack, costs, base_rank = problem
    ranks = ranks_of(budget, stack, costs=costs, base_rank=base_rank)
    profile = make_profile(stack)
    assert sum(ranks) == base_rank * len(ranks)
    by_need = [rank for _, _, rank in sorted(zip(needs(profile, make_sites(profile)), range(999), ranks, strict=False))]
    assert all(later >= earlier - 1 for i, earlier in enumerate(by_need) for later in by_need[i:])


def bounded(profile, costs, most):
    sites = make_sites(profile, costs)
    return tuple(replace(site, max_rank=bound) for site, bound in zip(sites, most, strict=True))


def test_budget_stays_below_what_the_matrices_hold_and_gives_the_rest_to_the_others():
    # needs 3.2 1.6 1 1.4 2.3 1 over 24 ranks: 7.31 3.66 2.29 3.2 5.26 2.29; the first and the fifth hold 4.
    profile = make_profile(SST2)
    ranks = budget(profile, bounded(profile, None, [4, 8, 8, 8, 4, 8]), 4, CONFIG)
    assert (ranks[0], ranks[4]) == (4, 4)
    # 16 ranks over needs of 1.6 1 1.4 1 are 5.12 3.2 4.48 3.2.
    assert (ranks[1], ranks[2], ranks[3], ranks[5]) == (5, 3, 5, 3)


def test_what_no_matrix_can_hold_is_not_spent_and_the_report_says_so():
    profile = make_profile(SST2)
    sites = bounded(profile, None, [5, 4, 4, 4, 4, 4])
    plan = make_plan(profile, GeLoRAConfig(policy="budget"), sites, 4, lora_alpha=16)
    assert plan.ranks[0] == 5
    assert max(plan.ranks[1:]) == 4
    said = "1 of 6 blocks have the largest rank that a matrix in them can use."
    assert said in RankReport(plan).lines()
    nowhere = replace(plan, ranks=(5, 1, 1, 1, 1, 1))
    assert f"{said} 784 parameters of the budget could not be spent." in RankReport(nowhere).lines()


@settings(max_examples=100, deadline=None)
@given(problems(equal_costs=False), st.data())
def test_budget_with_bounds_is_never_exceeded_and_is_spent_where_it_can_be(problem, data):
    stack, costs, base_rank = problem
    most = data.draw(st.lists(st.integers(1, 500), min_size=len(costs), max_size=len(costs)))
    profile = make_profile(stack)
    sites = bounded(profile, costs, most)
    ranks = budget(profile, sites, base_rank, CONFIG)
    left = base_rank * sum(costs) - sum(rank * cost for rank, cost in zip(ranks, costs, strict=True))
    bounds = [max(bound, base_rank) for bound in most]
    assert all(1 <= rank <= bound for rank, bound in zip(ranks, bounds, strict=True))
    room = [cost for rank, bound, cost in zip(ranks, bounds, costs, strict=True) if rank < bound]
    assert 0 <= left < max(room, default=float("inf")) or not room


@pytest.mark.parametrize("name", ["gelora", "budget", "uniform"])
def test_no_policy_gives_more_than_the_matrices_hold_or_the_user_asked_for(name):
    profile = make_profile([1.0, 90.0, 2.0])
    plan = make_plan(profile, GeLoRAConfig(policy=name), bounded(profile, None, [8, 8]), 6, lora_alpha=16)
    assert max(plan.ranks) <= 8
    wide = make_plan(profile, GeLoRAConfig(policy=name), bounded(profile, None, [8, 8]), 16, lora_alpha=16)
    assert max(wide.ranks) <= 16


# --- uniform


def test_uniform_gives_the_base_rank_everywhere():
    assert ranks_of(uniform, SST2, base_rank=7) == [7] * 6


# --- check_dimensions


def test_a_boundary_that_enters_a_stack_may_lack_a_dimension():
    check_dimensions(make_profile([None, 10.0, 11.0]))
    check_dimensions(make_profile([None, 10.0, 11.0], [None, 12.0]))


@pytest.mark.parametrize(
    ("stacks", "boundary"),
    [([[10.0, None, 11.0]], 1), ([[10.0, 11.0, None]], 2), ([[10.0, 11.0], [None, 12.0, None]], 4)],
)
def test_a_boundary_that_leaves_a_block_needs_a_dimension(stacks, boundary):
    with pytest.raises(DimensionError) as caught:
        check_dimensions(make_profile(*stacks))
    assert str(caught.value) == (
        f"Boundary {boundary} has no dimension: only 1 of 998 points are distinct. Measure on more varied data, or "
        "choose another pooling (pooling is 'mean')."
    )
