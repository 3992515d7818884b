import json
from contextlib import contextmanager
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, ModernBertForMaskedLM

from gelora_plugins.errors import LayoutError, PlanError
from gelora_plugins.hookspecs import hookimpl
from gelora_plugins.layout import Block, Linear, ModelLayout
from gelora_plugins.plugins import find_layout, plugin_manager
from gelora_plugins.probe.find_blocks import find_transformers_layout
from tests.support.layouts import (
    EXPECTED,
    FINAL_NORMS,
    expected_layout,
)
from tests.support.probing import features_of
from tests.support.tiny import BLOCKS, DECODER_BLOCKS, VOCABULARY, build

families = pytest.mark.parametrize("family", EXPECTED)


@families
def test_layout_of_a_model_with_its_head(family):
    assert find_transformers_layout(build(family)) == expected_layout(family, EXPECTED[family][0])


@families
def test_layout_of_a_bare_backbone(family):
    assert find_transformers_layout(build(family, bare=True)) == expected_layout(family, "")


@families
def test_a_peft_model_has_the_layout_of_the_model_in_it(family):
    layout = find_transformers_layout(build(family))
    model = get_peft_model(build(family), LoraConfig(r=2, target_modules="all-linear"))
    assert "base_layer" in " ".join(name for name, _ in model.named_modules())
    assert find_transformers_layout(model) == layout


@families
def test_add_adapter_does_not_change_the_layout(family):
    model = build(family)
    layout = find_transformers_layout(model)
    model.add_adapter(LoraConfig(r=2, target_modules=sorted({x.name.split(".")[-1] for x in layout.blocks[0].linears})))
    assert "base_layer" in " ".join(name for name, _ in model.named_modules())
    assert find_transformers_layout(model) == layout


def test_modules_that_peft_trains_whole_do_not_change_the_layout():
    config = LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["down_proj"])
    model = get_peft_model(build("llama"), config)
    assert find_transformers_layout(model) == expected_layout("llama", "model")


@families
def test_recorded_boundaries_are_the_hidden_states_of_the_model(family):
    model = build(family, bare=True).eval()
    layout = find_transformers_layout(model)
    inputs = random_inputs(family)
    recorded = features_of(model, layout, [inputs], lambda hidden, mask: hidden.flatten(1)).points
    with torch.no_grad():
        outputs = model(**inputs, output_hidden_states=True)
        given = outputs.hidden_states if "hidden_states" in outputs else outputs.encoder_hidden_states
        given = [*given, *outputs.get("decoder_hidden_states", ())]
        last = -1
        for stack, norm in zip(layout.stacks, FINAL_NORMS.get(family, (None, None)), strict=False):
            last += len(stack) + 1
            if norm:
                before = recorded[last].unflatten(1, given[last].shape[1:])
                assert not torch.allclose(before, given[last], atol=1e-2), "the norm does nothing here"
                recorded = (*recorded[:last], model.get_submodule(norm)(before).flatten(1), *recorded[last + 1 :])
    assert len(recorded) == len(given) == layout.num_boundaries
    for boundary, (ours, theirs) in enumerate(zip(recorded, given, strict=True)):
        assert torch.allclose(ours, theirs.flatten(1), atol=1e-5), boundary


def random_inputs(family):
    generator = torch.Generator().manual_seed(0)
    if family == "vit":
        return {"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)}
    ids = torch.randint(5, VOCABULARY, (2, 7), generator=generator)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if len(EXPECTED[family][1]) == 2:
        inputs["decoder_input_ids"] = torch.randint(5, VOCABULARY, (2, 6), generator=generator)
    return inputs


@pytest.mark.parametrize("family", ["llama", "t5"])
def test_json_round_trip(family):
    layout = find_transformers_layout(build(family))
    assert ModelLayout.from_dict(json.loads(json.dumps(layout.to_dict()))) == layout


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data.pop("stacks"),
        lambda data: data.update(stacks=[]),
        lambda data: data.update(stacks=[[]]),
        lambda data: data.update(stacks=["block"]),
        lambda data: data.update(backbone=None),
        lambda data: data["stacks"][0].append(data["stacks"][0][0]),
        lambda data: data["stacks"][0][0]["linears"][0].update(in_features=-1),
        lambda data: data["stacks"][0][0].update(linears=None),
    ],
)
def test_damaged_json_is_an_error(damage):
    data = json.loads(json.dumps(asdict(find_transformers_layout(build("llama")))))
    damage(data)
    with pytest.raises(PlanError):
        ModelLayout.from_dict(data)


