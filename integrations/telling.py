"""What a training says of its ranks, and saves: shown, logged, written beside the checkpoints, and never its end."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from transformers import TrainerCallback
from transformers.integrations import MLflowCallback, TensorBoardCallback, TrackioCallback, WandbCallback

from gelora_plugins.errors import PlanError, WriteError
from gelora_plugins.ranks.plan import PLAN, RankPlan
from gelora_plugins.report.pictures import pixels
from gelora_plugins.report.rank_report import RankReport, scalars, show, write_reports
from gelora_plugins.report.table import COLUMNS, cells

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

    from gelora_plugins.config import GeLoRAConfig
    from gelora_plugins.ranks.adapter import AppliedPlan

    from .checkpoint import Checkpoint

logger = logging.getLogger(__name__)

PREFIX = "gelora/"
MEAN_RANK = f"{PREFIX}mean_rank"
TABLE, PICTURE = f"{PREFIX}plan", f"{PREFIX}picture"
TAKE_PICTURES = (TensorBoardCallback, WandbCallback, TrackioCallback, MLflowCallback)


class Planned(Protocol):
    """A trainer, and where its ranks come from; None where they are the user's own."""

    trainer: Trainer
    plan: RankPlan | None


class PlanLog(TrainerCallback):
    """At the start of training: what the plan comes to, to `log_history` and to whatever `report_to` names.

    TensorBoard, W&B, trackio and MLflow get the table and the picture of the plan, too. Once for each `log_history`:
    one that comes with a checkpoint has it. All processes do it, as all log the losses; the trackers write in one. A
    tracker that fails is a warning here.
    """

    def __init__(self, selection: Planned) -> None:
        self.selection = selection

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called after the trackers' own, unless they were added to the Trainer later: those begin when they log."""
        trainer, plan = self.selection.trainer, self.selection.plan
        if plan is None or any(MEAN_RANK in entry for entry in state.log_history):
            return
        known = {f"{PREFIX}{name}": value for name, value in scalars(plan).items()}
        try:
            trainer.log(dict(known))  # to which the Trainer adds
            if state.is_world_process_zero:
                _show_in_trackers(trainer.callback_handler.callbacks, plan)
        except Exception as error:
            if state.is_world_process_zero:
                logger.warning("The ranks were not logged everywhere: %s: %s", type(error).__name__, error)
        lists = {
            f"{PREFIX}ranks": list(plan.ranks),
            f"{PREFIX}dimensions": [estimate.value for estimate in plan.profile.estimates],
        }
        # Trackers take numbers only, so these are added afterwards.
        for entry in state.log_history:
            if MEAN_RANK in entry:
                entry.update(lists)


def _show_in_trackers(callbacks: Sequence[TrainerCallback], plan: RankPlan) -> None:
    """Give the table of the plan, and its picture where matplotlib is installed, to the trackers that take such.

    The Trainer's own `log` takes numbers only, so these go to the handles that the callbacks keep (transformers 5.23).
    """
    taking = [callback for callback in callbacks if isinstance(callback, TAKE_PICTURES)]
    picture = pixels(plan) if taking and importlib.util.find_spec("matplotlib") is not None else None
    for callback in taking:
        match callback:
            case TensorBoardCallback(tb_writer=writer) if writer is not None:
                writer.add_text(TABLE, RankReport(plan).to_markdown(), 0)
                if picture is not None:
                    writer.add_image(PICTURE, picture, 0, dataformats="HWC")
            case WandbCallback(_wandb=wandb) if wandb is not None and wandb.run is not None:
                shown = {PICTURE: wandb.Image(picture)} if picture is not None else {}
                table = wandb.Table(columns=list(COLUMNS), data=[list(row) for row in cells(plan)])
                wandb.log({TABLE: table, **shown, "train/global_step": 0})
            case TrackioCallback(_trackio=trackio):
                from pandas import DataFrame  # which trackio needs

                table = trackio.Table(dataframe=DataFrame(cells(plan), columns=COLUMNS))
                shown = {PICTURE: trackio.Image(picture)} if picture is not None else {}
                trackio.log({TABLE: table, **shown, "train/global_step": 0})
            case MLflowCallback(_ml_flow=mlflow) if mlflow.active_run() is not None:
                columns = zip(*cells(plan), strict=True)
                mlflow.log_table(dict(zip(COLUMNS, map(list, columns), strict=True)), f"{TABLE}.json")
                if picture is not None:
                    mlflow.log_image(picture, f"{PICTURE}.png")


def tell(
    trainer: Trainer,
    config: GeLoRAConfig,
    plan: RankPlan | None,
    checkpoint: Checkpoint | None,
    applied: AppliedPlan,
    trainable: tuple[int, int],
) -> None:
    """Show and save what was done.

    Args:
        plan: where the ranks come from.
        checkpoint: that training resumes from, which has them.
        trainable: parameters before and after.

    Raises:
        WriteError: the report cannot be written, and `config.on_failure` is "raise".
    """
    if plan is not None:
        report = RankReport(plan, *trainable)
        try:
            show(report)
        except (OSError, ValueError) as error:  # standard output is closed, or on a full disk
            logger.warning("The plan was not shown: %s: %s", type(error).__name__, error)
        if checkpoint is None or not is_at(Path(trainer.args.output_dir, PLAN), plan):
            _write(report, Path(trainer.args.output_dir, PLAN.parent), config)
    for line in applied.notes() if checkpoint is None else checkpoint.lines(applied.ranks, config):
        logger.warning("%s", line)


def is_at(path: Path, plan: RankPlan) -> bool:
    """Whether the plan is saved there already, as where a run goes on."""
    try:
        return RankPlan.load(path) == plan
    except PlanError:
        return False


def _write(report: RankReport, directory: Path, config: GeLoRAConfig) -> None:
    """Save the report. The ranks are set by now, so a failure here says nothing of them."""
    try:
        write_reports(report, directory)
    except Exception as error:
        message = f"The ranks are set, but the report was not written: {error}"
        if config.on_failure != "keep":
            raise WriteError(f"{message} Make room in {directory} and train again.") from error
        logger.warning("%s", message)
