"""The ranks of one Trainer: chosen or restored at the start of `train()`, and settled on every model it trains."""

from __future__ import annotations

import logging
import weakref
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate.utils import extract_model_from_parallel
from peft import LoraConfig, PeftModel
from transformers import Trainer

from gelora_plugins.config import GeLoRAConfig
from gelora_plugins.errors import ApplyError, GeLoRAError, PlanError, TooLateError, WriteError
from gelora_plugins.pipeline import select_ranks
from gelora_plugins.plugins import find_layout
from gelora_plugins.probe.distributed import ALONE, Processes, blaming
from gelora_plugins.probe.no_trace import brought_to
from gelora_plugins.probe.provenance import other_model
from gelora_plugins.ranks.adapter import AppliedPlan, add_adapter, apply_config, apply_plan, has_ranks_of
from gelora_plugins.ranks.find_adapter import IN_PLACE_INITS, find_adapter, require_adapter
from gelora_plugins.ranks.patterns import check_initialisation, without_plan
from gelora_plugins.ranks.plan import PLAN, RankPlan
from gelora_plugins.ranks.plan_check import check_plan, with_plan
from gelora_plugins.ranks.verdict import sure_plan
from gelora_plugins.trainer_moment import Methods, checkpoint_path, replace_methods

from .checkpoint import Checkpoint
from .model_card import complete_card
from .sharding import has_first_alone_weights, is_sharded, is_still_whole
from .telling import PlanLog, is_at, tell
from .trainer_check import TrainingCheck, check_unstarted
from .training_rows import collator_of, documents_of

if TYPE_CHECKING:
    from torch import nn

