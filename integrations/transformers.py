"""GeLoRA in transformers.Trainer: `Trainer(..., callbacks=[GeLoRACallback()])`."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from accelerate.utils import broadcast_object_list
from peft import LoraConfig, PeftConfig, get_peft_model
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from gelora_plugins.adapter import apply_config, apply_plan, find_adapter, require_adapter, with_plan
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ApplyError, GeLoRAError, PlanError, TooLateError
from gelora_plugins.pipeline import select_ranks
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.report import RankReport

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

    from gelora_plugins.ranks import RankPlan

logger = logging.getLogger(__name__)

HOW_TO_ATTACH = "Pass it when the Trainer is made: Trainer(..., callbacks=[GeLoRACallback()])."


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
        self._attached: list[RankSelection] = []

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The last moment at which the ranks can still be chosen: find the trainer that is being made."""
        self._attached.append(prepare_trainer(_trainer_being_made(self), self.config, lora_config=self.lora_config))

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
    resumes, and costs a run that only evaluates nothing. On resume the checkpoint's ranks are restored instead.
    """
    return RankSelection(trainer, config or GeLoRAConfig(), lora_config)


class RankSelection:
    """The ranks of one trainer: chosen once, applied to every model that it trains."""

    def __init__(self, trainer: Trainer, config: GeLoRAConfig, lora_config: LoraConfig | None) -> None:
        self.trainer = trainer
        self.config = config
        self.lora_config = lora_config
        self.plan: RankPlan | None = None
        self.restored: LoraConfig | None = None  # configuration of the checkpoint that training resumes from
        self._settled: nn.Module | None = None
        self._train, self._call_model_init = trainer.train, trainer.call_model_init
        trainer.train = self.train
        trainer.call_model_init = self.call_model_init

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with the ranks settled first."""
        checkpoint = self._checkpoint(resume_from_checkpoint)
        if checkpoint is not None:
            self.restored = _checkpoint_config(checkpoint, self.trainer.model)
            self._settle_current()
        elif not self.is_settled():
            try:
                self._check_trainer()
                self.plan = self.plan or self._select()
                self._settle_current()
            except GeLoRAError as error:
                if self.config.on_failure != "keep":
                    raise
                logger.warning("GeLoRA chose no ranks; training with the ranks of the LoRA configuration. %s", error)
                self._settled = self.trainer.model
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def choose(self) -> RankPlan:
        """The plan that `train()` would apply. Nothing is changed."""
        self._check_trainer()
        return self._select()

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """`Trainer.call_model_init`: every trial of a hyper-parameter search gets the same ranks."""
        model = self._call_model_init(*args, **kwargs)
        if self.plan is not None or self.restored is not None:
            model = self._apply(model)
        self._settled = model
        return model

    def is_settled(self) -> bool:
        """Whether the model that the trainer has now is one whose ranks were settled."""
        return self._settled is not None and self._settled is self.trainer.model

    def _settle_current(self) -> None:
        if self.trainer.model_init is not None:
            return  # train() makes a new model, and call_model_init gives it the ranks
        before = _num_trainable(self.trainer.model)
        model = self._apply(self.trainer.model)
        if model is not self.trainer.model:
            self.trainer.model = self.trainer.model_wrapped = model
        self._settled = model
        self._tell(before, _num_trainable(model))

    def _apply(self, model: nn.Module) -> nn.Module:
        """The model with the ranks: the same object with an adapter resized, or wrapped in a new adapter."""
        bare = find_adapter(model) is None
        if self.restored is not None:
            if bare:
                return get_peft_model(model, self.restored)
            apply_config(model, self.restored)
        elif self.plan is not None:
            if bare and self.lora_config is not None:
                return get_peft_model(model, with_plan(self.lora_config, self.plan))
            apply_plan(model, self.plan)
        return model

    def _check_trainer(self) -> None:
        """Raises unless ranks can still be changed without the trainer noticing."""
        if self.trainer.optimizer is not None and self.trainer.model_init is None:
            raise TooLateError(
                "The Trainer was given an optimizer, which holds the adapter's parameters as they are now. Pass "
                "optimizer_cls_and_kwargs=... instead of optimizers=..., or choose the ranks before the optimizer is "
                "made: plan = select_ranks(model, rows); apply_plan(model, plan)."
            )
        if self.trainer.is_fsdp_enabled or is_zero3(self.trainer):
            raise ApplyError(
                "The model will be sharded (FSDP or DeepSpeed ZeRO-3), and its adapter cannot be resized here. Make "
                "the plan before, in one process: gelora probe MODEL DATA -o profile.json, then gelora plan "
                "profile.json -o plan.json; then LoraConfig(**RankPlan.load('plan.json').lora_config_kwargs(), ...) "
                "without GeLoRACallback."
            )
        if self.lora_config is None:
            require_adapter(self.trainer.model)
        elif find_adapter(self.trainer.model) is not None:
            raise ApplyError(
                "The model has an adapter already, and GeLoRACallback was given lora_config as well. Pass the model "
                "without its adapter, or leave lora_config out."
            )

    def _select(self) -> RankPlan:
        trainer = self.trainer
        collator = trainer._get_collator_with_removed_columns(trainer.data_collator)
        plan = select_ranks(
            trainer.model,
            _documents(trainer, collator) if self.config.plan is None else None,
            self.config,
            lora_config=self.lora_config,
            collator=collator,
            progress=not trainer.args.disable_tqdm and trainer.is_world_process_zero(),
        )
        if trainer.args.world_size > 1:  # ranks that differ between processes would fail in DDP, or worse
            plan = broadcast_object_list([plan])[0]
        return plan

    def _tell(self, before: int, after: int) -> None:
        if not self.trainer.is_world_process_zero():
            return
        if self.restored is not None or self.plan is None:
            logger.warning("GeLoRA restored the ranks of the checkpoint; nothing was measured.")
            return
        report = RankReport(self.plan, before, after)
        print(report, flush=True)
        plugin_manager().hook.write_report(report=report, output_dir=str(Path(self.trainer.args.output_dir, "gelora")))

    def _checkpoint(self, resume_from_checkpoint: Any) -> str | None:
        if isinstance(resume_from_checkpoint, bool):
            # Where there is none the Trainer says so itself.
            return get_last_checkpoint(self.trainer.args.output_dir) if resume_from_checkpoint else None
        return resume_from_checkpoint


