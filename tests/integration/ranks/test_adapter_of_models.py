"""Ranks changed in place: what is left as it was, and what the kinds of LoRA keep."""

import dataclasses
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer

from gelora_plugins import GeLoRACallback, GeLoRAConfig, apply_plan, select_ranks
from tests.support.tiny import build
from tests.support.training import (
    LORA,
    Watch,
    layers,
    losses,
    matrices,
    peft_model,
    ranks_by_block,
    rows,
    saved_plan,
    state_of,
    trainer_for,
)

# What is left as it was


@pytest.mark.parametrize("options", [{}, {"lora_dropout": 0.3}])
def test_uniform_at_the_users_rank_trains_bit_for_bit_as_without_the_callback(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    with_it = trainer_for(peft_model(**options), tmp_path / "a", GeLoRACallback(GeLoRAConfig(policy="uniform")))
    with_it.train()
    without = trainer_for(peft_model(**options), tmp_path / "b", None)
    without.train()
    assert losses(with_it) == losses(without)
    for name, value in matrices(without.model).items():
        assert torch.equal(matrices(with_it.model)[name], value)


class Noisy(torch.utils.data.Dataset):
    """Drops words at random whenever a row is read, with each of the generators in use."""

    def __len__(self) -> int:
        return 120

    def __getitem__(self, i: int) -> Any:
        ids = [word for word in rows()[i]["input_ids"] if torch.rand(()) + np.random.rand() + random.random() > 1.0]
        return {"input_ids": ids or [3], "labels": ids or [3]}


def test_reading_rows_that_are_made_at_random_leaves_no_trace(tmp_path: Path) -> None:
    model = peft_model()
    before = state_of(model)
    select_ranks(model, Noisy(), progress=False)
    assert state_of(model) == before


def test_a_module_whose_rank_does_not_change_is_not_touched() -> None:
    model = peft_model()
    plan = select_ranks(model, rows(), progress=False)
    plan = dataclasses.replace(plan, ranks=(4, 6, 4))
    before = {name: (p.detach().clone(), p.shape) for name, p in model.named_parameters()}
    applied = apply_plan(model, plan)
    for name, parameter in model.named_parameters():
        value, shape = before[name]
        if "lora_" in name and ".layers.1." in name:
            assert parameter.shape != shape, name
        else:
            assert torch.equal(parameter, value), name
    assert len(applied.changed) == 7


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"lora_bias": True, "target_modules": ["q_proj"]}])
def test_the_parameters_stay_the_same_objects_so_that_who_holds_them_trains_them(options: dict[str, Any]) -> None:
    model = peft_model(**options)
    plan = dataclasses.replace(select_ranks(model, rows(), progress=False), ranks=(2, 6, 7))
    before = {name: (p, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    for parameter, _, _ in before.values():
        parameter.grad = torch.zeros_like(parameter)
    apply_plan(model, plan)
    after = {name: (p, p.dtype, p.requires_grad) for name, p in model.named_parameters()}
    assert list(after) == list(before)
    assert all(after[name][0] is entry[0] and after[name][1:] == entry[1:] for name, entry in before.items())
    assert all(p.grad is None or p.grad.shape == p.shape for p in model.parameters())


def test_one_modules_rank_does_not_move_anothers_draw() -> None:
    plan = select_ranks(peft_model(), rows(), progress=False)
    drawn = []
    for middle in (2, 7):
        model = peft_model()
        torch.manual_seed(5)
        apply_plan(model, dataclasses.replace(plan, ranks=(3, middle, 5)))
        drawn.append({name: value for name, value in matrices(model).items() if ".layers.2." in name})
    assert all(torch.equal(drawn[0][name], drawn[1][name]) for name in drawn[0])
    torch.manual_seed(6)
    other = peft_model()
    torch.manual_seed(6)
    apply_plan(other, dataclasses.replace(plan, ranks=(3, 2, 5)))
    assert any(not torch.equal(drawn[0][name], matrices(other)[name]) for name in drawn[0]), "seeds must matter"


@pytest.mark.parametrize(("base", "autocast"), [(torch.bfloat16, True), (torch.bfloat16, False), (torch.float32, True)])
def test_dtype_and_requires_grad_stay(base: torch.dtype, autocast: bool) -> None:
    torch.manual_seed(0)
    model = get_peft_model(build("llama").to(base), LoraConfig(**LORA), autocast_adapter_dtype=autocast)
    frozen = [name for name, _ in model.named_parameters() if ".layers.1." in name and "lora_A" in name]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    before = {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()}
    expected = torch.float32 if autocast else base
    assert {dtype for name, (dtype, _, _) in before.items() if "lora_" in name} == {expected}
    plan = select_ranks(model, rows(), progress=False)
    apply_plan(model, dataclasses.replace(plan, ranks=(2, 6, 7)))
    assert ranks_by_block(model) == [2, 6, 7]
    assert {name: (p.dtype, p.device, p.requires_grad) for name, p in model.named_parameters()} == before


@pytest.mark.parametrize(
    ("options", "scaling"),
    [({"use_rslora": True}, 4.0), ({"use_dora": True}, 2.0), ({"lora_bias": True}, 2.0)],
    ids=["rslora", "dora", "bias"],
)
def test_kinds_of_lora_keep_their_scaling_and_train(tmp_path: Path, options: dict[str, Any], scaling: float) -> None:
    if "lora_bias" in options:
        options = {**options, "target_modules": ["q_proj", "v_proj"]}
    model = peft_model(**options)
    watch = Watch()
    trainer = trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")))
    trainer.add_callback(watch)
    trainer.train()
    assert ranks_by_block(model) == list(saved_plan(tmp_path).ranks)
    assert all(layer.scaling["default"] == pytest.approx(scaling, rel=1e-12) for layer in layers(model).values())
    assert all(not torch.equal(value, watch.before[name]) for name, value in matrices(model).items())


def test_the_users_own_rank_pattern_wins(tmp_path: Path) -> None:
    model = peft_model(rank_pattern={"layers.1.self_attn.q_proj": 3}, alpha_pattern={"layers.1.self_attn.q_proj": 5})
    trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget"))).train()
    plan = saved_plan(tmp_path)
    theirs = model.get_submodule("base_model.model.model.layers.1.self_attn.q_proj")
    assert (theirs.r["default"], theirs.lora_alpha["default"]) == (3, 5)
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter")
    assert {n: m.r["default"] for n, m in layers(again).items()} == {
        n: m.r["default"] for n, m in layers(model).items()
    }
    assert model.get_submodule("base_model.model.model.layers.1.self_attn.k_proj").r["default"] == plan.ranks[1]


def test_embeddings_and_heads_keep_their_rank(tmp_path: Path) -> None:
    model = peft_model(target_modules=["q_proj", "embed_tokens", "lm_head"])
    trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget"))).train()
    assert layers(model)["base_model.model.lm_head"].r["default"] == 4
    assert layers(model)["base_model.model.model.embed_tokens"].r["default"] == 4


def test_the_configuration_object_of_the_user_is_not_written_to() -> None:
    config = LoraConfig(**LORA)
    model = get_peft_model(build("llama"), config)
    shared = model.peft_config["default"]
    apply_plan(model, select_ranks(model, rows(), progress=False))
    assert shared.rank_pattern == {}
    assert model.peft_config["default"].rank_pattern != {}


def test_a_failure_in_the_middle_of_applying_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = peft_model()
    plan = dataclasses.replace(select_ranks(model, rows(), progress=False), ranks=(2, 6, 7))
    before, objects = state_of(model), dict(model.named_parameters())
    calls: Counter[str] = Counter()
    original = LoraLayer.update_layer

    def failing(self: Any, *args: Any, **kwargs: Any) -> None:
        calls["update"] += 1
        if calls["update"] == 9:
            raise MemoryError("as when the device is full")
        original(self, *args, **kwargs)

    monkeypatch.setattr(LoraLayer, "update_layer", failing)
    with pytest.raises(MemoryError):
        apply_plan(model, plan)
    assert state_of(model) == before
    assert all(objects[name] is parameter for name, parameter in model.named_parameters())
    assert {layer.r["default"] for layer in layers(model).values()} == {4}
    assert {layer.scaling["default"] for layer in layers(model).values()} == {2.0}
