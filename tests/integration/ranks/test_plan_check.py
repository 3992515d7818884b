"""A plan on another model than it was made for: noticed by every route, before or after the adapter is made."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, apply_plan, check_plan, select_ranks, with_plan
from gelora_plugins.errors import ApplyError, GeLoRAError, PlanError
from tests.support import plans
from tests.support.tiny import build
from tests.support.training import LORA, layers, peft_model, ranks_by_block, rows, saved_plan, trainer_for


def lora(**options: Any) -> LoraConfig:
    return LoraConfig(**{**LORA, **options})  # one for each use: PEFT writes the modules that it finds into it


def plan_for(model: Any, ranks: tuple[int, ...] = (2, 6, 5), config: LoraConfig | None = None) -> RankPlan:
    plan: RankPlan = plans.plan_for(model, ranks, config or lora())
    return plan


# An adapter that fits


@pytest.mark.parametrize("scaling_rule", ["constant", "equal_step"])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"rank_pattern": {"layers.1.self_attn.q_proj": 3}}])
def test_an_adapter_of_the_plan_passes_by_every_way_to_make_it(
    tmp_path: Path, options: dict[str, Any], scaling_rule: str
) -> None:
    plan = dataclasses.replace(plan_for(build("llama"), config=lora(**options)), scaling_rule=scaling_rule)
    before = get_peft_model(build("llama"), with_plan(lora(**options), plan, build("llama")))
    check_plan(before, plan)
    in_place = get_peft_model(build("llama"), lora(**options))
    apply_plan(in_place, plan)
    check_plan(in_place, plan)
    before.save_pretrained(tmp_path)
    check_plan(PeftModel.from_pretrained(build("llama"), tmp_path, is_trainable=True), plan)


def test_an_adapter_made_of_the_plans_own_arguments_passes() -> None:
    plan = plan_for(build("llama"))
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", **plan.lora_config_kwargs()))
    check_plan(model, plan)


def test_an_adapter_whose_steps_are_of_another_size_is_refused() -> None:
    plan = plan_for(build("llama"))
    model = get_peft_model(build("llama"), with_plan(lora(), plan))
    with pytest.raises(PlanError, match=r"has rank 2 and scaling 2, the plan 2 and 4"):
        check_plan(model, dataclasses.replace(plan, scaling_rule="equal_step"))


# One that does not


def test_a_plan_of_the_model_without_its_head_is_named_as_such() -> None:
    plan = plan_for(build("bert", bare=True))
    words = r"one rank of encoder\.layer\.0 .* the model's have 'bert\.' before 'encoder\.layer\.0'"
    with pytest.raises(PlanError, match=words):
        with_plan(lora(), plan, build("bert"))
    silent = get_peft_model(build("bert"), LoraConfig(target_modules="all-linear", **plan.lora_config_kwargs()))
    assert {layer.r["default"] for layer in layers(silent).values()} == {4}, "PEFT says nothing"
    with pytest.raises(PlanError, match=words):
        check_plan(silent, plan)
    with pytest.raises(PlanError, match=words):
        apply_plan(get_peft_model(build("bert"), lora()), plan)


def test_a_plan_of_the_model_with_its_head_is_named_as_such() -> None:
    with pytest.raises(PlanError, match=r"the plan's have 'bert\.' before 'encoder\.layer\.0'"):
        with_plan(lora(), plan_for(build("bert")), build("bert", bare=True))


@pytest.mark.parametrize("blocks", [2, 6])
def test_a_plan_of_fewer_or_more_blocks_is_refused(blocks: int) -> None:
    plan = plan_for(build("llama"))
    other = build("llama", num_hidden_layers=blocks)
    missing = rf"one rank of model\.layers\.{min(blocks, 3)} costs"
    with pytest.raises(PlanError, match=missing):
        with_plan(lora(), plan, other)
    with pytest.raises(PlanError, match=missing):
        apply_plan(get_peft_model(build("llama", num_hidden_layers=blocks), lora()), plan)
    with pytest.raises(PlanError, match=missing):
        check_plan(get_peft_model(other, with_plan(lora(), plan)), plan)


def test_a_rank_or_a_scaling_that_is_another_than_planned_is_named() -> None:
    plan = plan_for(build("llama"))
    with pytest.raises(PlanError, match=r"21 of 21 .*model\.layers\.0\.self_attn\.q_proj has rank 4 .* the plan 2"):
        check_plan(peft_model(), plan)
    model = get_peft_model(build("llama"), with_plan(lora(), plan))
    layers(model)["base_model.model.model.layers.2.mlp.up_proj"].scaling["default"] = 1.0
    with pytest.raises(PlanError, match=r"1 of 21 .*layers\.2\.mlp\.up_proj has rank 5 and scaling 1, the plan 5"):
        check_plan(model, plan)


# The callback with a plan checks an adapter that exists


@pytest.mark.parametrize("init", [True, "olora"])
def test_an_adapter_that_was_made_with_the_plan_is_trained_as_it_is(tmp_path: Path, init: Any) -> None:
    plan = plan_for(build("llama"))
    plan.save(tmp_path / "plan.json")
    config = LoraConfig(target_modules="all-linear", init_lora_weights=init, **plan.lora_config_kwargs())
    model = get_peft_model(build("llama"), config)
    optimizer = torch.optim.Adagrad(p for p in model.parameters() if p.requires_grad)
    callback = GeLoRACallback(plan=str(tmp_path / "plan.json"))
    trainer_for(model, tmp_path / "out", callback, optimizers=(optimizer, None)).train()
    assert ranks_by_block(model) == [2, 6, 5]
    assert saved_plan(tmp_path / "out") == plan


@pytest.mark.parametrize("on_failure", ["raise", "keep"])
def test_an_adapter_that_was_made_with_another_plan_is_refused(tmp_path: Path, on_failure: str) -> None:
    """Also with `keep`: the ranks that it has are neither the user's own nor the plan's."""
    plan = plan_for(build("llama"))
    plan.save(tmp_path / "plan.json")
    other = dataclasses.replace(plan, ranks=(2, 6, 7))
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", **other.lora_config_kwargs()))
    callback = GeLoRACallback(GeLoRAConfig(on_failure=on_failure), plan=str(tmp_path / "plan.json"))
    with pytest.raises(PlanError, match=r"7 of 21 .*model\.layers\.2\.self_attn\.q_proj has rank 7 .* the plan 5"):
        trainer_for(model, tmp_path, callback).train()
    assert ranks_by_block(model) == [2, 6, 7]


def test_an_adapter_that_is_another_by_the_first_step_is_refused(tmp_path: Path) -> None:
    """Whatever changed it between the choice and the first step."""
    plan_for(build("llama")).save(tmp_path / "plan.json")
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(plan=str(tmp_path / "plan.json")))
    original = trainer.create_optimizer

    def create_optimizer(*args: Any) -> Any:
        layers(trainer.model)["base_model.model.model.layers.0.mlp.up_proj"].scaling["default"] = 9.0
        return original(*args)

    trainer.create_optimizer = create_optimizer
    with pytest.raises(PlanError, match="1 of 21 target modules have another rank or scaling"):
        trainer.train()
    assert trainer.state.global_step == 0


# Again, after a run that died


def test_a_cell_that_is_run_again_after_a_run_that_died_before_its_first_step(tmp_path: Path) -> None:
    model = peft_model(rank_pattern={"layers.1.self_attn.q_proj": 3})

    class Dies(Trainer):
        def get_train_dataloader(self) -> Any:
            raise ZeroDivisionError

    plan = plan_for(build("llama"), config=lora(rank_pattern={"layers.1.self_attn.q_proj": 3}))
    plan.save(tmp_path / "plan.json")
    first = trainer_for(model, tmp_path, GeLoRACallback(plan=str(tmp_path / "plan.json")))
    first.__class__ = Dies
    with pytest.raises(ZeroDivisionError):
        first.train()
    assert {layer.r["default"] for layer in layers(model).values()} == {2, 3, 5, 6}
    trainer_for(model, tmp_path / "again", GeLoRACallback(GeLoRAConfig(policy="uniform"))).train()
    ranks = {name.removeprefix("base_model.model."): layer.r["default"] for name, layer in layers(model).items()}
    assert ranks.pop("model.layers.1.self_attn.q_proj") == 3
    assert set(ranks.values()) == {4}


def test_a_plan_can_be_chosen_again_for_an_adapter_that_was_made_with_one() -> None:
    plan = plan_for(build("llama"))
    model = get_peft_model(build("llama"), with_plan(lora(), plan))
    again = select_ranks(model, rows(60), GeLoRAConfig(policy="uniform"), progress=False)
    assert again.sites == plan.sites
    apply_plan(model, again)
    assert ranks_by_block(model) == [4, 4, 4]
    check_plan(model, again)


def test_patterns_of_a_plan_are_not_blamed_on_the_user() -> None:
    plan = plan_for(build("llama"))
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", **plan.lora_config_kwargs()))
    with pytest.raises(GeLoRAError, match=r"was made with the ranks of a plan .*GeLoRACallback\(plan=\.\.\.\)"):
        select_ranks(model, rows(60), progress=False)


def test_a_model_that_an_adapter_was_put_into_before_is_named(tmp_path: Path) -> None:
    model = build("llama")
    get_peft_model(model, lora())
    with pytest.raises(ApplyError, match=r"was given to get_peft_model before.*load the model again"):
        trainer_for(model, tmp_path, GeLoRACallback(lora_config=lora())).train()
