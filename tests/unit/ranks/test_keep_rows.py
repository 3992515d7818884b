"""Ranks that are taken out of a trained adapter: what is left is the same function, and PEFT loads it as such."""

import copy
from dataclasses import replace

import pytest
import torch
from peft import PeftModel

from gelora_plugins.errors import PlanError
from gelora_plugins.plugins import find_layout
from gelora_plugins.ranks.adapter import apply_plan, keep_rows
from gelora_plugins.ranks.find_adapter import require_adapter
from gelora_plugins.ranks.plan_check import check_plan
from tests.support.methods import logits
from tests.support.plans import make_plan, make_profile
from tests.support.tiny import build
from tests.support.training import layers, matrices, peft_model

PREFIX = "base_model.model."


def trained(**options):
    """An adapter of which some ranks add nothing, and which ones: rank 0 in block 1, the last in all of block 2."""
    model = peft_model(**options)
    keep = {}
    source = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, layer in layers(model).items():
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            b.copy_(torch.randn(b.shape, generator=source))
            rows = list(range(len(a)))
            if ".1.self_attn" in name and len(a) > 1:
                rows.pop(0)
                a[0] = 0
            if ".2." in name and len(a) > 1:
                b[:, rows.pop()] = 0
            keep[name.removeprefix(PREFIX)] = torch.tensor(rows)
    return model, keep


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"r": 3},  # 8/3 is no whole number of halves
        {"rank_pattern": {"q_proj": 2, "down_proj": 1, r".*layers\.2\..*": 7}, "alpha_pattern": {"v_proj": 3}},
        # Sorted, the key of the user's stands before one of "^model...", and before one of the plan's blocks.
        {"rank_pattern": {"[a-z.0-9]*layers.1.self_attn.q_proj": 5}},
    ],
)
def test_what_is_left_is_the_same_function_live_and_loaded(tmp_path, options):
    model, keep = trained(**options)
    before = logits(model)
    parameters = dict(model.named_parameters())
    scalings = {name: layer.scaling["default"] for name, layer in layers(model).items()}
    keep_rows(require_adapter(model), keep)
    assert dict(model.named_parameters()) == parameters  # the same objects
    for name, layer in layers(model).items():
        kept = len(keep[name.removeprefix(PREFIX)])
        a, b = layer.lora_A["default"], layer.lora_B["default"]
        assert layer.r["default"] == len(a.weight) == b.weight.shape[1] == a.out_features == b.in_features == kept
        assert layer.scaling["default"] == scalings[name]
    assert len({layer.r["default"] for layer in layers(model).values()}) > 1
    alphas = [layer.lora_alpha["default"] for layer in layers(model).values()]
    assert [type(alpha) for alpha in alphas] == [int if alpha == int(alpha) else float for alpha in alphas]
    torch.testing.assert_close(logits(model), before, atol=1e-5, rtol=1e-5)  # sums of other lengths
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build("llama"), tmp_path)
    for name, layer in layers(again).items():
        live = layers(model)[name]
        assert layer.r == live.r
        assert layer.scaling["default"] == pytest.approx(live.scaling["default"], rel=1e-15)
    assert all(value.equal(matrices(again)[name]) for name, value in matrices(model).items())
    torch.testing.assert_close(logits(again), logits(model), atol=1e-6, rtol=1e-6)


def test_the_configuration_of_another_adapter_is_not_touched():
    model, keep = trained()
    config = model.peft_config["default"]
    before = copy.deepcopy(config.to_dict())
    keep_rows(require_adapter(model), keep)
    assert config.to_dict() == before  # TRL's "ref" adapter may share it
    assert model.peft_config["default"] is not config


def test_gradients_of_the_old_shapes_are_gone_and_the_others_stay():
    model, keep = trained()
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    keep_rows(require_adapter(model), keep)
    for name, layer in layers(model).items():
        pruned = len(keep[name.removeprefix(PREFIX)]) < 4
        assert (layer.lora_A["default"].weight.grad is None) == pruned
        assert (layer.lora_B["default"].weight.grad is None) == pruned


def test_the_rows_that_stay_are_those_that_were_named_in_their_order():
    model, _ = trained()
    name, layer = next(iter(layers(model).items()))
    a, b = layer.lora_A["default"].weight.detach().clone(), layer.lora_B["default"].weight.detach().clone()
    others = {n: m for n, m in matrices(model).items() if not n.startswith(name)}
    keep_rows(require_adapter(model), {name.removeprefix(PREFIX): torch.tensor([1, 3])})
    assert layer.lora_A["default"].weight.equal(a[[1, 3]])
    assert layer.lora_B["default"].weight.equal(b[:, [1, 3]])
    assert all(matrices(model)[n].equal(m) for n, m in others.items())


def test_the_plan_of_the_ranks_before_is_not_that_of_those_after():
    model = peft_model()
    layout = find_layout(model)
    profile = replace(make_profile([1.0] * layout.num_boundaries), layout=layout)
    sites = require_adapter(model).sites(layout)
    plan = replace(make_plan(), profile=profile, sites=sites, ranks=(2, 6, 7), base_rank=4, lora_alpha=8)
    apply_plan(model, plan)
    check_plan(model, plan)
    name = next(iter(require_adapter(model).layers))
    keep_rows(require_adapter(model), {name: torch.tensor([0])})
    with pytest.raises(
        PlanError, match=f"^1 of 21 target modules have another rank or scaling than .*: {name} has rank 1"
    ):
        check_plan(model, plan)
