import json
import math
from dataclasses import replace

import pytest
from peft.utils.other import get_pattern_key

from gelora_plugins.dimension.profile import DimensionEstimate, DimensionProfile
from gelora_plugins.errors import PlanError
from gelora_plugins.ranks.plan import RankPlan, Site, layout_sites
from tests.support.plans import PLAN, SST2, as_json, make_plan, make_profile, make_sites

# --- round trips


@pytest.mark.parametrize("dimensions", [SST2, (None, *SST2[1:])])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_a_plan_survives_json_and_a_file(tmp_path, dimensions, use_rslora):
    plan = make_plan(dimensions, use_rslora=use_rslora, lora_alpha=12.5)
    path = tmp_path / "below" / "plan.json"
    plan.save(path)
    assert RankPlan.load(path) == plan
    assert RankPlan.from_dict(as_json(plan)) == plan


def test_a_profile_survives_json():
    profiles = (make_profile(SST2), make_profile([None, 3.0], [4.0, 5.5, 1e-3]), PLAN.profile)
    for profile in (*profiles, replace(PLAN.profile, standardise=True, target_std_error=0.5)):
        assert DimensionProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


def test_an_estimate_without_an_interval_survives_json():
    profile = make_profile([3.0, 4.0])
    profile = replace(profile, estimates=(DimensionEstimate(3.0, 100), DimensionEstimate(4.0, 100, std_error=0.5)))
    assert DimensionProfile.from_dict(json.loads(json.dumps(profile.to_dict()))) == profile


# --- patterns and scaling


def test_patterns_match_a_block_and_no_other_as_peft_matches():
    dimensions = [10.0 + i for i in range(13)]
    plan = make_plan(dimensions, ranks=range(1, 13))
    pattern = plan.rank_pattern()
    for i in range(12):
        for target in ("self_attn.q_proj", "mlp.down_proj"):
            key = get_pattern_key(pattern, f"model.layers.{i}.{target}")
            assert pattern[key] == i + 1
    for other in ("model.layers.12.mlp.up_proj", "lm_head", "vision.model.layers.1.mlp.up_proj", "model.layers.1"):
        assert get_pattern_key(pattern, other) == other


def test_patterns_are_escaped():
    key = Site("model.layers.1", 1).pattern
    assert get_pattern_key([key], "model.layers.1.q") == key
    assert get_pattern_key([key], "modelxlayers.1.q") == "modelxlayers.1.q"
    assert get_pattern_key([key], "model.layersx1.q") == "model.layersx1.q"
    odd = Site("h[0].(a|b)+c$", 1).pattern
    assert get_pattern_key([odd], "h[0].(a|b)+c$.q") == odd


def test_rank_and_alpha_patterns_have_the_same_keys_in_the_order_of_the_blocks():
    plan = make_plan()
    assert list(plan.rank_pattern()) == list(plan.alpha_pattern()) == [site.pattern for site in plan.sites]
    assert list(plan.rank_pattern().values()) == list(plan.ranks)


@pytest.mark.parametrize("base_rank", [1, 3, 8, 25])
@pytest.mark.parametrize("lora_alpha", [1, 16, 12.5])
def test_the_scaling_is_one_constant(base_rank, lora_alpha):
    plan = make_plan(ranks=(1, 2, 3, 7, 25, 64), base_rank=base_rank, lora_alpha=lora_alpha)
    assert plan.scaling == lora_alpha / base_rank
    for rank, alpha in zip(plan.ranks, plan.alpha_pattern().values(), strict=True):
        assert alpha / rank == pytest.approx(plan.scaling, rel=1e-15)


@pytest.mark.parametrize("base_rank", [1, 3, 8, 25])
def test_the_scaling_is_one_constant_with_rslora(base_rank):
    plan = make_plan(ranks=(1, 2, 3, 7, 25, 64), base_rank=base_rank, use_rslora=True)
    assert plan.scaling == 16 / math.sqrt(base_rank)
    for rank, alpha in zip(plan.ranks, plan.alpha_pattern().values(), strict=True):
        assert alpha / math.sqrt(rank) == pytest.approx(plan.scaling, rel=1e-15)


def test_alpha_is_an_int_wherever_it_is_whole():
    for base_rank in range(1, 65):
        plan = make_plan(base_rank=base_rank, lora_alpha=2 * base_rank)
        assert all(isinstance(plan.alpha(rank), int) and plan.alpha(rank) == 2 * rank for rank in range(1, 129))
    assert make_plan(base_rank=8, lora_alpha=1).alpha(3) == 0.375


