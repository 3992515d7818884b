import json
import math
import os
import stat
from copy import deepcopy
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from peft.utils.other import get_pattern_key

from gelora_plugins import json_files
from gelora_plugins.dimension.profile import DimensionEstimate, DimensionProfile
from gelora_plugins.errors import GeLoRAError, PlanError
from gelora_plugins.ranks.plan import RankPlan, Site, layout_sites
from tests.support.plans import SST2, make_plan, make_profile, make_sites

PLAN = make_plan(dimensions=(None, *SST2[1:]), replicates=2, rank_changes=(0.0, 0.5, 1.0, 0.25, 0.0, 1.0))


def as_json(plan):
    return json.loads(json.dumps(plan.to_dict()))


def damaged(tmp_path, text):
    path = tmp_path / "plan.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PlanError) as caught:
        RankPlan.load(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


def changed(path, value):
    """PLAN as JSON values, with `value` at `path`."""
    data = as_json(PLAN)
    *way, last = path
    inner = data
    for step in way:
        inner = inner[step]
    inner[last] = value
    return data


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


# --- damaged files


def test_a_missing_file(tmp_path):
    with pytest.raises(PlanError, match=r"nowhere\.json cannot be read: No such file or directory\."):
        RankPlan.load(tmp_path / "nowhere.json")


def test_a_directory(tmp_path):
    with pytest.raises(PlanError, match="cannot be read: Is a directory"):
        RankPlan.load(tmp_path)


@pytest.mark.parametrize("text", ["", "ranks: [1, 2]\n", b"\xff\xfe\x00", b"\x80\x04K\x01.", "[" * 100_000])
def test_what_is_not_json(tmp_path, text):
    assert "is not JSON" in damaged(tmp_path, text)


def test_a_file_that_is_too_long_is_not_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "MAX_BYTES", 1 << 20)
    assert "has more than 1 MB; expected a record of GeLoRA" in damaged(tmp_path, " " * (1 << 20) + "{}")


def test_a_truncated_file_at_every_length(tmp_path):
    text = json.dumps(PLAN.to_dict())
    for length in range(0, len(text), 97):
        assert "is not JSON" in damaged(tmp_path, text[:length])


def test_a_file_that_is_nested_deeply_where_a_number_belongs(tmp_path):
    nested = json.loads("[" * 500 + "]" * 500)
    message = damaged(tmp_path, json.dumps(changed(["base_rank"], nested)))
    assert "plan.base_rank is [[[" in message
    assert len(message) < 300


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["schema"], 2, "plan has schema 2; this version of gelora reads schema 1. Make it again"),
        (["schema"], None, "plan has schema None; this version of gelora reads schema 1"),
        (["kind"], "dimension_profile", "plan has kind 'dimension_profile'; expected 'rank_plan'"),
        (["profile", "kind"], "rank_plan", "profile has kind 'rank_plan'; expected 'dimension_profile'"),
        (["profile", "schema"], "1", "profile has schema '1'"),
        (["ranks", 2], -1, "The rank of model.layers.2 is -1; expected a whole number of at least 1"),
        (["ranks", 2], True, "The rank of model.layers.2 is True"),
        (["ranks", 2], 1.0, "The rank of model.layers.2 is 1.0"),
        (["ranks", 2], "1", "The rank of model.layers.2 is '1'"),
        (["ranks"], 3, "plan.ranks is 3; expected list"),
        (["ranks"], [1], "1 ranks for 6 sites"),
        (["base_rank"], True, "plan.base_rank is True; expected int"),
        (["base_rank"], -8, "plan.base_rank is -8; expected int"),
        (["lora_alpha"], math.nan, "plan.lora_alpha is nan; expected float"),
        (["lora_alpha"], math.inf, "plan.lora_alpha is inf; expected float"),
        (["lora_alpha"], 10**400, "plan.lora_alpha is 10000"),
        (["lora_alpha"], False, "plan.lora_alpha is False; expected float"),
        (["use_rslora"], 1, "plan.use_rslora is 1; expected bool"),
        (["ranks", 2], 10**400, "The rank of model.layers.2 is 1000"),
        (
            ["base_rank"],
            10**9,
            "r is 1000000000 and lora_alpha is 16.0; expected positive numbers, r no more",
        ),
        (["base_rank"], 10**400, "plan.base_rank is 1000"),
        (["lora_alpha"], 1e308, "lora_alpha is 1e+308; expected positive numbers"),
        (["sites", 0, "parameters_per_rank"], 10**400, "site.parameters_per_rank is 1000"),
        (["sites", 0, "max_rank"], 0, "One rank of model.layers.0"),
        (["policy"], None, "plan.policy is None; expected str"),
        (["sites", 0], "model.layers.0", "site is a str; expected a mapping"),
        (["sites", 0, "name"], "model.layers.9", "The sites model.layers.9 are not blocks"),
        (["sites", 0, "parameters_per_rank"], 1.5, "site.parameters_per_rank is 1.5; expected int"),
        (["profile"], [], "plan.profile is []; expected dict"),
        (["profile", "seconds"], math.nan, "profile.seconds is nan; expected float"),
        (["profile", "num_tokens"], -1, "profile.num_tokens is -1; expected int"),
        (["profile", "estimates"], [], "0 dimensions for a model of 7 block boundaries"),
        (["profile", "estimates", 1, "value"], math.nan, "estimate.value is nan; expected float"),
        (["profile", "estimates", 1, "value"], -2.0, "intrinsic dimension of -2.0 was found"),
        (["profile", "estimates", 1, "value"], None, "either a value or the reason why there is none"),
        (["profile", "estimates", 1, "interval"], [1.0], "estimate.interval is [1.0]; expected two numbers"),
        (["profile", "estimates", 1, "interval"], [1.0, None], "estimate.interval is [1.0, None]"),
        (["profile", "estimates", 1, "interval"], [2.0, 1.0], "The interval (2.0, 1.0) is not (low, high)"),
        (["profile", "standardise"], 0, "profile.standardise is 0; expected bool"),
        (["profile", "target_std_error"], 0.0, "target_std_error is 0.0; expected a positive number or None"),
        (["profile", "estimates", 1, "replicates"], 3.0, "estimate.replicates is 3.0; expected list"),
        (["profile", "estimates", 1, "replicates"], [1.0], "The replicates of an estimate are 1 values; expected none"),
        (["profile", "estimates", 1, "replicates", 1], -1.0, "are 2 values, one of them -1.0; expected none, or"),
        (["profile", "estimates", 1, "replicates", 1], math.inf, "one of them inf"),
        (["profile", "estimates", 1, "replicates", 1], "2", "one of them '2'"),
        (["profile", "estimates", 0, "replicates"], [1.0, 2.0], "An estimate without a value has replicates"),
        (["profile", "estimates", 1, "replicates"], [1.0] * 3, "Boundaries have 2 and 3 replicates; expected the same"),
        (["rank_changes"], [0.5], "A plan has 1 rank changes for 6 sites"),
        (["rank_changes", 2], 1.5, "A rank change is 1.5; expected a share of redraws, 0 to 1"),
        (["rank_changes", 2], math.nan, "A rank change is nan"),
        (["profile", "layout", "stacks"], [], "needs at least one block in every stack"),
        (["profile", "layout", "stacks", 0, 0], 7, "block is a int; expected a mapping"),
    ],
    ids=lambda value: str(value)[:50],
)
def test_a_wrong_value_is_named_with_what_was_expected(tmp_path, path, value, message):
    text = damaged(tmp_path, json.dumps(changed(path, value)))
    assert "is no usable rank plan: " in text
    assert message in text


