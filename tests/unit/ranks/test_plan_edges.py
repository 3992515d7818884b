"""The edges of a plan: the largest numbers that it takes, the scaling of each rank, what its errors say."""

from dataclasses import replace

import pytest

from gelora_plugins import json_files
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.plan import MAX_RANK, RankPlan, named
from gelora_plugins.ranks.planning import make_plan as make
from tests.support.plans import make_plan

PLAN = make_plan(ranks=(1, 2, 4, 8, 8, 8))


def test_the_largest_numbers_are_taken_and_the_next_are_not() -> None:
    largest = replace(PLAN, base_rank=MAX_RANK, lora_alpha=json_files.MAX_INT, min_rank=MAX_RANK, ranks=(MAX_RANK,) * 6)
    assert largest.ranks[0] == MAX_RANK
    assert [replace(PLAN, total_rank=rank).total_rank for rank in (1, MAX_RANK)] == [1, MAX_RANK]
    for change in (
        {"base_rank": MAX_RANK + 1},
        {"lora_alpha": 2 * json_files.MAX_INT},
        {"min_rank": MAX_RANK + 1},
        {"total_rank": 0},
        {"total_rank": MAX_RANK + 1},
        {"ranks": (MAX_RANK + 1,) * 6},
    ):
        with pytest.raises(PlanError):
            replace(PLAN, **change)


OPTIONS = {
    "policy": "budget",
    "rounding": "floor",
    "min_rank": 2,
    "scaling": "equal_step",
    "rank": 3,
    "estimator": "twonn_mle",
    "pooling": "mean",
    "probe_seed": 0,
    "standardise": False,
    "target_std_error": None,
}


def test_what_the_ranks_follow_is_named_as_the_options_are() -> None:
    plan = make(make_plan().profile, GeLoRAConfig(**OPTIONS), make_plan().sites, 8, lora_alpha=16.0)
    assert plan.followed() == {**(plan.profile.options or {}), **OPTIONS}


@pytest.mark.parametrize("policy", ["gelora", "budget", "uniform"])
def test_no_plan_is_made_of_no_sites(policy: str) -> None:
    with pytest.raises(PlanError, match="0 ranks for 0 sites"):
        make(make_plan().profile, GeLoRAConfig(policy=policy), (), 8, lora_alpha=16.0)


def test_modules_are_named_by_the_ends_of_their_paths() -> None:
    assert named("all-linear")("anything.at.all")
    ends = named(" q_proj,mlp.down_proj ")
    assert [ends(path) for path in ("q_proj", "h.0.q_proj", "h.0.mlp.down_proj")] == [True] * 3
    assert [ends(path) for path in ("h.0.xq_proj", "h.0.q_proj.x", "h.0.down_proj", "all-linear")] == [False] * 4


def test_two_sites_of_one_name_are_refused() -> None:
    with pytest.raises(PlanError, match=r"^Two sites of a plan have the same name\.$"):
        replace(PLAN, sites=(PLAN.sites[0],) * 6)


def test_the_scaling_of_a_rank() -> None:
    assert [PLAN.scaling_of(rank) for rank in (1, 8, 16)] == [PLAN.scaling] * 3
    equal = replace(PLAN, scaling_rule="equal_step")
    assert [equal.scaling_of(rank) * rank for rank in (1, 8, 16)] == [PLAN.scaling * PLAN.base_rank] * 3


def test_what_is_said_of_the_scaling() -> None:
    assert PLAN.scaling_note() == f"Scaling {PLAN.scaling:g} everywhere."
    assert replace(PLAN, scaling_rule="equal_step").scaling_note() != PLAN.scaling_note()


def test_a_plan_has_the_scaling_rule_of_the_options() -> None:
    config = GeLoRAConfig(scaling="equal_step")
    assert make(PLAN.profile, config, PLAN.sites, 8, lora_alpha=16).scaling_rule == "equal_step"


def test_a_site_with_another_key_is_refused() -> None:
    data = PLAN.to_dict()
    data["sites"] = [{**site, "colour": "red"} for site in data["sites"]]
    with pytest.raises(PlanError, match="colour"):
        RankPlan.from_dict(data)