def test_the_arguments_for_peft_keep_the_users_own_values():
    plan = make_plan(base_rank=25, lora_alpha=50, use_rslora=True)
    arguments = plan.lora_config_kwargs()
    assert arguments == {
        "r": 25,
        "lora_alpha": 50,
        "use_rslora": True,
        "rank_pattern": plan.rank_pattern(),
        "alpha_pattern": plan.alpha_pattern(),
    }
    assert isinstance(arguments["lora_alpha"], int)


@pytest.mark.parametrize(
    ("r", "lora_alpha", "use_rslora", "scaling"),
    [(8, 32, False, "4"), (4, 16, False, "4"), (8, 16.0001, False, "2.00001"), (64, 16, True, "2")],
)
def test_a_configuration_with_another_scaling_is_told_both(r, lora_alpha, use_rslora, scaling):
    with pytest.raises(PlanError) as caught:
        make_plan().check_scaling(r, lora_alpha, use_rslora)
    assert str(caught.value) == (
        "The plan keeps the scaling 2 (r 8, lora_alpha 16, use_rslora False), and the LoRA configuration has "
        f"{scaling} (r {r}, lora_alpha {lora_alpha:g}, use_rslora {use_rslora}). Make the plan again with the "
        "configuration's values."
    )


def test_a_configuration_with_the_same_scaling_may_have_another_r():
    make_plan().check_scaling(4, 8, False)
    make_plan().check_scaling(8, 16 * (1 + 1e-12), False)  # as far as rounding goes
    make_plan(use_rslora=True).check_scaling(2, 8, True)
    with pytest.raises(PlanError, match="has 1 "):
        make_plan(use_rslora=True).check_scaling(64, 8, True)


def test_a_plan_prints_its_totals_and_one_line_for_each_site():
    first, *lines = str(make_plan()).splitlines()
    assert first.startswith("LoRA ranks by the policy gelora: ")
    assert [line.split() for line in lines] == [
        [site.name, str(rank)] for site, rank in zip(make_plan().sites, make_plan().ranks, strict=True)
    ]


@pytest.mark.parametrize("use_rslora", [False, True])
def test_steps_are_as_large_at_every_rank_where_that_is_asked_for(use_rslora):
    plan = replace(make_plan(use_rslora=use_rslora), scaling_rule="equal_step")
    divisor = {rank: rank**0.5 if use_rslora else rank for rank in plan.ranks}
    for rank in plan.ranks:
        assert plan.alpha(rank) / divisor[rank] == pytest.approx(plan.scaling_of(rank))
        assert plan.scaling_of(rank) * rank == pytest.approx(plan.scaling * plan.base_rank)
    assert plan.alpha(plan.base_rank) == 16
    assert "so that steps are as large at every rank" in str(plan)
    assert RankPlan.from_dict(as_json(plan)) == plan


def test_a_plan_from_before_the_scaling_was_recorded_keeps_it_constant():
    data = as_json(make_plan())
    del data["scaling_rule"], data["min_rank"]
    assert RankPlan.from_dict(data) == make_plan()
    with pytest.raises(PlanError, match="scaling_rul is not a key"):
        RankPlan.from_dict({**data, "scaling_rul": "equal_step"})
    with pytest.raises(PlanError, match="The scaling rule is 'other'; expected one of: constant, equal_step"):
        RankPlan.from_dict({**data, "scaling_rule": "other"})
    with pytest.raises(PlanError, match="min_rank is 0"):
        RankPlan.from_dict({**data, "min_rank": 0})


def test_the_sites_of_a_layout_are_its_blocks_with_targets_at_the_cost_of_these():
    layout = make_profile([1.0, 2.0, 3.0]).layout
    both = (Site("model.layers.0", 56, 8), Site("model.layers.1", 56, 8))
    assert layout_sites(layout, lambda name: True) == both
    assert layout_sites(layout, lambda name: name == "model.layers.1.up") == (Site("model.layers.1", 40, 8),)


def test_parameters_are_counted_by_rank_and_cost():
    plan = replace(make_plan(), sites=make_sites(make_profile(SST2), [1, 10, 100, 1000, 10_000, 100_000]))
    assert plan.num_parameters == 122_123
    assert plan.num_base_parameters == 8 * 111_111


