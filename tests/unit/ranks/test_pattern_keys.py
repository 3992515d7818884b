"""Keys of rank_pattern as each reader reads them: blocks 1 and 11, and a vision tower with blocks of the same names."""

import re

import pytest
from peft import LoraConfig, get_peft_model
from peft.utils.other import get_pattern_key

from gelora_plugins import RankPlan, check_plan, with_plan
from gelora_plugins.ranks.pattern_keys import key_of, keys_ever, lies_inside
from gelora_plugins.ranks.patterns import with_ranks, without_plan
from tests.support.plans import make_plan, plan_for
from tests.support.tiny import build
from tests.support.training import LORA, layers


def peft(pattern, name):
    """PEFT's own rule; Axolotl trains and merges with it too (0.21, loaders/adapter.py, cli/utils/lora_merge.py)."""
    return pattern.get(get_pattern_key(pattern, name))


def vllm(pattern, name):
    """vLLM 0.33, lora/peft_helper.py, PEFTHelper._match_pattern."""
    return next((value for key, value in pattern.items() if re.match(rf"(.*\.)?({key})$", name)), None)


def ms_swift(pattern, name):
    """ms-swift 4.6, tuners/lora_layers.py, LoraModel._create_and_replace; PEFT 0.14, get_pattern_key, is the same."""
    return pattern.get(next((key for key in pattern if re.match(rf".*\.{key}$", name)), name))


@pytest.mark.parametrize("reader", [peft, vllm, ms_swift])
def test_every_reader_gives_a_block_its_own_rank_and_no_other_module_one(reader):
    pattern = make_plan([10.0 + i for i in range(13)], ranks=range(1, 13)).rank_pattern()
    for i in range(12):
        for target in ("self_attn.q_proj", "mlp.experts.3.down_proj"):
            assert reader(pattern, f"model.layers.{i}.{target}") == i + 1
    for other in ("vision.model.layers.1.q", "xmodel.layers.1.q", "model.layers.12.q", "model.layers.1", "lm_head"):
        assert reader(pattern, other) is None


@pytest.mark.parametrize("reader", [peft, vllm, ms_swift])
@pytest.mark.parametrize("path", ["h.1", "blocks", "h[0].(a|b)+c$", "layer 1"])
def test_names_are_taken_as_they_are(reader, path):
    pattern = {key_of(path, inside=True): 5}
    assert reader(pattern, f"{path}.q") == 5
    for other in (path, f"{path}1.q", f"a.{path}.q", f"x{path}.q", path.replace(".", "x") + "1.q"):
        assert reader(pattern, other) is None


@pytest.mark.parametrize("reader", [peft, vllm, ms_swift])
def test_the_key_of_one_module_matches_it_alone(reader):
    pattern = {key_of("model.layers.1.q_proj"): 5}
    assert reader(pattern, "model.layers.1.q_proj") == 5
    for other in ("model.layers.11.q_proj", "vision.model.layers.1.q_proj", "model.layers.1.xq_proj", "q_proj"):
        assert reader(pattern, other) is None


def test_a_module_of_the_root_has_the_key_that_peft_takes():
    assert peft({key_of("lm_head"): 5}, "lm_head") == 5
    assert peft({key_of("lm_head"): 5}, "draft.lm_head") is None


def test_the_rule_of_ms_swift_never_matches_an_anchored_key():
    """Why the keys have the form that they have."""
    assert ms_swift({r"^model\.layers\.1\..*": 5}, "model.layers.1.q_proj") is None


def rank_of(model):
    return {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in layers(model).items()}


def test_peft_makes_an_adapter_of_twelve_blocks_with_these_keys():
    model = build("llama", num_hidden_layers=12)
    plan = plan_for(model, range(1, 13), LoraConfig(**LORA))
    ranks = rank_of(get_peft_model(model, with_plan(LoraConfig(**LORA), plan)))
    assert ranks == {name: int(name.split(".")[2]) + 1 for name in ranks}
    assert len(ranks) == 12 * 7


# Keys that were written before


def earlier(config, plan):
    """`config` with the keys of gelora 0.2.0."""
    config.rank_pattern = {rf"^{re.escape(s.name)}\..*": r for s, r in zip(plan.sites, plan.ranks, strict=True)}
    config.alpha_pattern = {key: plan.alpha(rank) for key, rank in config.rank_pattern.items()}
    return config


def test_an_adapter_with_keys_of_before_is_known_as_its_plans(tmp_path):
    plan = plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA))
    plan.save(tmp_path / "plan.json")  # which holds no keys
    model = get_peft_model(build("llama"), earlier(LoraConfig(**LORA), plan))
    check_plan(model, RankPlan.load(tmp_path / "plan.json"))
    assert without_plan(model.peft_config["default"], plan, []).rank_pattern == {}


def test_single_keys_of_before_are_known_too():
    plan = plan_for(build("llama"), (2, 6, 5), LoraConfig(**LORA))
    name = "model.layers.1.mlp.up_proj"
    for key in keys_ever(name):
        config = LoraConfig(**LORA, rank_pattern={key: 6, "q_proj": 6})
        assert without_plan(config, plan, [name]).rank_pattern == {"q_proj": 6}
        assert lies_inside(key, "model.layers.1")
        assert not lies_inside(key, "model.layers.11")
    assert not lies_inside("q_proj", "model.layers.1")


def test_ranks_of_single_modules_are_written_for_every_reader():
    config = with_ranks(LoraConfig(**LORA), {"h.1.q": 2, "h.11.q": 3, "lm_head": 5}, {"h.1.q": 4, "h.11.q": 6})
    for reader in (peft, vllm, ms_swift):
        assert [reader(config.rank_pattern, name) for name in ("h.1.q", "h.11.q", "g.h.1.q")] == [2, 3, None]
    assert peft(config.rank_pattern, "lm_head") == 5
