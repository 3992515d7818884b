"""Chains in a Trainer: what its schedule does at a knot, and what is trained beside the adapter."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft.optimizers import create_lorafa_optimizer, create_loraplus_optimizer, create_riemannian_optimizer
from torch import nn
from transformers import Trainer, TrainerCallback, get_scheduler

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.methods.cola import COLA
from tests.support.resuming import without_pictures
from tests.support.steps import adapted, assert_equal, pairs, train
from tests.support.training import losses, matrices, peft_model, ranks_by_block

__all__ = ["without_pictures"]  # a fixture


def rates(trainer: Trainer) -> list[float]:
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def whole_schedule(kind: str, steps: int, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.05)
    scheduler = get_scheduler(kind, optimizer, warmup, steps)
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize("kind", ["linear", "cosine", "polynomial", "inverse_sqrt", "constant"])
def test_each_knot_runs_the_whole_schedule(tmp_path: Path, kind: str) -> None:
    options = {"max_steps": 8, "lr_scheduler_type": kind, "warmup_steps": 1}
    trainer = train(adapted(), tmp_path, COLA(), **options)
    expected = [rate for steps in (3, 2, 3) for rate in whole_schedule(kind, steps, 1)]
    assert rates(trainer) == expected
    assert (len(set(expected)) > 1) == (kind != "constant")
    once = train(adapted(), tmp_path, COLA(restart=False), **options)
    assert rates(once) == whole_schedule(kind, 8, 1)


def test_groups_keep_their_rates(tmp_path: Path) -> None:
    model = adapted()
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4)
    seen: list[list[float]] = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append([g["lr"] for g in o.param_groups if g["params"]]))
    train(model, tmp_path, COLA(), optimizers=(optimizer, None))
    assert seen == 3 * [[0.01, 0.04], [0.005, 0.02]]


def test_what_is_trained_beside_the_adapter_is_trained_throughout(tmp_path: Path) -> None:
    model = adapted(target_modules=["q_proj", "v_proj"], modules_to_save=["lm_head"])
    counts: list[tuple[Any, ...]] = []
    head = model.base_model.model.lm_head.modules_to_save["default"].weight
    _, a, b, _, _ = next(pairs(model))

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
            counts.append(tuple(int(optimizer.state[p]["step"]) for p in (head, a, b)))

    train(model, tmp_path, COLA(), Watch())
    assert counts == [(1, 1, 1), (2, 2, 2), (3, 1, 1), (4, 2, 2), (5, 1, 1), (6, 2, 2)]


def loraplus(model: nn.Module) -> Any:
    return create_loraplus_optimizer(model, torch.optim.AdamW, lr=0.01, loraplus_lr_ratio=4)


def lorafa(model: nn.Module) -> Any:
    return create_lorafa_optimizer(model, r=4, lora_alpha=8, lr=0.01)


def riemannian(model: nn.Module) -> Any:
    return create_riemannian_optimizer(model, torch.optim.AdamW, lr=0.01)


@pytest.mark.parametrize("make", [loraplus, lorafa, riemannian])
def test_optimizers_of_peft_train_what_gelora_has_given_ranks_and_resume(tmp_path: Path, make: Any) -> None:
    def trained(resume: Path | None = None) -> Trainer:
        model = peft_model()
        budget = GeLoRACallback(GeLoRAConfig(policy="budget"))
        often = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
        return train(model, tmp_path, budget, optimizers=(make(model), None), resume=resume, **often)

    whole = trained()
    assert len(set(ranks_by_block(whole.model))) > 1
    assert all(value.any() for name, value in matrices(whole.model).items() if "lora_B" in name)
    resumed = trained(tmp_path / "checkpoint-2")
    assert losses(resumed) == losses(whole)
    assert_equal(matrices(resumed.model), matrices(whole.model))
