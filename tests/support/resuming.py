"""Trainings that are interrupted and go on: what they are made of, and what tells that nothing was lost."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainerCallback

from gelora_plugins import GeLoRACallback, GeLoRAConfig, pipeline
from tests.support.training import arguments, layers, losses, matrices, rows

BUDGET = GeLoRAConfig(policy="budget")
STEPS = {"max_steps": 6, "save_strategy": "steps", "save_steps": 2, "per_device_eval_batch_size": 1}


@pytest.fixture
def probes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each time that something is measured."""
    seen: list[str] = []
    original = pipeline.measure

    def measure(*args: Any, **kwargs: Any) -> Any:
        seen.append("measured")
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline, "measure", measure)
    return seen


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time


def start(model: Any, directory: Path, callback: TrainerCallback | None = None, **options: Any) -> Trainer:
    ours = {name: options.pop(name) for name in ("eval_dataset", "model_init", "optimizers") if name in options}
    dataset = options.pop("train_dataset", rows())
    return Trainer(
        model=model,
        args=arguments(directory, **{**STEPS, **options}),
        train_dataset=dataset,
        callbacks=[callback or GeLoRACallback(BUDGET)],
        **ours,
    )


def rank_of_each(model: nn.Module) -> dict[str, tuple[int, float]]:
    return {
        name: (layer.lora_A[adapter].weight.shape[0], layer.scaling[adapter])
        for name, layer in layers(model).items()
        for adapter in layer.lora_A
    }


def check_continued(resumed: Trainer, whole: Trainer) -> None:
    """The ranks, the loss at every step and the matrices are those of the run that was never interrupted.

    They are so on any machine: both runs do the same operations on the same numbers in the same order.
    """
    assert rank_of_each(resumed.model) == rank_of_each(whole.model)
    assert len(losses(resumed)) == len(losses(whole)) == 6
    assert losses(resumed) == pytest.approx(losses(whole), abs=1e-4)
    for name, value in matrices(whole.model).items():
        torch.testing.assert_close(matrices(resumed.model)[name], value, atol=1e-4, rtol=1e-4)