# --- plans that cannot be


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranks": (1, 2)}, "2 ranks for 6 sites"),
        ({"ranks": (1, 2, 3, 4, 5, 0)}, "rank of model.layers.5 is 0; expected a whole number of at least 1"),
        ({"ranks": (), "sites": ()}, "0 ranks for 0 sites"),
        ({"base_rank": 0}, "r is 0 and lora_alpha is 16"),
        ({"lora_alpha": 0}, "r is 8 and lora_alpha is 0"),
        ({"lora_alpha": math.nan}, "r is 8 and lora_alpha is nan"),
        ({"sites": (Site("model.layers.0", 56),) * 6}, "Two sites of a plan have the same name"),
        ({"sites": tuple(Site(f"h.{i}", 56) for i in range(6))}, r"The sites h\.0, .*h\.5 are not blocks"),
        ({"sites": tuple(Site(f"model.layers.{i}", 0) for i in range(6))}, "One rank of model.layers.0 costs 0"),
    ],
)
def test_a_plan_that_contradicts_itself_cannot_be_made(changes, message):
    with pytest.raises(PlanError, match=message):
        replace(make_plan(), **changes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"value": None}, "either a value or the reason"),
        ({"value": 3.0, "degenerate": "few."}, "either a value or the reason"),
        ({"value": 0.0}, r"intrinsic dimension of 0\.0 was found; expected a positive finite number"),
        ({"value": -1.0}, r"intrinsic dimension of -1\.0"),
        ({"value": math.nan}, "intrinsic dimension of nan"),
        ({"value": math.inf}, "intrinsic dimension of inf"),
        ({"value": 3.0, "interval": (4.0, 2.0)}, r"interval \(4\.0, 2\.0\) is not"),
        ({"value": 3.0, "interval": (math.nan, 2.0)}, r"interval \(nan, 2\.0\) is not"),
    ],
)
def test_an_estimate_that_contradicts_itself_cannot_be_made(arguments, message):
    with pytest.raises(PlanError, match=message):
        DimensionEstimate(num_points=100, **arguments)


def test_a_profile_has_one_estimate_per_boundary():
    with pytest.raises(PlanError, match="6 dimensions for a model of 7 block boundaries"):
        replace(make_profile(SST2), estimates=make_profile(SST2[1:]).estimates)


# --- check_sites


def test_a_plan_fits_its_own_sites_in_any_order():
    plan = make_plan()
    plan.check_sites(plan.sites)
    plan.check_sites(plan.sites[::-1])


@pytest.mark.parametrize(
    ("sites", "difference"),
    [
        (
            make_sites(make_profile(SST2), [56, 64, 56, 56, 56, 56]),
            "model.layers.1 costs 56 parameters in the plan and 64",
        ),
        (make_plan().sites[:5], "model.layers.5 costs 56 parameters in the plan and nothing"),
        ((*make_plan().sites, Site("model.layers.6", 9)), "model.layers.6 costs nothing parameters in the plan and 9"),
    ],
)
def test_a_plan_for_other_sites_says_the_first_difference(sites, difference):
    with pytest.raises(PlanError) as caught:
        make_plan().check_sites(sites)
    assert str(caught.value) == (
        f"The plan is for another model, or for other target modules: one rank of {difference} in the model. "
        "Make a plan for this model and these target modules."
    )


def named(*names):
    return tuple(Site(name, 56) for name in names)


BLOCKS = [f"layers.{i}" for i in range(6)]


@pytest.mark.parametrize(
    ("sites", "whose"),
    [
        (named(*(f"encoder.model.{name}" for name in BLOCKS)), "the model's have 'encoder.' before 'model.layers.0'"),
        (named(*BLOCKS), "the plan's have 'model.' before 'layers.0'"),
    ],
)
def test_a_plan_whose_names_begin_otherwise_says_how(sites, whose):
    with pytest.raises(PlanError) as caught:
        make_plan().check_sites(sites)
    assert str(caught.value) == (
        "The plan is for another model, or for other target modules: one rank of model.layers.0 costs 56 parameters in "
        f"the plan and nothing in the model. All that differs is the beginning of the names: {whose}, as when one is "
        "the other with a head around it. Make a plan for this model and these target modules."
    )


@pytest.mark.parametrize(
    "sites",
    [
        (),
        named("h.0", "h.1"),
        named(*(f"encoder.model.{name}" for name in BLOCKS[:5])),
        named("encoder.model.layers.0", *(f"decoder.model.{name}" for name in BLOCKS[1:])),
    ],
)
def test_a_plan_whose_names_differ_in_more_than_the_beginning_says_nothing_of_it(sites):
    with pytest.raises(PlanError) as caught:
        make_plan().check_sites(sites)
    assert str(caught.value).endswith("nothing in the model. Make a plan for this model and these target modules.")


def test_a_rank_beyond_all_rows_and_columns_is_not_taken():
    plan = make_plan(ranks=(56, 2, 1, 2, 2, 1))
    plan.check_sites(plan.sites)
    plan = make_plan(ranks=(64, 2, 1, 2, 2, 1), base_rank=64)  # which the user asked for
    plan.check_sites(plan.sites)
    with pytest.raises(PlanError) as caught:
        make_plan(ranks=(3, 2, 57, 2, 2, 1)).check_sites(plan.sites)
    assert str(caught.value) == (
        "The rank of model.layers.2 is 57; its matrices have no more than 56 rows and columns together. "
        "Make the plan again."
    )
