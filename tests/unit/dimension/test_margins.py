"""Ranks that tests measure are the same on every machine: see `MARGIN`."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest

from gelora_plugins import GeLoRAConfig, RankPlan, select_ranks
from gelora_plugins.ranks.planning import make_plan
from tests.support.training import peft_model, rows

# The dimensions that one processor measures differ from another's by their float32 points, which is up to 1e-6 of each.
# With all of them a thousandth larger or smaller the ranks are still those that the tests go by.
MARGIN = 1e-3
EVEN = [{name: ids[:4] for name, ids in row.items()} for row in rows()]
CASES: dict[str, tuple[str, str, dict[str, Any], list[Any]]] = {
    "budget": ("llama", "budget", {}, rows()),
    "published": ("llama", "gelora", {}, rows()),
    "twice the budget": ("llama", "budget", {"r": 8}, rows()),
    "two targets": ("llama", "budget", {"target_modules": ["q_proj", "v_proj"]}, rows()),
    "rows of one length": ("llama", "budget", {}, EVEN),
    "gpt2": ("gpt2", "budget", {}, rows(200)),
    "bert": ("bert", "budget", {}, [{"input_ids": row["input_ids"]} for row in rows(200)]),
    "t5": ("t5", "budget", {}, rows(200)),
}


@pytest.mark.parametrize("case", CASES)
def test_the_ranks_that_tests_measure_are_far_from_every_edge(case: str) -> None:
    family, policy, options, data = CASES[case]
    config = GeLoRAConfig(policy=policy)
    plan = select_ranks(peft_model(family, **options), data, config, progress=False)
    for signs in product((-1, 1), repeat=len(plan.profile.estimates)):
        assert with_dimensions(plan, [1 + sign * MARGIN for sign in signs], config).ranks == plan.ranks


def with_dimensions(plan: RankPlan, factors: list[float], config: GeLoRAConfig) -> RankPlan:
    """The plan for the same profile with each dimension times its factor."""
    estimates = tuple(
        replace(estimate, value=estimate.value * factor, interval=None, std_error=None, replicates=())
        for estimate, factor in zip(plan.profile.estimates, factors, strict=True)
        if estimate.value is not None
    )
    profile = replace(plan.profile, estimates=estimates)
    return make_plan(profile, config, plan.sites, plan.base_rank, lora_alpha=plan.lora_alpha)
