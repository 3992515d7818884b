"""What is resized is what trains: parameters collected before, optimizers that were passed, models in shells."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig, hookimpl
from gelora_plugins.errors import ApplyError, TooLateError
from gelora_plugins.layout import Block, ModelLayout
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.probe.find_blocks import find_transformers_layout
from tests.support.plans import plan_for
from tests.support.tiny import build
from tests.support.training import (
    LORA,
    Watch,
    arguments,
    layers,
    matrices,
    peft_model,
    ranks_by_block,
    rows,
    saved_plan,
    trainer_for,
)

PLANNED = [2, 6, 5]


def planned(directory: Path) -> GeLoRACallback:
    """A callback with a saved plan: what is tried here is what follows the choice of ranks."""
    plan_for(build("llama"), PLANNED, LoraConfig(**LORA)).save(directory / "plan.json")
    return GeLoRACallback(plan=str(directory / "plan.json"))


def groups(model: nn.Module, kinds: tuple[str, ...] = ("lora_A", "lora_B")) -> list[dict[str, Any]]:
    """One learning rate for A, another for B, as LoRA+ has it."""
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [{"params": [p for name, p in named if kind in name], "lr": 0.01 * (i + 1)} for i, kind in enumerate(kinds)]


class Grouped(Trainer):
    """Groups made in the constructor, used when the optimizer is made."""

    kinds: tuple[str, ...] = ("lora_A", "lora_B")

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.groups = groups(self.model, self.kinds)

    def create_optimizer(self, model: Any = None) -> Any:
        if self.optimizer is None:
            self.optimizer = torch.optim.AdamW(self.groups)
        return self.optimizer


class Forgetful(Grouped):
    kinds = ("lora_A",)


def make(way: str, model: nn.Module, directory: Path) -> Trainer:
    common = {"model": model, "args": arguments(directory), "train_dataset": rows(60)}
    common["callbacks"] = [planned(directory)]
    if way == "subclass":
        return Grouped(**common)
    if way == "optimizer_cls_and_kwargs":
        return Trainer(**common, optimizer_cls_and_kwargs=(torch.optim.AdamW, {"params": groups(model)}))
    return Trainer(**common, optimizers=(torch.optim.AdamW(groups(model)), None))


@pytest.mark.parametrize("way", ["optimizer_cls_and_kwargs", "subclass", "optimizers"])
def test_parameters_that_were_collected_before_are_the_ones_that_train(tmp_path: Path, way: str) -> None:
    watch = Watch()
    trainer = make(way, peft_model(), tmp_path)
    trainer.add_callback(watch)
    trainer.train()
    assert ranks_by_block(trainer.model) == PLANNED
    for name, value in matrices(trainer.model).items():
        assert not torch.equal(value, watch.before[name]), f"{name} was not trained"


def test_an_optimizer_that_leaves_matrices_out_is_refused_at_the_first_step(tmp_path: Path) -> None:
    args = arguments(tmp_path)
    trainer = Forgetful(model=peft_model(), args=args, train_dataset=rows(60), callbacks=[planned(tmp_path)])
    with pytest.raises(TooLateError, match=r"does not hold 21 of the 42 trainable .*lora_B.*requires_grad_\(False\)"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_matrices_that_are_not_to_be_trained_need_not_be_in_it(tmp_path: Path) -> None:
    model = peft_model()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.requires_grad_(False)
    args = arguments(tmp_path)
    trainer = Forgetful(model=model, args=args, train_dataset=rows(60), callbacks=[planned(tmp_path)])
    trainer.train()
    assert trainer.state.global_step == 3


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (
            lambda model: torch.optim.Adagrad(groups(model)),
            "an optimizer that has begun",
        ),
        (lambda model: torch.optim.SGD(groups(model, ("lora_A",))), "does not hold 21 of the 42"),
    ],
    ids=["with state", "of some"],
)
def test_an_optimizer_that_cannot_take_other_ranks_is_refused(tmp_path: Path, optimizer: Any, words: str) -> None:
    model = peft_model()
    trainer = trainer_for(model, tmp_path, planned(tmp_path), optimizers=(optimizer(model), None))
    with pytest.raises(TooLateError, match=words):
        trainer.train()
    assert ranks_by_block(model) == [4, 4, 4]


def test_an_optimizer_cannot_hold_an_adapter_that_is_yet_to_be_made(tmp_path: Path) -> None:
    model = build("llama")
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    callback = GeLoRACallback(lora_config=LoraConfig(**LORA))
    with pytest.raises(TooLateError, match="an adapter that is yet to be made"):
        trainer_for(model, tmp_path, callback, optimizers=(optimizer, None)).train()


def test_a_second_adapter_in_one_trainer_gets_ranks_of_its_own(tmp_path: Path) -> None:
    model = peft_model()
    trainer = trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")))
    trainer.train()
    model.add_adapter("second", LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj"]))
    model.set_adapter("second")
    with pytest.raises(TooLateError, match=r"'second'.*for another adapter make another Trainer"):
        trainer.train()
    trainer.optimizer = None
    trainer.train()
    plan = saved_plan(tmp_path)
    assert (plan.base_rank, sum(plan.ranks)) == (3, 9)
    found = [layer.r["second"] for layer in layers(model).values() if "second" in layer.r]
    assert found == list(plan.ranks)


class Shell(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, **inputs: Any) -> Any:
        return self.inner(**inputs)


def test_a_module_around_a_peft_model_is_refused_with_the_way_out(tmp_path: Path) -> None:
    trainer = trainer_for(Shell(peft_model()), tmp_path, GeLoRACallback())
    with pytest.raises(ApplyError, match=r"The adapter is on `inner` of Shell.*apply_plan\(model\.inner, plan\)"):
        trainer.train()


class ShellLayout:
    @hookimpl
    def find_model_layout(self, model: nn.Module) -> Any:
        inner = getattr(model, "get_base_model", lambda: model)()
        if not isinstance(inner, Shell):
            return None
        found = find_transformers_layout(inner.inner)
        return ModelLayout("shell", "inner.model", tuple(tuple(map(moved, stack)) for stack in found.stacks))


def moved(block: Block) -> Block:
    linears = tuple(dataclasses.replace(linear, name=f"inner.{linear.name}") for linear in block.linears)
    return Block(f"inner.{block.name}", linears)


def test_a_module_of_ones_own_under_peft_with_a_layout_of_its_own(tmp_path: Path) -> None:
    plugin = ShellLayout()
    plugin_manager().register(plugin)
    try:
        model = get_peft_model(Shell(build("llama")), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"]))
        options = {"remove_unused_columns": False, "label_names": ["labels"]}
        trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")), **options).train()
    finally:
        plugin_manager().unregister(plugin)
    assert [layer.r["default"] for layer in layers(model).values()] == list(saved_plan(tmp_path).ranks)


def test_a_model_that_was_compiled_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Trainer, "train", lambda *args, **kwargs: None)  # compiling takes a minute
    model = torch.compile(peft_model(), backend="eager")
    trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget"))).train()
    assert ranks_by_block(model) == list(saved_plan(tmp_path).ranks)
    assert model.peft_config["default"].rank_pattern == saved_plan(tmp_path).rank_pattern()
