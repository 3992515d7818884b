"""How much rank in all: each rule against its definition, and what a policy does with it."""

import math
from dataclasses import replace

import pytest

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.hookspecs import hookimpl
from gelora_plugins.plugins import available, plugin_manager
from gelora_plugins.ranks.plan import RankPlan
from gelora_plugins.ranks.planning import make_plan as make
from gelora_plugins.ranks.totals import total_rank
from gelora_plugins.ranks.verdict import sure_plan
from tests.support.plans import make_plan

PLAN = make_plan(ranks=(1, 2, 4, 8, 8, 8))
PROFILE, SITES = PLAN.profile, PLAN.sites
PER_RANK = sum(site.parameters_per_rank for site in SITES)


def plan_with(profile=PROFILE, **options):
    return make(profile, GeLoRAConfig(**options), SITES, 4, lora_alpha=8)


def chosen(rule, **known):
    return total_rank(rule, replace(PROFILE, **known), SITES, 4)


@pytest.mark.parametrize(
    ("rows", "rank"),
    [(0, 8), (999, 8), (1_000, 16), (9_999, 16), (10_000, 32), (99_999, 32), (100_000, 64), (10**7, 64)],
)
def test_the_table_by_rows(rows, rank):
    assert chosen("rows", num_rows=rows) == rank


@pytest.mark.parametrize(
    ("targets", "rank"), [(0, 1), (1, 1), (PER_RANK, 1), (PER_RANK + 1, 2), (10 * PER_RANK, 10), (10**12, 256)]
)
def test_as_many_parameters_as_tokens_to_learn(targets, rank):
    assert chosen("tokens", num_targets=targets) == rank


def test_the_dimensions_that_were_measured():
    known = [estimate.value for estimate in PROFILE.estimates if estimate.value is not None]
    assert chosen("dimension_max") == math.floor(max(known) + 0.5)
    assert chosen("dimension_mean") == math.floor(sum(known) / len(known) + 0.5)
    assert chosen("dimension_last") == math.floor(known[-1] + 0.5)


def test_a_number_is_itself_and_nothing_is_the_users_own():
    assert (chosen(16), chosen(None), chosen("auto")) == (16, 4, 8)


def test_uniform_gives_the_total_to_every_block_and_keeps_the_scaling_of_the_users_own():
    plan = plan_with(policy="uniform", rank=16)
    assert set(plan.ranks) == {16}
    assert (plan.base_rank, plan.total_rank, plan.rank_rule, plan.scaling) == (4, 16, None, 2.0)
    assert plan.followed()["rank"] == 16
    assert "In all what r = 16 costs." in str(plan)


def test_budget_spends_what_the_total_costs():
    plan = plan_with(replace(PROFILE, num_targets=12 * PER_RANK), policy="budget", rank="tokens")
    assert plan.num_parameters == 12 * PER_RANK
    assert plan.followed()["rank"] == "tokens"
    assert "In all what r = 12 costs, by the rule tokens." in str(plan)


def test_without_the_option_a_plan_is_as_before():
    plan = plan_with(policy="budget")
    assert (plan.total_rank, plan.rank_rule, plan.followed()["rank"], plan.total_note()) == (None, None, None, "")
    assert plan.num_parameters == 4 * PER_RANK


def test_a_plan_with_a_total_is_read_as_it_was_written(tmp_path):
    plan = plan_with(policy="uniform", rank="auto")
    plan.save(tmp_path / "plan.json")
    assert RankPlan.load(tmp_path / "plan.json") == plan


@pytest.mark.parametrize("change", [{"total_rank": 0}, {"total_rank": 2**16 + 1}, {"rank_rule": "rows"}])
def test_a_total_that_cannot_be_is_refused(change):
    with pytest.raises(PlanError, match="total_rank is"):
        replace(PLAN, **change)


