"""The training methods with gates, for the tests that hold for each of them, and small trainings with them.

A method that is added to METHODS is put through all of them. Those that change the steps are in steps.py.
"""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import Trainer, TrainerCallback

from gelora_plugins.methods.adalora import AdaLoRA
from gelora_plugins.methods.base import TrainingMethod
from gelora_plugins.methods.beamlora import BeamLoRA
from gelora_plugins.methods.diffora import DiffoRA
from gelora_plugins.methods.sora import SoRA
from tests.support.tiny import VOCABULARY, build
from tests.support.training import arguments, peft_model

STEPS = 8

# With options that let each do in STEPS steps all that it does.
METHODS: dict[str, Callable[[], TrainingMethod]] = {
    "adalora": lambda: AdaLoRA(keep=0.5),
    "beamlora": lambda: BeamLoRA(eta=0.5, period=4, tau=0.5),
    "diffora": lambda: DiffoRA(search=4),
    "sora": lambda: SoRA(shrinkage=0.6, l1=0.1),
    "sora-budget": lambda: SoRA(shrinkage=0.1, keep=0.5),
}
# With options that make them plain LoRA, where there are such.
NEUTRAL: dict[str, Callable[[], TrainingMethod]] = {
    "beamlora": lambda: BeamLoRA(eta=0.0, gate_lr=0.0),
    "diffora": lambda: DiffoRA(search=0, share=1.0),
    "sora": lambda: SoRA(shrinkage=0.0, init="ones", gate_lr=0.0),
}
# The ranks are not uniform: q_proj has 3, down_proj 1, k_proj 4.
ADAPTER = {
    "target_modules": ["q_proj", "k_proj", "down_proj"],
    "rank_pattern": {"q_proj": 3, "down_proj": 1},
    "lora_alpha": 6,
}


def adapted(**options: Any) -> PeftModel:
    """A tiny model with an adapter of three ranks."""
    return peft_model(**{**ADAPTER, **options})


def even_rows(count: int = 64) -> list[dict[str, list[int]]]:
    """Documents of one length, so that a batch of them is what they are one by one."""
    rng = random.Random(0)
    ids = [[rng.randrange(3, VOCABULARY) for _ in range(8)] for _ in range(count)]
    return [{"input_ids": document, "labels": document} for document in ids]


def method_trainer(
    model: nn.Module, directory: Path, *callbacks: TrainerCallback, optimizers: Any = (None, None), **options: Any
) -> Trainer:
    ours = {name: options.pop(name) for name in ("eval_dataset", "compute_metrics") if name in options}
    defaults = {"max_steps": STEPS, "learning_rate": 0.02, "per_device_train_batch_size": 2}
    return Trainer(
        model=model,
        args=arguments(directory, **{**defaults, **options}),
        train_dataset=even_rows(),
        callbacks=list(callbacks),
        optimizers=optimizers,
        **ours,
    )


def logits(model: nn.Module) -> torch.Tensor:
    """What the model says of a document, without dropout; its mode is put back."""
    mode = model.training
    model.eval()
    with torch.no_grad():
        found: torch.Tensor = model(torch.tensor([[3, 50, 7, 20, 9, 33]])).logits
    model.train(mode)
    return found


def loaded(directory: Path) -> PeftModel:
    """The saved adapter, by PEFT alone, on a new base model."""
    return PeftModel.from_pretrained(build("llama"), directory)


class Seen(TrainerCallback):
    """Keeps what the model says at the start of training, with the adapter and without."""

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.first = logits(model)
        with model.disable_adapter():
            self.base = logits(model)
