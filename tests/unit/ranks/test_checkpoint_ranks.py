"""An adapter takes over the ranks and alphas of a checkpoint."""

import pytest
import torch
from peft import LoraConfig

from gelora_plugins.errors import ApplyError
from gelora_plugins.ranks.adapter import AppliedPlan, apply_config, has_ranks_of
from tests.support.ranks import LINEARS, ranks_of
from tests.support.tiny import build
from tests.support.training import LORA, layers, matrices, peft_model, state_of


def test_the_ranks_and_alphas_of_a_checkpoint_are_taken_over():
    trained = peft_model(
        rank_pattern={"q_proj": 3}, alpha_pattern={"layers.2.*": 5}, target_modules=["q_proj", "v_proj"]
    )
    saved = trained.peft_config["default"]
    model = peft_model(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj"])
    assert not has_ranks_of(model, saved)
    applied = apply_config(model, saved)
    assert has_ranks_of(model, saved)
    expected = ranks_of(trained)
    assert ranks_of(model) == expected
    assert applied == AppliedPlan(expected, tuple(expected))
    for name, layer in layers(model).items():
        assert layer.lora_alpha == layers(trained)[name].lora_alpha
        assert layer.scaling == layers(trained)[name].scaling
    mine = model.peft_config["default"]
    assert (mine.r, mine.lora_alpha, mine.rank_pattern, mine.alpha_pattern) == (
        saved.r,
        saved.lora_alpha,
        saved.rank_pattern,
        saved.alpha_pattern,
    )
    assert mine.rank_pattern is not saved.rank_pattern
    assert mine.alpha_pattern is not saved.alpha_pattern


def test_alphas_alone_are_taken_over_by_a_trained_adapter_and_its_matrices_stay():
    model = peft_model()
    with torch.no_grad():
        for layer in layers(model).values():
            layer.lora_B["default"].weight.fill_(0.5)
    before, objects = matrices(model), dict(model.named_parameters())
    saved = LoraConfig(**{**LORA, "lora_alpha": 16}, alpha_pattern={"q_proj": 8})
    assert not has_ranks_of(model, saved)
    applied = apply_config(model, saved)
    assert has_ranks_of(model, saved)
    assert applied.changed == ()
    assert {name.rpartition(".")[2]: layer.scaling["default"] for name, layer in layers(model).items()} == {
        **{linear.partition(".")[2]: 4.0 for linear in LINEARS},
        "q_proj": 2.0,
    }
    assert all(torch.equal(value, before[name]) for name, value in matrices(model).items())
    assert all(objects[name] is p for name, p in model.named_parameters())


def test_one_module_with_another_rank_or_alpha_is_enough_to_differ():
    model = peft_model()
    assert has_ranks_of(model, LoraConfig(**LORA))
    assert not has_ranks_of(model, LoraConfig(**LORA, rank_pattern={"layers.2.mlp.down_proj": 5}))
    assert not has_ranks_of(model, LoraConfig(**LORA, alpha_pattern={"layers.2.mlp.down_proj": 9}))
    assert not has_ranks_of(build("llama"), LoraConfig(**LORA))


def test_a_checkpoint_with_other_ranks_is_not_taken_over_by_a_trained_adapter():
    model = peft_model()
    with torch.no_grad():
        layers(model)["base_model.model.model.layers.0.mlp.up_proj"].lora_B["default"].weight.fill_(0.5)
    before = state_of(model)
    with pytest.raises(ApplyError, match=r"trained already: lora_B of model\.layers\.0\.mlp\.up_proj is not 0"):
        apply_config(model, LoraConfig(**LORA, rank_pattern={"layers.2.mlp.down_proj": 5}))
    assert state_of(model) == before


@pytest.mark.parametrize("saved", [True, False])
def test_a_checkpoint_is_as_rank_stabilised_as_the_model(saved):
    model = peft_model(use_rslora=not saved)
    before = state_of(model)
    with pytest.raises(ApplyError) as caught:
        apply_config(model, LoraConfig(**LORA, use_rslora=saved))
    assert str(caught.value) == (
        f"The checkpoint was trained with use_rslora={saved}, and the model's LoRA configuration says {not saved}. Set "
        "it as it was."
    )
    assert state_of(model) == before