@pytest.mark.parametrize("value", [[], "plan", 3, None])
def test_json_that_is_no_mapping(tmp_path, value):
    assert f"plan is a {type(value).__name__}; expected a mapping" in damaged(tmp_path, json.dumps(value))


# Keys that plans of earlier versions lack.
SINCE = {"max_rank", "options", "model_name", "model_fingerprint", "min_rank", "scaling_rule"}
SINCE |= {"total_rank", "rank_rule", "num_rows", "num_targets"}


@pytest.mark.parametrize("key", [key for key in PLAN.to_dict() if key not in SINCE | {"schema", "kind"}])
def test_a_missing_key_is_named(key):
    data = as_json(PLAN)
    del data[key]
    with pytest.raises(PlanError, match=rf"plan\.{key} is missing\."):
        RankPlan.from_dict(data)


# --- any damage at all


def leaves(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from leaves(inner, (*path, key))
    if path and not isinstance(value, dict):
        yield path


def mapping_keys(value, path=()):
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        if isinstance(value, dict):
            yield (*path, key)
        yield from mapping_keys(inner, (*path, key))


# Beyond 2^53 a whole number is not kept by a float, and so would not come back as it was.
whole = st.integers(-(2**53), 2**53) | st.just(10**400)
values = st.recursive(
    st.none() | st.booleans() | whole | st.floats() | st.text(max_size=5) | st.sampled_from(["rank_plan", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=4,
)


@settings(max_examples=400)
@given(path=st.sampled_from(list(leaves(as_json(PLAN)))), value=values)
def test_a_plan_with_any_one_value_changed_is_read_as_it_stands_or_refused(path, value):
    data = changed(path, value)
    before = deepcopy(data)
    try:
        plan = RankPlan.from_dict(data)
    except GeLoRAError:
        pass
    else:
        assert as_json(plan) == data
    assert repr(data) == repr(before)  # NaN equals nothing


@pytest.mark.parametrize("path", list(mapping_keys(as_json(PLAN))), ids=lambda path: ".".join(map(str, path)))
def test_a_plan_with_any_one_key_missing_is_refused(path):
    data = as_json(PLAN)
    *way, last = path
    inner = data
    for step in way:
        inner = inner[step]
    del inner[last]
    if last in SINCE:
        assert RankPlan.from_dict(data) is not None
        return
    with pytest.raises(PlanError, match=last):
        RankPlan.from_dict(data)


# --- writing


@pytest.mark.parametrize("function", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, function, error):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    before = path.read_bytes()

    def fail(*arguments, **keywords):
        raise error

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(type(error)):
        make_plan(ranks=(9,) * 6).save(path)
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize("value", [math.nan, {"a": [math.inf]}, {"a": object()}])
def test_what_json_cannot_say_is_not_written(tmp_path, value):
    path = tmp_path / "value.json"
    with pytest.raises((ValueError, TypeError)):
        json_files.write_json(path, value)
    assert os.listdir(tmp_path) == []


def test_a_write_replaces_the_old_file(tmp_path):
    path = tmp_path / "plan.json"
    make_plan().save(path)
    other = make_plan(ranks=(9,) * 6)
    other.save(path)
    assert RankPlan.load(path) == other
    assert os.listdir(tmp_path) == ["plan.json"]


@pytest.mark.parametrize(("mask", "mode"), [(0o022, 0o644), (0o077, 0o600)])
def test_a_written_file_has_the_rights_that_the_user_gives_new_files(tmp_path, monkeypatch, mask, mode):
    old, changed = os.umask(mask), []
    try:
        with monkeypatch.context() as patched:
            patched.setattr(os, "umask", changed.append)  # another thread would make files with the changed one
            make_plan().save(tmp_path / "plan.json")
    finally:
        os.umask(old)
    assert changed == []
    assert stat.S_IMODE((tmp_path / "plan.json").stat().st_mode) == mode