@pytest.mark.parametrize("rule", ["rows", "tokens"])
def test_what_the_measurement_does_not_know_is_said(rule):
    with pytest.raises(PlanError, match=rf"The rank rule '{rule}' needs .* Set rank to a number\."):
        chosen(rule)


def test_a_rule_that_does_not_exist_is_refused_with_those_that_do():
    with pytest.raises(ConfigError, match="rank rule 'tokenz' does not exist; there are: auto, dimension_last"):
        chosen("tokenz")


@pytest.mark.parametrize("wrong", [0, -1, 1.5, True, None, "8", 10**9])
def test_a_rule_that_returns_no_rank_is_named(wrong, monkeypatch):
    monkeypatch.setattr(
        "gelora_plugins.ranks.totals.plugins.find", lambda kind, name: lambda profile, sites, base_rank: wrong
    )
    with pytest.raises(PlanError, match=r"The rank rule 'mine' returned .*; expected a whole number, 1 to 65536\."):
        chosen("mine")


def test_rules_come_from_plugins_too():
    class Mine:
        @hookimpl
        def register_rank_rules(self):
            return {"half": lambda profile, sites, base_rank: base_rank // 2}

    mine = Mine()
    plugin_manager().register(mine, "mine")
    try:
        assert "half" in available("rank rule")
        assert set(plan_with(policy="uniform", rank="half").ranks) == {2}
    finally:
        plugin_manager().unregister(mine)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "", " ", [8], 2**32])
def test_options_that_are_no_rank_are_refused(value):
    with pytest.raises(ConfigError, match=r"rank"):
        GeLoRAConfig(policy="uniform", rank=value)


def test_a_number_from_a_command_line_is_a_number():
    assert GeLoRAConfig(policy="uniform", rank="16").rank == 16


def test_the_published_policy_takes_no_total():
    with pytest.raises(ConfigError, match="takes its ranks from dimensions alone"):
        GeLoRAConfig(rank="auto")


def test_ranks_that_are_not_sure_become_the_total(caplog):
    plan = make_plan(ranks=(1, 2, 4, 8, 8, 8), replicates=8, spread=3.0)
    alike = sure_plan(
        plan.profile, GeLoRAConfig(policy="budget", rank=16, on_unsure="uniform"), plan.sites, 4, lora_alpha=8
    )
    assert set(alike.ranks) == {16}
    assert "Every block gets r = 16 instead" in caplog.text


def test_a_total_that_follows_the_dimensions_may_differ_with_them():
    """The share of redraws with other ranks is that of the rule, too: uniform ranks of a dimension are not sure."""
    profile = make_plan(replicates=30, spread=2.0).profile
    by_dimension = make(profile, GeLoRAConfig(policy="uniform", rank="dimension_max"), SITES, 4, lora_alpha=8)
    by_number = make(profile, GeLoRAConfig(policy="uniform", rank=16), SITES, 4, lora_alpha=8)
    redrawn = [total_rank("dimension_max", redraw, SITES, 4) for redraw in profile.redraws()]
    other = sum(rank != by_dimension.total_rank for rank in redrawn) / len(redrawn)
    assert other > 0
    assert by_dimension.rank_changes == (other,) * len(SITES)
    assert by_number.rank_changes == (0.0,) * len(SITES)


@pytest.mark.parametrize("policy", ["uniform", "budget"])
@pytest.mark.parametrize("rank", [4096, 10**9])
def test_no_total_is_beyond_what_the_matrices_can_use(policy, rank):
    sites = tuple(replace(site, max_rank=8) for site in SITES)
    plan = make(PROFILE, GeLoRAConfig(policy=policy, rank=rank), sites, 4, lora_alpha=8)
    assert (plan.ranks, plan.total_rank) == ((8,) * len(sites), 8)
    plan.check_sites(sites)


def test_the_users_own_rank_may_be_beyond_it():
    sites = tuple(replace(site, max_rank=8) for site in SITES)
    assert set(make(PROFILE, GeLoRAConfig(policy="uniform"), sites, 16, lora_alpha=8).ranks) == {16}
