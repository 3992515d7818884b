"""200 damaged plans and 200 damaged profiles: each is taken as it stands or refused, and a refusal changes no model."""

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel

from gelora_plugins import GeLoRAConfig, RankPlan, apply_plan, json_files, select_ranks
from gelora_plugins.dimension.profile import DimensionProfile
from gelora_plugins.errors import GeLoRAError, PlanError
from gelora_plugins.ranks.plan import layout_sites
from gelora_plugins.ranks.planning import make_plan
from tests.support.training import peft_model, ranks_by_block, rows, state_of

COUNT = 200
VALUES = [None, True, False, 0, -1, 1, 7, 1.5, 1e308, 2**53, 10**400, "", "model", [], {}, [1], {"a": 1}]
# What a plan says where a key is missing that earlier versions did not write.
SINCE = {"max_rank": None, "options": None, "model_name": None, "model_fingerprint": None}
SINCE |= {"min_rank": 1, "scaling_rule": "constant", "total_rank": None, "rank_rule": None}
SINCE |= {"num_rows": None, "num_targets": None}
TEXTS = ["NaN", "Infinity", "-Infinity", "1e999", "null", '"\\ud800"', "[[[[", "\x00"]


@pytest.fixture(scope="module")
def plan() -> RankPlan:
    return select_ranks(peft_model(), rows(), GeLoRAConfig(policy="budget"), progress=False)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key) in nested JSON values."""
    for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
        yield value, key
        if isinstance(inner, (dict, list)):
            yield from places(inner)


def damaged(text: str, rng: random.Random) -> bytes:
    """The text of a record with one damage: to its bytes, to its text, or to one of its values."""
    kind = rng.randrange(6)
    data = bytearray(text.encode())
    place = rng.randrange(len(data))
    if kind == 0:
        return bytes(data[:place])
    if kind == 1:
        data[place] ^= 1 << rng.randrange(8)
        return bytes(data)
    if kind == 2:
        return bytes(data[:place] + data[place : place + 40] * 2 + data[place + 40 :])
    values = json.loads(text)
    container, key = rng.choice(list(places(values)))
    if kind == 3:
        del container[key]
    elif kind == 4:
        container[key] = rng.choice(VALUES)
    else:
        container[key] = "HERE"
        return json.dumps(values).replace('"HERE"', rng.choice(TEXTS)).encode()
    return json.dumps(values).encode()


def same(written: Any, read: Any) -> bool:
    """Whether a record says what the file says; keys that no record has are not read."""
    if isinstance(read, dict):
        return all(same(written[key] if key in written else SINCE[key], value) for key, value in read.items())
    if isinstance(read, (list, tuple)):
        return len(written) == len(read) and all(map(same, written, read))
    return bool(written == read)


def test_damaged_plans(tmp_path: Path, plan: RankPlan) -> None:
    path = tmp_path / "plan.json"
    plan.save(path)
    text, rng = path.read_text(), random.Random(0)
    model = peft_model()
    fresh = state_of(model)
    refused = 0
    for _ in range(COUNT):
        path.write_bytes(damaged(text, rng))
        try:
            loaded = RankPlan.load(path)
            apply_plan(model, loaded)
        except GeLoRAError:
            refused += 1
            assert state_of(model) == fresh, path.read_bytes()
        else:
            assert same(json.loads(path.read_bytes()), loaded.to_dict()), path.read_bytes()
            assert ranks_by_block(model) == list(loaded.ranks)
            model = peft_model()
    assert 0.5 * COUNT < refused < COUNT


def test_damaged_profiles(tmp_path: Path, plan: RankPlan) -> None:
    path = tmp_path / "profile.json"
    json_files.write_json(path, plan.profile.to_dict())
    text, rng = path.read_text(), random.Random(0)
    refused = 0
    for _ in range(COUNT):
        path.write_bytes(damaged(text, rng))
        for policy in ("gelora", "budget", "uniform"):
            try:
                profile = DimensionProfile.from_dict(json_files.read_json(path))
                sites = layout_sites(profile.layout, lambda name: True)
                make_plan(profile, GeLoRAConfig(policy=policy), sites, 8, lora_alpha=16, use_rslora=False)
            except GeLoRAError:
                refused += 1
            else:
                assert same(json.loads(path.read_bytes()), profile.to_dict()), path.read_bytes()
    assert 0.5 * 3 * COUNT < refused < 3 * COUNT


def test_a_refused_plan_leaves_an_adapter_that_can_be_given_a_right_one(tmp_path: Path, plan: RankPlan) -> None:
    model: PeftModel = peft_model()
    path = tmp_path / "plan.json"
    path.write_text(json.dumps({**plan.to_dict(), "lora_alpha": 99}))
    with pytest.raises(GeLoRAError):
        apply_plan(model, RankPlan.load(path))
    apply_plan(model, plan)
    assert ranks_by_block(model) == list(plan.ranks)


@pytest.mark.parametrize("rank", [10_000, 2**53, 10**400], ids=["ten thousand", "2**53", "10**400"])
def test_a_rank_that_no_matrix_has_is_refused_before_memory_is_asked_for(plan: RankPlan, rank: int) -> None:
    model = peft_model()
    fresh = state_of(model)
    with pytest.raises(PlanError, match=rf"The rank of model\.layers\.0 is {str(rank)[:80]}"):
        apply_plan(model, replace(plan, ranks=(rank, *plan.ranks[1:])))
    assert state_of(model) == fresh
