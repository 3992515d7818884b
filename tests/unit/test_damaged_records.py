"""A damaged plan is refused, and the message says where."""

import json
import math
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gelora_plugins import json_files
from gelora_plugins.errors import GeLoRAError, PlanError
from gelora_plugins.ranks.plan import RankPlan
from tests.support.plans import PLAN, as_json


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
