"""GeLoRA in transformers.Trainer: `Trainer(..., callbacks=[GeLoRACallback()])`."""

from __future__ import annotations

import logging
import os
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from gelora_plugins.adapter import (
    AppliedPlan,
    add_adapter,
    apply_config,
    apply_plan,
    find_adapter,
    has_ranks_of,
    require_adapter,
)
from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ApplyError, GeLoRAError, PlanError, TooLateError, WriteError
from gelora_plugins.lora_config import check_initialisation
from gelora_plugins.pipeline import find_layout, select_ranks
from gelora_plugins.plugins import plugin_manager
from gelora_plugins.policies import make_plan
from gelora_plugins.processes import ALONE, Processes
from gelora_plugins.ranks import RankPlan
from gelora_plugins.report import RankReport

from .checkpoint import PLAN, Checkpoint

if TYPE_CHECKING:
    from torch import nn
    from transformers import TrainerControl, TrainerState, TrainingArguments

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
        if lora_config is not None:
            check_initialisation(lora_config)
        self.trainer = trainer
        self.config = config
        self.lora_config = lora_config
        self.plan: RankPlan | None = None
        self.checkpoint: Checkpoint | None = None  # that training resumes from
        self._settled: weakref.ref[nn.Module] | None = None  # a search frees each trial's model
        self._decided = False  # chosen, or the user's own kept
        self._told: object = None  # the plan or checkpoint that was last shown
        self._train, self._call_model_init = trainer.train, trainer.call_model_init
        self._save_model = trainer.save_model
        trainer.train = self.train
        trainer.call_model_init = self.call_model_init
        trainer.save_model = self.save_model

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with the ranks settled first."""
        path = self._checkpoint_path(resume_from_checkpoint)
        if path is not None:
            self._restore(path)
        elif not self.is_settled() and not (self._decided and self.trainer.model_init is not None):
            # A search takes the model away between two trials (transformers 5.23), and call_model_init makes the next.
            try:
                self._check_trainer()
                self.plan = self.plan or self._select()
                self._settle_current()
            except GeLoRAError as error:
                if self.is_settled():
                    raise  # the ranks are set; what failed is the report
                self._keep(error)
            self._decided = True
        return self._train(resume_from_checkpoint, *args, **kwargs)

    def choose(self) -> RankPlan:
        """The plan that `train()` would apply. Nothing is changed."""
        self._check_trainer()
        return self._select()

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """`Trainer.call_model_init`: every trial of a hyper-parameter search gets ranks from the same measurement."""
        return self._settle(self._call_model_init(*args, **kwargs))

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """`Trainer.save_model`, which checkpoints go through too, with the plan beside the adapter."""
        self._save_model(output_dir, *args, **kwargs)
        path = Path(output_dir or self.trainer.args.output_dir, PLAN)
        if self.plan is not None and self.trainer.args.should_save and not self._is_at(path):
            try:
                self.plan.save(path)
            except WriteError as error:
                logger.warning("The plan was not saved beside the adapter, which was: %s", error)

    def is_settled(self) -> bool:
        """Whether the model that the trainer has now is one whose ranks were settled."""
        return self._settled is not None and self._settled() is self.trainer.model is not None

    def _restore(self, path: str) -> None:
        """Take the ranks of a checkpoint instead of choosing any."""
        adapter = find_adapter(self.trainer.model)
        self.checkpoint = Checkpoint.read(path, adapter.name if adapter else "default")
        self.plan = self.checkpoint.plan
        if not has_ranks_of(self.trainer.model, self.checkpoint.config):
            self._check_early()
        if adapter is not None and not isinstance(self.trainer.model, PeftModel):
            raise ApplyError(
                "The Trainer cannot load a checkpoint into a model with add_adapter (transformers 5.23): it looks for "
                "adapters in a PeftModel only. Use get_peft_model(model, config) instead of model.add_adapter(config)."
            )
        self._settle_current()

    def _keep(self, error: GeLoRAError) -> None:
        """Go on with the user's own ranks after `error`; raise it where that was not asked for or there are none."""
        bare = find_adapter(self.trainer.model) is None
        if self.config.on_failure != "keep" or (bare and (self.lora_config is None or isinstance(error, TooLateError))):
            raise error
        logger.warning("GeLoRA chose no ranks; training with the ranks of the LoRA configuration. %s", error)
        self.plan = None
        self._settle_current()

    def _settle_current(self) -> None:
        if self.trainer.model_init is None:  # otherwise train() makes a new model, and call_model_init settles it
            self._settle(self.trainer.model)

    def _settle(self, model: nn.Module) -> nn.Module:
        """The model with the ranks: the same object with an adapter resized, or wrapped in a new adapter."""
        before = _num_trainable(model)
        model, applied = self._apply(model)
        if self.trainer.model_init is None and model is not self.trainer.model:
            self.trainer.model = self.trainer.model_wrapped = model
        self._settled = weakref.ref(model)
        self._tell(applied, before, _num_trainable(model))
        return model

    def _apply(self, model: nn.Module) -> tuple[nn.Module, AppliedPlan]:
        bare = find_adapter(model) is None
        if self.checkpoint is not None:
            if bare:
                return add_adapter(model, self.checkpoint.config, None)
            return model, apply_config(model, self.checkpoint.config)
        if bare and self.lora_config is not None:
            return add_adapter(model, self.lora_config, self.plan)
        if self.plan is not None:
            self.plan = self._plan_for(model, self.plan)
            return model, apply_plan(model, self.plan)
        return model, AppliedPlan({}, ())

    def _check_trainer(self) -> None:
        """Raises unless the trainer has an adapter, or is to get one, whose ranks can still be changed."""
        self._check_early()
        if self.lora_config is None:
            require_adapter(self.trainer.model)
        elif find_adapter(self.trainer.model) is not None:
            raise ApplyError(
                "The model has an adapter already, and GeLoRACallback was given lora_config as well. Pass the model "
                "without its adapter, or leave lora_config out."
            )

    def _check_early(self) -> None:
        """Raises unless the model can still be changed without the trainer noticing."""
        if self.trainer.optimizer is not None and self.trainer.model_init is None:
            raise TooLateError(
                "The Trainer was given an optimizer, which holds the adapter's parameters as they are now. Pass "
                "optimizer_cls_and_kwargs=... instead of optimizers=..., or choose the ranks before the optimizer is "
                "made: plan = select_ranks(model, rows); apply_plan(model, plan)."
            )
        if self.trainer.is_fsdp_enabled or is_zero3(self.trainer) or is_loaded_sharded(self.trainer):
            raise ApplyError(
                "The model is sharded, or will be (FSDP or DeepSpeed ZeRO-3); its adapter cannot be resized here. Make "
                "the plan before, in one process: gelora probe MODEL DATA -o profile.json, then gelora plan "
                "profile.json -o plan.json; then LoraConfig(**RankPlan.load('plan.json').lora_config_kwargs(), ...) "
                "without GeLoRACallback. To resume, use the gelora/plan.json of the checkpoint."
            )

    def _select(self) -> RankPlan:
        trainer = self.trainer
        processes = Processes.all() if trainer.args.world_size > 1 else ALONE
        with processes.together():
            collator = _collator(trainer)
            documents = _documents(trainer, collator) if self.config.plan is None else None
        return select_ranks(
            trainer.model,
            documents,
            self.config,
            lora_config=self.lora_config,
            collator=collator,
            progress=not trainer.args.disable_tqdm and trainer.is_world_process_zero(),
            processes=processes,
        )

    def _plan_for(self, model: nn.Module, plan: RankPlan) -> RankPlan:
        """`plan`, or one from the same measurement for a trial whose `model_init` made another adapter.

        Raises:
            PlanError: the trial's model has other blocks than the model that was measured.
        """
        if self.trainer.model_init is None or self.config.plan is not None:
            return plan
        if find_layout(model) != plan.profile.layout:
            raise PlanError(
                "model_init made a model with other blocks than the first one, which was measured. Search over one "
                "base model at a time."
            )
        adapter = require_adapter(model)
        sites, lora = adapter.sites(plan.profile.layout), adapter.config
        wanted = (sites, lora.r, lora.lora_alpha, lora.use_rslora)
        if wanted == (plan.sites, plan.base_rank, plan.lora_alpha, plan.use_rslora):
            return plan
        return make_plan(
            plan.profile, self.config, sites, lora.r, lora_alpha=lora.lora_alpha, use_rslora=lora.use_rslora
        )

    def _tell(self, applied: AppliedPlan, before: int, after: int) -> None:
        """Show and save what was done, once for each plan."""
        told = self.checkpoint or self.plan
        if told is None or told is self._told or not self.trainer.is_world_process_zero():
            return
        self._told = told
        if self.plan is not None:
            report = RankReport(self.plan, before, after)
            print(report, flush=True)
            if self.checkpoint is None or not self._is_at(Path(self.trainer.args.output_dir, PLAN)):
                self._write(report)
        if self.checkpoint is not None:
            for line in self.checkpoint.lines(applied.ranks, self.config):
                logger.warning("%s", line)
            return
        for line in applied.notes():
            logger.warning("%s", line)

    def _is_at(self, path: Path) -> bool:
        """Whether the plan is saved there already, as where a run goes on."""
        try:
            return RankPlan.load(path) == self.plan
        except PlanError:
            return False

    def _write(self, report: RankReport) -> None:
        """Save the report. The ranks are set by now, so a failure here says nothing of them."""
        directory = Path(self.trainer.args.output_dir, PLAN.parent)
        try:
            plugin_manager().hook.write_report(report=report, output_dir=str(directory))
        except Exception as error:  # a plugin's too
            message = f"The ranks are set, but the report was not written: {error}"
            if self.config.on_failure != "keep":
                raise WriteError(
                    f"{message} Make room in {directory}, or remove the plugin, and train again."
                ) from error
            logger.warning("%s", message)

    def _checkpoint_path(self, resume_from_checkpoint: Any) -> str | None:
        if isinstance(resume_from_checkpoint, bool):
            # Where there is none the Trainer says so itself.
            return get_last_checkpoint(self.trainer.args.output_dir) if resume_from_checkpoint else None
        return resume_from_checkpoint


def _is_of_trl(trainer: Trainer) -> bool:
    return any(cls.__module__.startswith("trl.") for cls in type(trainer).__mro__)


def _collator(trainer: Trainer) -> Any:
    """What makes a batch of the training rows; a pair with images, which TRL's DPO trainer takes, counts once."""
    collator = trainer._get_collator_with_removed_columns(trainer.data_collator)
    if _is_of_trl(trainer):
        from .trl import first_of_each_pair

        return first_of_each_pair(collator)
    return collator


def _documents(trainer: Trainer, collator: Any) -> Any:
    """The training rows; those of TRL's preference trainers have no `input_ids` yet."""
    if _is_of_trl(trainer):
        from .trl import documents

        return documents(trainer, collator)
    return trainer.train_dataset


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


def is_loaded_sharded(trainer: Trainer) -> bool:
    """Whether `from_pretrained(distributed_config=...)` sharded the model (transformers 5.20 to 5.23)."""
    return bool(getattr(trainer, "is_distributed_loading_by_transformers", False))


def _num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
