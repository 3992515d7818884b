"""The shares of a budget, against the definition: one factor for all needs, held to the bounds of each site."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.plan import Site
from gelora_plugins.ranks.policies import proportional, within_budget

Numbers = Sequence[int]


def by_definition(needs: Numbers, costs: Numbers, least: Numbers, most: Numbers, total: int) -> list[Fraction]:
    """The shares factor * need, held to their bounds, for the factor at which they cost `total`."""

    def shares(factor: Fraction) -> list[Fraction]:
        held = zip(needs, least, most, strict=True)
        return [min(max(factor * need, Fraction(low)), Fraction(high)) for need, low, high in held]

    def cost(factor: Fraction) -> Fraction:
        return sum((s * c for s, c in zip(shares(factor), costs, strict=True)), Fraction(0))

    places = {
        Fraction(bound, need) for need, *bounds in zip(needs, least, most, strict=True) if need for bound in bounds
    }
    for low, high in pairwise(sorted({Fraction(0), *places})):
        if cost(low) <= total <= cost(high):  # which is linear between
            rise = cost(high) - cost(low)
            return shares(low + (high - low) * ((total - cost(low)) / rise if rise else 0))
    return shares(max(places))  # all that have a need are full


@st.composite
def budgets(draw: st.DrawFn) -> tuple[Numbers, Numbers, Numbers, Numbers, int]:
    size = draw(st.integers(1, 6))

    def numbers(least: int, most: int) -> list[int]:
        return draw(st.lists(st.integers(least, most), min_size=size, max_size=size))

    needs = numbers(0, 40)
    needs[draw(st.integers(0, size - 1))] += 1
    costs, least, room = numbers(1, 30), numbers(1, 9), numbers(0, 60)
    most = [low + more for low, more in zip(least, room, strict=True)]
    lowest, highest = (sum(b * c for b, c in zip(bounds, costs, strict=True)) for bounds in (least, most))
    return needs, costs, least, most, draw(st.integers(lowest, highest + 20))


@example(([1, 2, 12], [1, 3, 1], [2, 4, 4], [4, 10, 10], 23))  # both bounds matter, by less than one parameter
@given(budgets())
def test_shares_are_those_of_the_definition(budget: tuple[Numbers, Numbers, Numbers, Numbers, int]) -> None:
    needs, *others = budget
    assert proportional([Fraction(need) for need in needs], *others) == by_definition(*budget)


def test_a_least_rank_above_r_is_refused_in_whole_sentences() -> None:
    with pytest.raises(PlanError) as caught:
        within_budget([1, 1], [Site("a", 4), Site("b", 4)], base_rank=2, min_rank=3)
    assert str(caught.value) == (
        "min_rank is 3 and r is 2: the least ranks alone cost more than the budget, which is r everywhere. Lower "
        "min_rank, or raise r."
    )


def test_the_least_rank_is_one_if_not_given() -> None:
    assert within_budget([0, 9], [Site("a", 4), Site("b", 4)], base_rank=3) == [1, 5]
