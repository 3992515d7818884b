"""Training methods after GeLoRACallback: on the ranks of a plan, with the plan only beside the ranks that it chose."""

from pathlib import Path

import pytest
import torch
from transformers import Trainer

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan
from gelora_plugins.methods.adalora import AdaLoRA
from gelora_plugins.ranks.export import export_uniform
from tests.support.methods import METHODS, loaded, logits
from tests.support.training import arguments, layers, losses, matrices, peft_model, ranks_by_block, rows, saved_plan

BUDGET = GeLoRAConfig(policy="budget")
OPTIONS = {"max_steps": 8, "save_strategy": "steps", "save_steps": 2}


@pytest.fixture(autouse=True)
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gelora_plugins.report.rank_report.draw", lambda *args: None)  # half the time


def start(model: torch.nn.Module, directory: Path, *callbacks: object, **options: object) -> Trainer:
    args = arguments(directory, **{**OPTIONS, **options})
    return Trainer(model=model, args=args, train_dataset=rows(), callbacks=list(callbacks))


@pytest.mark.parametrize(("name", "first"), [*((name, True) for name in METHODS), ("sora-budget", False)])
def test_a_method_trains_the_ranks_of_the_plan_in_either_order_and_resumes(
    tmp_path: Path, name: str, first: bool
) -> None:
    def callbacks() -> list[object]:
        both = [GeLoRACallback(BUDGET), METHODS[name]()]
        return both if first else both[::-1]

    whole = start(peft_model(), tmp_path, *callbacks())
    whole.train()
    plan = saved_plan(tmp_path)
    assert len(set(plan.ranks)) > 1
    assert saved_plan(tmp_path / "checkpoint-4") == plan  # the ranks of a checkpoint are still those
    assert ranks_by_block(loaded(tmp_path / "checkpoint-4")) == list(plan.ranks[:: len(plan.ranks) // 3])
    resumed = start(peft_model(), tmp_path / "again", *callbacks())
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses(resumed) == losses(whole)
    assert all(value.equal(matrices(resumed.model)[key]) for key, value in matrices(whole.model).items())


def test_a_pruned_adapter_is_saved_without_the_plan_and_exported(tmp_path: Path) -> None:
    trainer = start(peft_model(), tmp_path, GeLoRACallback(BUDGET), AdaLoRA(keep=0.5))
    trainer.train()
    plan = saved_plan(tmp_path)
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) <= 0.6 * plan.num_parameters
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "gelora").exists()
    live = logits(trainer.model)
    export_uniform(tmp_path / "adapter", tmp_path / "uniform")
    torch.testing.assert_close(logits(loaded(tmp_path / "uniform")), live, atol=1e-5, rtol=1e-5)
    trainer.save_model()  # where the plan that the training began with lies
    assert saved_plan(tmp_path) == plan
    torch.testing.assert_close(logits(loaded(tmp_path)), live, atol=1e-6, rtol=1e-6)


def test_training_goes_on_with_the_ranks_of_a_pruned_adapter_and_not_with_the_plan_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = start(peft_model(), tmp_path, GeLoRACallback(BUDGET), AdaLoRA(keep=0.5))
    trainer.train()
    trainer.save_model()
    trainer.save_state()
    pruned = {name: layer.r["default"] for name, layer in layers(trainer.model).items()}
    caplog.clear()
    again = start(peft_model(), tmp_path / "again", GeLoRACallback(BUDGET), max_steps=10)
    again.train(resume_from_checkpoint=str(tmp_path))
    assert {name: layer.r["default"] for name, layer in layers(again.model).items()} == pruned
    assert len(losses(again)) == 10
    assert f"{tmp_path / 'gelora' / 'plan.json'} is left out: it is not the plan of the ranks " in caplog.text
    again.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "gelora").exists()


def test_a_plan_that_is_given_is_left_as_it_is(tmp_path: Path) -> None:
    first = start(peft_model(), tmp_path, GeLoRACallback(BUDGET), max_steps=1, save_strategy="no")
    first.train()
    path = tmp_path / "gelora" / "plan.json"
    trainer = start(peft_model(), tmp_path / "again", GeLoRACallback(plan=str(path)), AdaLoRA(keep=0.5))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    assert not (tmp_path / "adapter" / "gelora").exists()
    assert RankPlan.load(path) == saved_plan(tmp_path / "again") == saved_plan(tmp_path / "again" / "checkpoint-2")