def test_block_boundaries_of_two_stacks_do_not_meet():
    layout = find_transformers_layout(build("t5"))
    assert layout.num_boundaries == BLOCKS + 1 + DECODER_BLOCKS + 1
    assert list(layout.block_boundaries()) == [(0, 1), (1, 2), (2, 3), (4, 5), (5, 6)]


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("family", ["albert", "xlm"])
def test_models_without_a_list_of_blocks_are_refused(family, bare):
    with pytest.raises(LayoutError, match=r"expected one list of 3 .* found: .*find_model_layout\(model\)"):
        find_transformers_layout(build(family, bare=bare))


def test_a_model_that_is_not_of_transformers_is_refused():
    with pytest.raises(LayoutError, match=r"Sequential is not a model of transformers.*find_model_layout\(model\)"):
        find_layout(nn.Sequential(nn.Linear(2, 2)))


def test_a_model_that_reads_images_has_the_blocks_of_its_language_model():
    vision = CLIPVisionConfig(hidden_size=32, num_hidden_layers=BLOCKS, num_attention_heads=2, image_size=8)
    model = LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=build("llama").config))
    layout = find_transformers_layout(model)
    assert [block.name for block in layout.blocks] == [f"model.language_model.layers.{i}" for i in range(BLOCKS)]
    assert layout.backbone == "model"


def test_lists_inside_the_blocks_are_not_taken_for_the_stack():
    model = build("t5", num_layers=2, num_decoder_layers=3)  # an encoder block of T5 is a list of 2, a decoder's of 3
    assert [len(stack) for stack in find_transformers_layout(model).stacks] == [2, 3]


def test_a_list_of_norms_beside_the_blocks_is_not_taken_for_the_stack():
    model = build("llama")
    model.model.norms = nn.ModuleList(nn.LayerNorm(16) for _ in range(BLOCKS))
    assert find_transformers_layout(model) == expected_layout("llama", "model")


def test_a_head_that_is_called_decoder_is_not_taken_for_one():
    model = ModernBertForMaskedLM(build("modernbert").config)
    assert find_transformers_layout(model) == expected_layout("modernbert", "model")


PLUGIN_LAYOUT = ModelLayout("mine", "", ((Block("0", (Linear("0", 2, 2),)),),))


class Plugin:
    def __init__(self, kind):
        self.kind = kind

    @hookimpl
    def find_model_layout(self, model):
        return PLUGIN_LAYOUT if isinstance(model, self.kind) else None


@contextmanager
def registered(plugin):
    plugin_manager().register(plugin, "mine")
    try:
        yield
    finally:
        plugin_manager().unregister(plugin)


def test_a_plugin_brings_the_layout_of_a_model_that_transformers_does_not_know():
    with registered(Plugin(nn.Sequential)):
        assert find_layout(nn.Sequential(nn.Linear(2, 2))) is PLUGIN_LAYOUT


def test_a_plugin_that_does_not_know_the_model_leaves_it_to_the_generic_finder():
    with registered(Plugin(nn.Sequential)):
        assert find_layout(build("llama")) == expected_layout("llama", "model")


def test_the_layout_of_a_plugin_wins_over_the_generic_finder():
    model = build("llama")
    with registered(Plugin(type(model))):
        assert find_layout(model) is PLUGIN_LAYOUT
    assert find_layout(model) == expected_layout("llama", "model")
