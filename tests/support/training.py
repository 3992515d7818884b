"""Tiny models in a Trainer, and what there is to compare before and after."""

import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments

from gelora_plugins import GeLoRACallback, RankPlan
from tests.support.tiny import VOCABULARY, build

ON_ACCELERATOR = bool(os.environ.get("GELORA_TEST_ACCELERATOR"))  # of `make gpu`
LORA = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"}


def rows(count: int = 120, seed: int = 0) -> list[dict[str, list[int]]]:
    """Documents whose ranks are far from every edge, in the tiny models: tests/unit/dimension/test_margins.py."""
    rng = random.Random(seed)
    ids = [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(4, 12))] for _ in range(count)]
    return [{"input_ids": document, "labels": document} for document in ids]


def peft_model(family: str = "llama", **options: Any) -> PeftModel:
    torch.manual_seed(0)
    return get_peft_model(build(family), LoraConfig(**{**LORA, **options}))


def arguments(directory: Path, **options: Any) -> TrainingArguments:
    defaults = {
        "max_steps": 3,
        "per_device_train_batch_size": 1,
        "learning_rate": 0.05,  # each matrix is seen to move; where to is no matter
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": not ON_ACCELERATOR,
        "disable_tqdm": True,
    }
    return TrainingArguments(str(directory), **{**defaults, **options})


def trainer_for(model: nn.Module | None, directory: Path, callback: GeLoRACallback | None, **options: Any) -> Trainer:
    dataset = options.pop("train_dataset") if "train_dataset" in options else rows()
    extra = {name: options.pop(name) for name in ("optimizers", "model_init", "data_collator") if name in options}
    callbacks = [] if callback is None else [callback]
    return Trainer(
        model=model, args=arguments(directory, **options), train_dataset=dataset, callbacks=callbacks, **extra
    )


def layers(model: nn.Module) -> dict[str, LoraLayer]:
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}


def ranks_by_block(model: nn.Module) -> list[int]:
    """Rank of each block, from the shapes of the matrices; all of a block's are equal."""
    found: dict[str, set[int]] = {}
    for name, layer in layers(model).items():
        block = name.split(".self_attn.")[0].split(".mlp.")[0]
        found.setdefault(block, set()).update({layer.lora_A["default"].weight.shape[0]})
        found[block].add(layer.lora_B["default"].weight.shape[1])
    assert all(len(ranks) == 1 for ranks in found.values())
    return [ranks.pop() for ranks in found.values()]


def matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if "lora_" in name}


def saved_plan(directory: Path) -> RankPlan:
    return RankPlan.load(directory / "gelora" / "plan.json")


class Watch(TrainerCallback):
    """Keeps the adapter's matrices as they were when training began."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.before = matrices(model)


def losses(trainer: Trainer) -> list[float]:
    """The loss of each step. Two trainings on one machine that do the same operations in the same order, and nothing
    but that is compared, have the same to the last bit."""
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def state_of(model: nn.Module) -> tuple[Any, ...]:
    """Everything that a refused run may not have changed."""
    return (
        {
            name: (p.dtype, p.requires_grad, p.detach().double().nan_to_num().sum().item(), p.shape)
            for name, p in model.named_parameters()
        },
        {name: module.training for name, module in model.named_modules()},
        {name: len(module._forward_hooks) + len(module._forward_pre_hooks) for name, module in model.named_modules()},
        {name: repr(config) for name, config in getattr(model, "peft_config", {}).items()},
        random.getstate(),
        np.random.get_state()[1].tolist(),
        torch.get_rng_state().tolist(),
    )
