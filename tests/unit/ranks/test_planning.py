"""`make_plan` finds a policy by its name, and checks what it returns."""

from dataclasses import replace

import pytest

from gelora_plugins import plugins
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ConfigError, PlanError
from gelora_plugins.hookspecs import hookimpl
from gelora_plugins.ranks.planning import make_plan
from gelora_plugins.ranks.policies import budget
from tests.support.plans import SST2, make_profile, make_sites


@pytest.fixture
def policy():
    """A function that registers a policy `strange` which returns its argument, or what that returns if called."""
    manager = plugins.plugin_manager()
    registered = []

    def register(ranks):
        class Plugin:
            @staticmethod
            @hookimpl
            def register_rank_policies():
                return {"strange": lambda *arguments: ranks() if callable(ranks) else ranks}

        registered.append(manager.register(Plugin))

    yield register
    for name in registered:
        manager.unregister(name=name)


def plan_of(policy_name, base_rank=8, **options):
    profile = make_profile(SST2, **options)
    return make_plan(profile, GeLoRAConfig(policy=policy_name), make_sites(profile), base_rank, lora_alpha=16)


@pytest.mark.parametrize("kind", [list, tuple, iter])
def test_a_plugins_policy_is_used(policy, kind):
    policy(kind([4, 1, 2, 3, 5, 6]))
    plan = plan_of("strange")
    assert plan.ranks == (4, 1, 2, 3, 5, 6)
    assert plan.policy == "strange"


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        (None, "returned None; expected one rank per site"),
        (8, "returned 8; expected one rank per site"),
        ([], "made no usable plan: A plan has 0 ranks for 6 sites"),
        ([1] * 5, "made no usable plan: A plan has 5 ranks for 6 sites"),
        ([1] * 7, "made no usable plan: A plan has 7 ranks for 6 sites"),
        ([0] * 6, "made no usable plan: The rank of model.layers.0 is 0; expected a whole number of at least 1"),
        ([1, 1, -2, 1, 1, 1], "made no usable plan: The rank of model.layers.2 is -2"),
        ([1, 2.0, 1, 1, 1, 1], r"made no usable plan: The rank of model.layers.1 is 2\.0"),
        ([True] * 6, "made no usable plan: The rank of model.layers.0 is True"),
        ([float("nan")] * 6, "made no usable plan: The rank of model.layers.0 is nan"),
        ("111111", "made no usable plan: The rank of model.layers.0 is '1'"),
        ([None] * 6, "made no usable plan: The rank of model.layers.0 is None"),
    ],
)
def test_nonsense_from_a_plugins_policy_is_a_plan_error_that_names_it(policy, ranks, message):
    policy(ranks)
    with pytest.raises(PlanError, match=f"The policy 'strange' {message}"):
        plan_of("strange")


def test_a_policy_that_does_not_exist_is_an_error_that_lists_those_that_do():
    with pytest.raises(ConfigError, match="policy 'strange' does not exist; there are: budget, gelora, uniform"):
        plan_of("strange")


@pytest.mark.parametrize("name", ["gelora", "budget", "uniform"])
def test_the_built_in_policies_make_plans_that_say_where_they_come_from(name):
    plan = plan_of(name, base_rank=4)
    assert (plan.policy, plan.rounding, plan.base_rank, plan.lora_alpha) == (name, "nearest", 4, 16)
    assert plan.use_rslora is False
    assert plan.profile == make_profile(SST2)
    # budget: 24 ranks over needs of 3.2 1.6 1 1.4 2.3 1 are 7.31 3.66 2.29 3.2 5.26 2.29.
    assert plan.ranks == {"gelora": (3, 2, 1, 1, 2, 1), "budget": (8, 4, 2, 3, 5, 2), "uniform": (4,) * 6}[name]


def test_a_plan_for_a_rank_stabilised_adapter_says_so():
    profile = make_profile(SST2)
    assert make_plan(profile, GeLoRAConfig(), make_sites(profile), 8, lora_alpha=16, use_rslora=True).use_rslora is True


# --- ranks on redraws of the profile


def test_rank_changes_are_the_share_of_redraws_with_another_rank():
    # One block whose growth is 2 in the measurement and 2 + (-1, 0, 0, 1) on the four redraws.
    profile = make_profile([10.0, 12.0, 12.0])
    replicates = [(9.0,) * 4, (10.0, 11.0, 11.0, 12.0), (10.0, 11.0, 11.0, 12.0)]
    estimates = tuple(replace(e, replicates=r) for e, r in zip(profile.estimates, replicates, strict=True))
    plan = make_plan(replace(profile, estimates=estimates), GeLoRAConfig(), make_sites(profile), 8, lora_alpha=16)
    assert plan.ranks == (3, 1)
    assert plan.rank_changes == (0.5, 0.0)


@pytest.mark.parametrize("name", ["gelora", "budget"])
def test_rank_changes_are_zero_without_spread_and_large_with_much(name):
    assert plan_of(name, replicates=10, spread=1e-9).rank_changes == (0.0,) * 6
    assert min(plan_of(name, replicates=50, spread=5.0).rank_changes) > 0.2


def test_uniform_ranks_never_change():
    assert plan_of("uniform", replicates=10, spread=5.0).rank_changes == (0.0,) * 6


def test_a_profile_without_replicates_says_nothing_of_changes():
    assert plan_of("gelora").rank_changes == ()


def test_nonsense_from_a_policy_on_a_redraw_is_a_plan_error_too(policy):
    answers = iter([[1] * 6, [1] * 6, [0] * 6])
    policy(lambda: next(answers))
    with pytest.raises(PlanError, match=r"'strange' made no usable plan: The rank of model\.layers\.0 is 0"):
        plan_of("strange", replicates=2)


def test_the_plan_itself_is_made_from_the_measured_profile():
    profile = make_profile(SST2, replicates=20, spread=3.0)
    plan = plan_of("budget", replicates=20, spread=3.0)
    assert plan.ranks == tuple(budget(profile, make_sites(profile), 8, GeLoRAConfig()))
    assert plan.profile == profile
