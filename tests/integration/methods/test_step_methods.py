"""What all methods that change the steps have in common, whatever they do in them."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.methods.base import SIDECAR
from gelora_plugins.methods.flat_lora import FlatLoRA
from gelora_plugins.methods.xgblora import XGBLoRA
from gelora_plugins.ranks.export import export_uniform
from tests.support.forks import run_together, said
from tests.support.resuming import without_pictures
from tests.support.steps import (
    METHODS,
    NEUTRAL,
    PROPORTIONAL,
    STEPS,
    adapted,
    assert_equal,
    assert_near,
    even_rows,
    logits,
    train,
    train_in_processes,
)
from tests.support.tiny import build
from tests.support.training import losses, matrices, peft_model, ranks_by_block, rows, saved_plan

__all__ = ["without_pictures"]  # a fixture

# Sums of a gradient in another order differ by some 1e-6 of it, in float32; LoRA-Pro then divides by singular values of
# lora_B that are some 1e-2 of the largest. What a method does is seen in the second digit.
SUMS = 1e-3

each_option = pytest.mark.parametrize("name", METHODS)
each_method = pytest.mark.parametrize("name", [name for name in METHODS if " " not in name])


def hooks(model: torch.nn.Module) -> int:
    on_modules = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    return on_modules + sum(len(p._backward_hooks or ()) for p in model.parameters())


@pytest.mark.parametrize("name", NEUTRAL)
def test_the_neutral_options_are_lora(tmp_path: Path, name: str) -> None:
    options: dict[str, Any] = {"rank_pattern": {}, "alpha_pattern": {}, "r": 1} if name == "xgblora" else {}
    plain = train(adapted(**options), tmp_path, weight_decay=0.1)
    neutral = train(adapted(**options), tmp_path, NEUTRAL[name](), weight_decay=0.1)
    assert losses(neutral) == losses(plain)
    assert_equal(matrices(neutral.model), matrices(plain.model))


@each_method
def test_the_first_step_begins_at_the_base_and_the_base_is_left_as_it_was(tmp_path: Path, name: str) -> None:
    model, untouched = adapted(), build("llama")
    before = logits(untouched)
    assert logits(model).equal(before)
    generators = torch.get_rng_state()
    trained = train(model.train(), tmp_path, METHODS[name](), max_steps=STEPS)
    after = torch.get_rng_state()
    torch.set_rng_state(generators)
    plain = train(adapted(), tmp_path)
    assert losses(trained)[0] == losses(plain)[0]
    assert after.equal(torch.get_rng_state())  # dropout and the order of the rows are those of LoRA
    assert not matrices(trained.model).keys() - matrices(plain.model).keys()
    assert all(not value.equal(matrices(plain.model)[key]) for key, value in matrices(model).items() if "lora_B" in key)
    with trained.model.disable_adapter():
        assert logits(trained.model).equal(before)
    assert hooks(trained.model) == 0


@each_option
def test_resuming_anywhere_is_the_run_that_was_not_interrupted(tmp_path: Path, name: str) -> None:
    # Three knots begin at steps 0, 2 and 4, six boosters at each step.
    often = {"save_strategy": "steps", "save_steps": 1, "weight_decay": 0.1}
    whole = train(adapted(), tmp_path / "whole", METHODS[name](), **often)
    for step in (1, 2, 3, 4):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed = train(adapted(), tmp_path / f"from-{step}", METHODS[name](), resume=checkpoint, **often)
        assert losses(resumed) == losses(whole)
        assert [e.get("learning_rate") for e in resumed.state.log_history] == [
            e.get("learning_rate") for e in whole.state.log_history
        ]
        assert_equal(matrices(resumed.model), matrices(whole.model))


@each_method
def test_every_checkpoint_and_the_best_are_plain_lora(tmp_path: Path, name: str) -> None:
    often = {"save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1}
    best = {"load_best_model_at_end": True, "metric_for_best_model": "loss", "per_device_eval_batch_size": 1}
    trainer = train(adapted(), tmp_path, METHODS[name](), eval_dataset=rows(4, seed=1), **often, **best)
    assert trainer.state.best_global_step is not None
    checkpoint = tmp_path / f"checkpoint-{trainer.state.best_global_step}"
    loaded = PeftModel.from_pretrained(build("llama"), checkpoint)
    assert_equal(matrices(trainer.model), matrices(loaded))
    assert logits(loaded).equal(logits(trainer.model))
    assert hooks(trainer.model) == 0
    # The loss that was measured is that of the adapter as it was saved.
    evaluated = {e["step"]: e["eval_loss"] for e in trainer.state.log_history if "eval_loss" in e}
    again = trainer.evaluate()["eval_loss"]
    assert again == evaluated[trainer.state.best_global_step]


@each_option
def test_what_is_saved_is_loaded_merged_and_exported(tmp_path: Path, name: str) -> None:
    trainer = train(adapted(), tmp_path, METHODS[name]())
    trainer.save_model(str(tmp_path / "saved"))
    assert not (tmp_path / "saved" / SIDECAR).exists()  # the training is over
    live = logits(trainer.model)
    assert not torch.allclose(live, logits(build("llama")), atol=1e-2)
    assert logits(PeftModel.from_pretrained(build("llama"), tmp_path / "saved")).equal(live)
    merged = PeftModel.from_pretrained(build("llama"), tmp_path / "saved").merge_and_unload()
    assert_near({"logits": logits(merged)}, {"logits": live}, 1e-5)  # float32, over three blocks
    export_uniform(tmp_path / "saved", tmp_path / "uniform")
    config = json.loads((tmp_path / "uniform" / "adapter_config.json").read_text())
    assert (config["r"], config["rank_pattern"], config["use_dora"]) == (5, {}, False)
    exported = PeftModel.from_pretrained(build("llama"), tmp_path / "uniform")
    assert_near({"logits": logits(exported)}, {"logits": live}, 1e-5)


@each_method
def test_micro_batches_are_one_batch(tmp_path: Path, name: str) -> None:
    many = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4}
    data = {"train_dataset": even_rows(), **PROPORTIONAL}
    one = train(adapted(), tmp_path, METHODS[name](), per_device_train_batch_size=4, **data)
    accumulated = train(adapted(), tmp_path, METHODS[name](), **many, **data)
    assert_near(matrices(accumulated.model), matrices(one.model), SUMS)


@each_method
def test_gradient_checkpointing_changes_nothing(tmp_path: Path, name: str) -> None:
    plain = train(adapted(), tmp_path, METHODS[name]())
    for reentrant in (True, False):
        checkpointing = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
        trainer = train(adapted(), tmp_path, METHODS[name](), **checkpointing)
        assert losses(trainer) == losses(plain)
        assert_equal(matrices(trainer.model), matrices(plain.model))


@each_method
def test_bf16_trains_and_resumes(tmp_path: Path, name: str) -> None:
    options = {"bf16": True, "save_strategy": "steps", "save_steps": 3}
    whole = train(adapted(), tmp_path, METHODS[name](), **options)
    assert losses(whole) != losses(train(adapted(), tmp_path / "float32", METHODS[name]()))
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in matrices(whole.model).values())
    resumed = train(adapted(), tmp_path / "on", METHODS[name](), resume=tmp_path / "checkpoint-3", **options)
    assert_equal(matrices(resumed.model), matrices(whole.model))


@each_method
def test_two_processes_are_one(tmp_path: Path, name: str) -> None:
    found = []
    for count in (1, 2):
        directory = tmp_path / str(count)
        directory.mkdir()
        assert run_together(directory, count, train_in_processes, name) == [0] * count, said(directory).read_text()
        assert json.loads((directory / "processes-0.json").read_text()) == count
        found += [torch.load(directory / f"moved-{i}.pt") for i in range(count)]
    alone, first, second = found
    assert_equal(second, first)
    assert_near(first, alone, SUMS)


@each_method
def test_ranks_that_gelora_chooses(tmp_path: Path, name: str) -> None:
    def trained(resume: Path | None = None) -> Trainer:
        budget = GeLoRACallback(GeLoRAConfig(policy="budget"))
        method = (
            XGBLoRA() if name == "xgblora" else METHODS[name]()
        )  # which blocks of a booster the ranks allow is theirs
        often = {"max_steps": 16, "save_strategy": "steps", "save_steps": 8}
        return train(peft_model(), tmp_path, budget, method, resume=resume, **often)

    whole = trained()
    assert ranks_by_block(whole.model) == list(saved_plan(tmp_path).ranks)
    assert len(set(saved_plan(tmp_path).ranks)) > 1
    assert_equal(matrices(trained(tmp_path / "checkpoint-8").model), matrices(whole.model))


@pytest.mark.parametrize("name", [name for name in METHODS if not name.startswith("flat")])
def test_flat_lora_goes_with_the_others(tmp_path: Path, name: str) -> None:
    alone = train(adapted(), tmp_path, METHODS[name]())
    flat = train(adapted(), tmp_path, METHODS[name](), FlatLoRA())
    other_way = train(adapted(), tmp_path, FlatLoRA(), METHODS[name]())
    assert_equal(matrices(flat.model), matrices(other_way.model))
    assert losses(flat)[0] == losses(alone)[0]
    assert losses(flat)[1] != losses(alone)[1]
