"""GeLoRA in transformers.Trainer: `Trainer(..., callbacks=[GeLoRACallback()])`."""

from __future__ import annotations

import os
import weakref
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig
from transformers import Trainer, TrainerCallback

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import TooLateError
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.trainer_moment import HOW_TO_ATTACH, trainer_being_made

from .selection import RankSelection

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class GeLoRACallback(TrainerCallback):
    """Chooses the LoRA ranks of the trainer's model from its training data, at the start of `train()`.

    Args:
        config: the options.
        plan: path of a saved plan; its ranks are used and nothing is measured.
        lora_config: for a model without an adapter, which gets one.

    Raises:
        TooLateError: at the start of training, when the callback was added after the Trainer was made.
        GeLoRAError: at the start of `train()`, when no ranks can be chosen and `on_failure` is "raise".
    """

    def __init__(
        self, config: GeLoRAConfig | None = None, *, plan: str | None = None, lora_config: LoraConfig | None = None
    ) -> None:
        config = config or GeLoRAConfig()
        self.config = config if plan is None else replace(config, plan=os.fspath(plan))
        self.lora_config = lora_config
        self._attached: weakref.WeakSet[RankSelection] = weakref.WeakSet()  # a trainer keeps its own alive

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last moment at which the ranks can still be chosen: find the trainer that is being made."""
        self._attached.add(prepare_trainer(trainer_being_made(self), self.config, lora_config=self.lora_config))

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse to train a model whose ranks were not chosen: by now the optimizer holds its parameters."""
        if not any(selection.trainer.state is state and selection.is_settled() for selection in self._attached):
            raise TooLateError(f"GeLoRACallback was added to a Trainer that exists already. {HOW_TO_ATTACH}")


def prepare_trainer(
    trainer: Trainer, config: GeLoRAConfig | None = None, *, lora_config: LoraConfig | None = None
) -> RankSelection:
    """Let `trainer` choose its LoRA ranks at the start of `train()`.

    That is before the checkpoint is loaded, the optimizer made and the model wrapped, knows whether training
    resumes, and costs a run that only evaluates nothing. On resume the checkpoint's ranks are restored instead. At the
    first step the adapter is compared with the plan, and must be in the optimizer: see `TrainingCheck`. The method that
    `config` names is added to the callbacks.
    """
    config = config or GeLoRAConfig()
    if config.method is not None:
        method = make_method(config.method)
        trainer.add_callback(method)
        method.attach(trainer)
    return RankSelection(trainer, config, lora_config)
