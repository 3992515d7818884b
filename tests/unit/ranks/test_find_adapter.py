"""Which adapter of a model is planned for, and what its ranks cost."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn

from gelora_plugins.errors import ApplyError, LayoutError
from gelora_plugins.ranks.adapter import apply_plan
from gelora_plugins.ranks.find_adapter import find_adapter, require_adapter
from gelora_plugins.ranks.plan import layout_sites
from tests.support.kinds import KINDS
from tests.support.ranks import COST, LINEARS, layout_of, plan_for, ranks_of
from tests.support.tiny import build
from tests.support.training import LORA, layers, peft_model


def test_the_layers_of_an_adapter_go_by_the_names_that_peft_matches():
    model = peft_model()
    adapter = require_adapter(model)
    assert list(adapter.layers) == [f"model.layers.{i}.{linear}" for i in range(3) for linear in LINEARS]
    assert (adapter.model, adapter.name) == (model, "default")
    fused = get_peft_model(KINDS["fused experts, all-linear"].model(), LoraConfig(**LORA))
    names = {name for name in require_adapter(fused).layers if "experts" in name}
    assert names == {f"model.layers.{i}.mlp.experts.{p}" for i in range(3) for p in ("gate_up_proj", "down_proj")}


def test_a_model_without_an_adapter_has_none():
    assert find_adapter(build("llama")) is None
    with pytest.raises(ApplyError) as caught:
        require_adapter(build("llama"))
    assert str(caught.value) == (
        "The model has no LoRA adapter; expected one to give ranks to. Wrap it with get_peft_model(model, "
        "LoraConfig(...)), or pass GeLoRACallback(lora_config=LoraConfig(...)); with TRL pass peft_config."
    )


def test_the_adapter_of_a_compiled_model_is_that_of_the_model():
    model = peft_model()
    assert find_adapter(torch.compile(model)).model is model


def test_what_a_peft_model_holds_is_refused_with_the_way_out():
    bases = (build("llama"), nn.ModuleDict({"linear": nn.Linear(2, 2)}))
    for base, target in zip(bases, ("q_proj", "linear"), strict=True):
        get_peft_model(base, LoraConfig(target_modules=[target]))
        with pytest.raises(ApplyError) as caught:
            find_adapter(base)
        assert str(caught.value) == (
            f"This {type(base).__name__} was given to get_peft_model before, which puts the adapter into the model "
            "itself (PEFT 0.21), or to a Trainer with GeLoRACallback(lora_config=...). Pass the PeftModel that came of "
            "it (trainer.model), or load the model again."
        )


def test_an_adapter_inside_a_module_of_ones_own_is_refused_with_its_place():
    class Around(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = peft_model()

    with pytest.raises(ApplyError) as caught:
        require_adapter(Around())
    assert str(caught.value) == (
        "The adapter is on `inner` of Around, a module around a PeftModel, which GeLoRA does not look into. Give it "
        "its ranks before: plan = select_ranks(model.inner, rows); apply_plan(model.inner, plan); then train without "
        "GeLoRACallback."
    )


def test_the_active_adapter_is_the_one():
    model = build("llama")
    for name, target in (("first", "q_proj"), ("second", "v_proj")):
        model.add_adapter(LoraConfig(**{**LORA, "target_modules": [target]}), name)
    model.set_adapter("second")
    adapter = require_adapter(model)
    assert (adapter.name, list(adapter.layers)) == ("second", [f"model.layers.{i}.self_attn.v_proj" for i in range(3)])
    model.set_adapter(["first", "second"])
    with pytest.raises(ApplyError) as caught:
        find_adapter(model)
    assert str(caught.value) == ("The adapters first, second are active; expected one. Activate the one to be trained.")


def test_an_adapter_that_is_not_lora_is_refused():
    config = IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    with pytest.raises(ApplyError, match=r"^The adapter 'default' is PeftType\.IA3; GeLoRA chooses ranks for LoRA onl"):
        find_adapter(get_peft_model(build("llama"), config))


def test_the_sites_are_the_blocks_at_the_cost_of_what_is_free():
    def sites(**options):
        model = peft_model(**options)
        return [(site.name, site.parameters_per_rank) for site in require_adapter(model).sites(layout_of(model))]

    assert sites() == [(f"model.layers.{i}", COST) for i in range(3)]
    assert sites(r=1) == sites(r=7) == sites()
    assert sites(rank_pattern={"1.mlp.*": 3}) == [
        ("model.layers.0", COST),
        ("model.layers.1", 112),
        ("model.layers.2", COST),
    ]
    assert sites(rank_pattern={"1.*": 3}) == [("model.layers.0", COST), ("model.layers.2", COST)]
    assert sites(target_modules=["q_proj", "embed_tokens", "lm_head"]) == [(f"model.layers.{i}", 32) for i in range(3)]
    with pytest.raises(LayoutError) as caught:
        sites(rank_pattern={".*proj": 3})
    assert str(caught.value) == (
        "None of the 21 target modules of the adapter is free to get a rank: expected some in the transformer blocks "
        "that `rank_pattern` and `alpha_pattern` of your LoRA configuration leave open."
    )


def test_the_sites_are_those_of_the_layout_where_every_linear_map_is_adapted():
    model = peft_model()
    assert require_adapter(model).sites(layout_of(model)) == layout_sites(layout_of(model), lambda name: True)
    (site, *_) = require_adapter(peft_model(target_modules=["k_proj"])).sites(layout_of(model))
    assert site.max_rank == 8


def test_a_site_has_no_largest_rank_where_no_layer_says_its_sides():
    model = peft_model()
    for layer in layers(model).values():
        layer.in_features = 0
    assert {site.max_rank for site in require_adapter(model).sites(layout_of(model))} == {None}


def test_an_adapter_made_with_the_ranks_of_a_plan_has_nothing_left_to_choose():
    plan = plan_for(peft_model(), 2, 6, 7)
    model = get_peft_model(build("llama"), LoraConfig(**plan.lora_config_kwargs(), target_modules="all-linear"))
    with pytest.raises(LayoutError) as caught:
        require_adapter(model).sites(layout_of(model))
    assert str(caught.value) == (
        "The adapter was made with the ranks of a plan (rank_pattern names whole blocks), and none of its 21 target "
        "modules is left to choose a rank for. Train it as it is, with GeLoRACallback(plan=...) to check it, or make "
        "the adapter without the plan's patterns."
    )


def test_the_parameters_of_an_adapter_are_not_those_of_the_layer_below_it():
    model = get_peft_model(build("llama"), LoraConfig(**LORA), adapter_name="weight")
    adapter = require_adapter(model)
    for layer in adapter.layers.values():
        assert [key for key, _ in adapter.parameters(layer)] == ["lora_A.weight.weight", "lora_B.weight.weight"]


def test_the_cost_of_fused_experts_is_that_of_every_expert():
    kind = KINDS["fused experts, `target_parameters`"]
    model = get_peft_model(kind.model(), LoraConfig(**{**LORA, **kind.options}))
    sites = require_adapter(model).sites(layout_of(model))
    experts = 2 * ((16 + 16) + (8 + 16))  # gate and up of 8 each, and down
    assert {site.parameters_per_rank for site in sites} == {(16 + 16) + (16 + 8) + experts}


def test_the_cost_is_the_same_where_the_matrices_are_elsewhere():
    model = peft_model()
    whole = require_adapter(model).sites(layout_of(model))
    for name, parameter in model.named_parameters():
        parameter.data = torch.empty(0) if "lora_" in name else parameter.data
    assert require_adapter(model).sites(layout_of(model)) == whole


def test_a_model_that_is_none_of_transformers_is_not_taken_for_a_tensor_parallel_one():
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(3, 3)), LoraConfig(target_modules=["0"]))
    require_adapter(model).check_fresh()


def test_eleven_blocks_are_not_taken_for_one_another():
    model = get_peft_model(build("llama", num_hidden_layers=11), LoraConfig(**{**LORA, "target_modules": ["q_proj"]}))
    apply_plan(model, plan_for(model, *range(1, 12)))
    assert list(ranks_of(model).values()) == list(range(1, 12))
