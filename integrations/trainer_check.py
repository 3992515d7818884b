"""Checks on a Trainer: its optimizer can take other ranks, and trains the adapter that was planned, all of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback

from gelora_plugins.errors import PlanError, TooLateError
from gelora_plugins.ranks.adapter import has_ranks_of
from gelora_plugins.ranks.find_adapter import require_adapter
from gelora_plugins.ranks.held import check_held, trained
from gelora_plugins.ranks.plan_check import check_plan

from .sharding import is_sharded

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from gelora_plugins.ranks.find_adapter import Adapter
    from gelora_plugins.ranks.plan import RankPlan

    from .checkpoint import Checkpoint


class Settled(Protocol):
    """What is to be trained: ranks that were chosen, or those of a checkpoint, or neither."""

    trainer: Trainer
    plan: RankPlan | None
    checkpoint: Checkpoint | None


class TrainingCheck(TrainerCallback):
    """At the start of training: the adapter has the ranks that were settled, and the optimizer holds all of it.

    Raises:
        PlanError: the adapter is not the plan's, or not the checkpoint's.
        TooLateError: the optimizer holds other parameters, which would train nothing without a word.
    """

    def __init__(self, selection: Settled) -> None:
        self.selection = selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called with the optimizer as it will step, after the checkpoint was loaded."""
        trainer, plan, checkpoint = self.selection.trainer, self.selection.plan, self.selection.checkpoint
        if (plan is None and checkpoint is None) or is_sharded(trainer):
            return  # the user's own ranks; or wrapped by now, and checked before
        if plan is not None:
            check_plan(trainer.model, plan)
        elif checkpoint is not None and not has_ranks_of(trainer.model, checkpoint.config):
            raise PlanError(f"The adapter has other ranks than the checkpoint {checkpoint.path}.")
        if trainer.optimizer is not None and not trainer.is_deepspeed_enabled:  # which flattens the parameters
            check_held(trainer.optimizer, require_adapter(trainer.model))


def check_unstarted(optimizer: Any, adapter: Adapter) -> None:
    """Raises TooLateError unless `optimizer` holds all of `adapter` and can take other shapes of it.

    The Parameters stay the same objects when they get other shapes. What an optimizer keeps beside them does not.
    """
    check_held(optimizer, adapter)
    if any(parameter in optimizer.state for _, parameter in trained(adapter)):
        raise TooLateError(
            "The Trainer was given an optimizer that has begun: it keeps values in the shapes that the adapter's "
            "matrices have now (Adagrad makes them at once, others in their first step). Pass a fresh one of another "
            "kind, or optimizer_cls_and_kwargs=... instead of optimizers=..., or choose the ranks before the optimizer "
            "is made: plan = select_ranks(model, rows); apply_plan(model, plan)."
        )