def _documents(trainer: Trainer, collator: Any) -> Any:
    """The training rows; those of TRL's preference trainers have no `input_ids` yet."""
    if any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__):
        from .trl import documents

        return documents(trainer, collator)
    return trainer.train_dataset


def _checkpoint_config(checkpoint: str, model: nn.Module) -> LoraConfig:
    adapter = find_adapter(model)
    places = [Path(checkpoint), Path(checkpoint, adapter.name if adapter else "default")]
    for place in places:
        if (place / "adapter_config.json").is_file():
            config = PeftConfig.from_pretrained(place)
            config.inference_mode = False  # PEFT saves True: an adapter made from it would be frozen
            return config
    raise PlanError(
        f"{checkpoint} has no adapter_config.json, so the ranks that it was trained with are not known. Resume from a "
        "checkpoint that the Trainer wrote of a LoRA model."
    )


def _trainer_being_made(callback: TrainerCallback) -> Trainer:
    """The Trainer whose constructor is calling: `on_init_end` is not given it (transformers 5.23)."""
    for frame in _frames():
        candidate = frame.f_locals.get("self")
        if isinstance(candidate, Trainer) and callback in candidate.callback_handler.callbacks:
            return candidate
    raise TooLateError(f"on_init_end was not called by a Trainer that has this callback. {HOW_TO_ATTACH}")


def _frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def is_zero3(trainer: Trainer) -> bool:
    """Whether DeepSpeed ZeRO-3 partitions the parameters, which are empty then."""
    plugin = getattr(trainer.accelerator.state, "deepspeed_plugin", None)
    return plugin is not None and plugin.zero_stage == 3


def _num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