logger = logging.getLogger(__name__)


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
        self._adapter: str | None = None  # of that model
        self._ranks: list[int] = []  # of that adapter
        self._decided = False  # chosen, or the user's own kept
        self._told: object = None  # the plan or checkpoint that was last shown
        mine = Methods(self.train, self.call_model_init, self.save_model, self.create_model_card)
        self._trainer_own = replace_methods(trainer, mine)
        trainer.add_callback(TrainingCheck(self))
        trainer.add_callback(PlanLog(self))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        """`Trainer.train`, with the ranks settled first."""
        path = checkpoint_path(self.trainer, resume_from_checkpoint)
        built = self._is_built(self.trainer.model)
        if built:
            self._compare_model()
        if path is not None and not (built and is_sharded(self.trainer)):  # whose checkpoint may say nothing of ranks
            self._restore(path)
        elif not self.is_settled() and not (self._decided and self.trainer.model_init is not None):
            # A search takes the model away between two trials (transformers 5.23), and call_model_init makes the next.
            try:
                if not built:
                    self._check_trainer()
                    self.plan = self.plan or self._select()
                self._settle_current()
            except GeLoRAError as error:
                if self.is_settled():
                    raise  # the ranks are set; what failed is the report
                self._keep(error)
            self._decided = True
        return self._trainer_own.train(resume_from_checkpoint, *args, **kwargs)

    def choose(self) -> RankPlan:
        """The plan that `train()` would apply. Nothing is changed."""
        self._check_trainer()
        return self._select()

    def call_model_init(self, *args: Any, **kwargs: Any) -> nn.Module:
        """`Trainer.call_model_init`: every trial of a hyper-parameter search gets ranks from the same measurement."""
        return self._settle(self._trainer_own.call_model_init(*args, **kwargs))

    def save_model(self, output_dir: str | None = None, *args: Any, **kwargs: Any) -> None:
        """`Trainer.save_model`, which checkpoints go through too, with the plan beside the adapter.

        Not where the adapter has other ranks by now, as at the end of a method that prunes some: it is not their plan.
        """
        self._trainer_own.save_model(output_dir, *args, **kwargs)
        if self.plan is None or not self.trainer.args.should_save:
            return
        directory, kept = Path(output_dir or self.trainer.args.output_dir), self._has_its_ranks()
        if kept and not is_at(directory / PLAN, self.plan):
            try:
                self.plan.save(directory / PLAN)
            except WriteError as error:
                logger.warning("The plan was not saved beside the adapter, which was: %s", error)
        complete_card(directory, self.plan if kept else None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """`Trainer.create_model_card`, which writes the card anew, before an upload too, with the ranks in it."""
        self._trainer_own.create_model_card(*args, **kwargs)
        if self.plan is not None and self.trainer.is_world_process_zero():
            complete_card(Path(self.trainer.args.output_dir), self.plan if self._has_its_ranks() else None)

    def _has_its_ranks(self) -> bool:
        return self.is_settled() and _ranks(extract_model_from_parallel(self.trainer.model)) == self._ranks

    def is_settled(self) -> bool:
        """Whether the model that the trainer has now, with the adapter it has now, is one whose ranks were settled."""
        if self._settled is None or self.trainer.model is None:
            return False
        # FSDP puts its wrapper there (transformers 5.23).
        model: nn.Module = extract_model_from_parallel(self.trainer.model)
        return self._settled() is model and self._adapter == _adapter_name(model)

    def _is_built(self, model: nn.Module) -> bool:
        """Whether the adapter of `model` was made with the saved plan. Then nothing is to be done, sharded or not.

        Raises:
            GeLoRAError: it was made with that plan's patterns, and is another.
        """
        if self.config.plan is None:
            return False
        try:
            plan = self._processes().decide(partial(RankPlan.load, self.config.plan))
            adapter = require_adapter(model)
        except GeLoRAError:
            return False  # said where the plan and the adapter are asked for, and kept where that is wanted
        try:
            check_plan(model, plan)
        except GeLoRAError:
            own = without_plan(adapter.config, plan, adapter.layers)
            if own.rank_pattern != adapter.config.rank_pattern or self._is_out_of_reach():
                raise
            return False
        self.plan = plan
        return True

    def _compare_model(self) -> None:
        """Warn when the plan was made on another model; not where making the adapter has changed the weights."""
        model, adapter = self.trainer.model, find_adapter(self.trainer.model)
        if self.plan is None or model is None or (adapter and adapter.config.init_lora_weights not in IN_PLACE_INITS):
            return
        other = other_model(self.plan.profile, model)
        if other is not None and self.trainer.is_world_process_zero():
            logger.warning("%s", other)

    def _processes(self) -> Processes:
        return Processes.all() if self.trainer.args.world_size > 1 else ALONE

    def _restore(self, path: str) -> None:
        """Take the ranks of a checkpoint instead of choosing any."""
        adapter = find_adapter(self.trainer.model)
        self.checkpoint = Checkpoint.read(path, adapter.name if adapter else "default")
        self.plan = self.checkpoint.plan
        self._compare_model()
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
        self._settled, self._adapter, self._ranks = weakref.ref(model), _adapter_name(model), _ranks(model)
        self._tell(applied, before, _num_trainable(model))
        return model

    def _apply(self, model: nn.Module) -> tuple[nn.Module, AppliedPlan]:
        bare = find_adapter(model) is None
        if self.checkpoint is not None:
            config = self.checkpoint.config
            model, applied = add_adapter(model, config, None) if bare else (model, apply_config(model, config))
            self._leave_out_other_plan(model, self.checkpoint)
            return model, applied
        if bare and self.lora_config is not None:
            if self.plan is not None:
                with_plan(self.lora_config, self.plan, model)  # a trial's model may have other blocks
            return add_adapter(model, self.lora_config, self.plan)
        if self.plan is None or self._is_built(model):
            return model, AppliedPlan({}, ())
        self.plan = self._plan_for(model, self.plan)
        return model, apply_plan(model, self.plan)

    def _leave_out_other_plan(self, model: nn.Module, checkpoint: Checkpoint) -> None:
        """Forget a plan that lies beside ranks that it did not choose, as beside an adapter that was pruned."""
        try:
            if self.plan is not None:
                check_plan(model, self.plan)
        except GeLoRAError:
            logger.warning("%s is left out: it is not the plan of the ranks there.", Path(checkpoint.path, PLAN))
            self.plan, self.checkpoint = None, replace(checkpoint, plan=None)

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
            adapter = find_adapter(self.trainer.model)
            if adapter is None:
                raise TooLateError(
                    "The Trainer was given an optimizer, which cannot hold the parameters of an adapter that is yet to "
                    "be made. Make the adapter first, with get_peft_model(model, config), or pass "
                    "optimizer_cls_and_kwargs=... instead of optimizers=..."
                )
            check_unstarted(self.trainer.optimizer, adapter)
        if self._is_out_of_reach():
            raise ApplyError(
                "The adapter cannot be resized in this model: it is sharded, or will be by FSDP 1 or DeepSpeed ZeRO-3, "
                "or is quantised and will be by FSDP 2. Make the plan before, in one process: gelora probe MODEL DATA "
                "-o profile.json, then gelora plan profile.json -o plan.json; then LoraConfig("
                "**RankPlan.load('plan.json').lora_config_kwargs(), ...) and GeLoRACallback(plan='plan.json'), which "
                "checks the adapter. To resume, use the gelora/plan.json of the checkpoint."
            )

    def _is_out_of_reach(self) -> bool:
        return is_sharded(self.trainer) and not is_still_whole(self.trainer)

    def _select(self) -> RankPlan:
        processes = self._processes()
        if has_first_alone_weights(self.trainer):
            return processes.decide(lambda: self._measure(ALONE))
        return self._measure(processes)

    def _measure(self, processes: Processes) -> RankPlan:
        trainer = self.trainer
        with processes.together():
            collator = collator_of(trainer)
            with blaming("Reading the training data", "Mend what reads the rows, or pass rows that can be read."):
                documents = documents_of(trainer, collator) if self.config.plan is None else None
        with self._on_device():
            return select_ranks(
                trainer.model,
                documents,
                self.config,
                lora_config=self.lora_config,
                collator=collator,
                progress=not trainer.args.disable_tqdm and trainer.is_world_process_zero(),
                processes=processes,
                autocast=trainer.accelerator.autocast,
            )

    def _on_device(self) -> AbstractContextManager[None]:
        """For a model that FSDP has left on the CPU until it shards it."""
        model, device = self.trainer.model, self.trainer.args.device
        waits = is_sharded(self.trainer) and next(model.parameters()).device.type != device.type
        return brought_to(model, device) if waits else nullcontext()

    def _plan_for(self, model: nn.Module, plan: RankPlan) -> RankPlan:
        """`plan`, or one from the same measurement for another adapter: of a trial, or activated since.

        Raises:
            PlanError: the model has other blocks than the model that was measured.
        """
        if self.config.plan is not None:
            return plan
        if find_layout(model) != plan.profile.layout:
            raise PlanError(
                "The model has other blocks than the first one, which was measured. Search over one base model at a "
                "time, and make a Trainer for each model."
            )
        adapter = require_adapter(model)
        sites, lora = adapter.sites(plan.profile.layout), adapter.config
        wanted = (sites, lora.r, lora.lora_alpha, lora.use_rslora)
        if wanted == (plan.sites, plan.base_rank, plan.lora_alpha, plan.use_rslora):
            return plan
        return sure_plan(
            plan.profile, self.config, sites, lora.r, lora_alpha=lora.lora_alpha, use_rslora=lora.use_rslora
        )

    def _tell(self, applied: AppliedPlan, before: int, after: int) -> None:
        told = self.checkpoint or self.plan
        if told is not None and told != self._told and self.trainer.is_world_process_zero():
            self._told = told
            tell(self.trainer, self.config, self.plan, self.checkpoint, applied, (before, after))


def _adapter_name(model: nn.Module | None) -> str | None:
    adapter = None if model is None else find_adapter(model)
    return None if adapter is None else adapter.name


def _ranks(model: nn.Module) -> list[int]:
    adapter = find_adapter(model)
    return [] if adapter is None else [layer.r[adapter.name] for layer in adapter.layers.values()]


def _num_trainable(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
