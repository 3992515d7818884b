"""One trainer that trains more than once: again, with smaller batches, for every trial of a search, after a failure."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan
from gelora_plugins.errors import ApplyError
from gelora_plugins.report.table import plan_table, render
from tests.support.resuming import check_continued, probes, start, without_pictures
from tests.support.tiny import build
from tests.support.training import LORA, Watch, matrices, peft_model, ranks_by_block, rows, saved_plan

__all__ = ["probes", "without_pictures"]  # fixtures

EVALUATED = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "metric_for_best_model": "chosen",
    "greater_is_better": True,
    "eval_dataset": rows(5, seed=1),
}


def choose_best(trainer: Trainer, step: int) -> None:
    """Make the checkpoint of this step the best, wherever the training goes."""
    trainer.compute_metrics = lambda prediction: {"chosen": float(trainer.state.global_step == step)}


def test_a_second_train_keeps_the_ranks_and_measures_nothing(tmp_path: Path, probes: list[str]) -> None:
    trainer = start(peft_model(), tmp_path)
    trainer.train()
    ranks = ranks_by_block(trainer.model)
    trainer.train()
    assert ranks_by_block(trainer.model) == ranks != [4, 4, 4]
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ranks_by_block(trainer.model) == ranks
    assert probes == ["measured"]


def test_a_batch_that_does_not_fit_is_tried_again_with_the_same_adapter(
    tmp_path: Path, probes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    even = [{name: ids[:4] for name, ids in row.items()} for row in rows()]
    options = {"per_device_train_batch_size": 4, "auto_find_batch_size": True, "train_dataset": even}
    trainer = start(peft_model(), tmp_path, **options)
    seen: list[dict[str, int]] = []
    original = trainer.training_step

    def training_step(model: nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append({name: id(p) for name, p in model.named_parameters() if "lora_" in name})
        if trainer._train_batch_size > 1:
            raise RuntimeError("CUDA out of memory.")
        return original(model, *args, **kwargs)

    monkeypatch.setattr(trainer, "training_step", training_step)
    watch = Watch()
    trainer.add_callback(watch)
    trainer.train()
    assert len(seen) > 6, "it was tried again"
    assert all(parameters == seen[0] for parameters in seen)
    assert probes == ["measured"]
    assert ranks_by_block(trainer.model) == list(saved_plan(tmp_path).ranks)
    assert all(not torch.equal(value, watch.before[name]) for name, value in matrices(trainer.model).items())


def test_the_best_checkpoint_is_loaded_at_the_end_with_its_ranks(tmp_path: Path) -> None:
    trainer = start(peft_model(), tmp_path, **EVALUATED)
    choose_best(trainer, 4)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best == str(tmp_path / "checkpoint-4")
    assert ranks_by_block(trainer.model) == list(RankPlan.load(Path(best, "gelora", "plan.json")).ranks)
    saved, last = (PeftModel.from_pretrained(build("llama"), path) for path in (best, tmp_path / "checkpoint-6"))
    for name, value in matrices(trainer.model).items():
        assert torch.equal(value, matrices(saved)[name])
        assert not torch.equal(value, matrices(last)[name])


def test_the_state_of_callbacks_is_restored_beside_ours(tmp_path: Path) -> None:
    def make() -> Trainer:
        trainer = start(peft_model(), tmp_path, restore_callback_states_from_checkpoint=True, **EVALUATED)
        choose_best(trainer, 6)
        trainer.add_callback(EarlyStoppingCallback(early_stopping_patience=7))
        return trainer

    whole = make()
    whole.train()
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert sum(isinstance(callback, GeLoRACallback) for callback in resumed.callback_handler.callbacks) == 1


# Hyper-parameter search


def search(tmp_path: Path, trials: int, model_init: Callable[..., nn.Module]) -> tuple[Trainer, list[list[int]]]:
    """A search by optuna over the learning rate, and the ranks of each trial's model as it trained.

    Which trial is best is no matter here.
    """
    trained: list[list[int]] = []

    class Ranks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
            trained.append(ranks_by_block(model))

    trainer = start(None, tmp_path, model_init=model_init, eval_dataset=rows(20, seed=1))
    trainer.add_callback(Ranks())
    trainer.hyperparameter_search(
        backend="optuna",
        n_trials=trials,
        hp_space=lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-4, 1e-2)},
    )
    return trainer, trained


def test_every_trial_of_a_search_trains_with_the_ranks_of_one_measurement(tmp_path: Path, probes: list[str]) -> None:
    _, trained = search(tmp_path, 3, lambda: peft_model())
    assert probes == ["measured"]
    assert trained == [list(saved_plan(tmp_path).ranks)] * 3
    assert trained[0] != [4, 4, 4]
    for number in range(3):
        assert saved_plan(tmp_path / f"run-{number}" / "checkpoint-2") == saved_plan(tmp_path)


def test_a_trial_with_another_r_gets_the_ranks_of_that_budget(tmp_path: Path, probes: list[str]) -> None:
    def model_init(trial: Any = None) -> nn.Module:
        return peft_model(r=8 if trial is not None and trial.number == 1 else 4)

    _, trained = search(tmp_path, 2, model_init)
    assert probes == ["measured"]
    small, large = trained
    assert sum(large) > 1.5 * sum(small)
    assert saved_plan(tmp_path / "run-1" / "checkpoint-2").base_rank == 8


def test_a_model_of_model_init_is_reported_and_resumes(
    tmp_path: Path, probes: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = start(None, tmp_path, model_init=lambda: peft_model())
    whole.train()
    assert render(plan_table(saved_plan(tmp_path))) in capsys.readouterr().out
    resumed = start(None, tmp_path, model_init=lambda: peft_model())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)
    assert probes == ["measured"]


# After a failure that was kept


@pytest.mark.parametrize("bare", [False, True])
def test_a_run_that_kept_the_users_ranks_resumes_with_them(
    tmp_path: Path, bare: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def make() -> Trainer:
        config = GeLoRAConfig(on_failure="keep")
        callback = GeLoRACallback(config, lora_config=LoraConfig(**LORA) if bare else None)
        return start(build("llama") if bare else peft_model(), tmp_path, callback, train_dataset=rows(20))

    whole = make()
    whole.train()
    assert "GeLoRA chose no ranks" in caplog.text
    assert ranks_by_block(whole.model) == [4, 4, 4]
    assert not any(p.requires_grad for name, p in whole.model.named_parameters() if "lora_" not in name)
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    check_continued(resumed, whole)


def test_there_is_nothing_to_keep_without_a_lora_configuration(tmp_path: Path) -> None:
    trainer = start(build("llama"), tmp_path, GeLoRACallback(GeLoRAConfig(on_failure="keep")))
    with pytest.raises(ApplyError, match="no LoRA adapter"):
        trainer.train()
