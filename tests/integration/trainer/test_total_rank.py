"""`rank`: another total than the adapter's own r, from the options to the adapter and back from a checkpoint."""

import logging
from pathlib import Path

import pytest

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, check_plan, select_ranks
from gelora_plugins.errors import ConfigError
from tests.support.tiny import build
from tests.support.training import peft_model, ranks_by_block, rows, trainer_for


def trained(directory: Path, model=None, **options):
    model = model or peft_model()
    trainer = trainer_for(
        model, directory, GeLoRACallback(GeLoRAConfig(**options)), save_strategy="steps", save_steps=2
    )
    trainer.train()
    return trainer


def test_every_block_gets_the_rank_that_was_asked_for_at_the_scaling_of_r(tmp_path: Path) -> None:
    trainer = trained(tmp_path, policy="uniform", rank=6)
    assert ranks_by_block(trainer.model) == [6, 6, 6]
    plan = RankPlan.load(tmp_path / "gelora" / "plan.json")
    assert (plan.base_rank, plan.total_rank, plan.scaling) == (4, 6, 2.0)
    check_plan(trainer.model, plan)


def test_the_rows_decide(tmp_path: Path) -> None:
    """120 rows of 4 to 12 tokens, all of them learnt, are fewer tokens than one rank of the model has parameters."""
    trainer = trained(tmp_path, policy="uniform", rank="tokens")
    plan = RankPlan.load(tmp_path / "gelora" / "plan.json")
    targets, per_rank = sum(len(row["labels"]) for row in rows()), sum(site.parameters_per_rank for site in plan.sites)
    assert (plan.profile.num_rows, plan.profile.num_targets) == (120, targets)
    assert ranks_by_block(trainer.model) == [-(-targets // per_rank)] * 3


def test_a_budget_is_that_of_the_total(tmp_path: Path) -> None:
    trained(tmp_path, policy="budget", rank="auto")
    plan = RankPlan.load(tmp_path / "gelora" / "plan.json")
    assert plan.total_rank == 8
    left = 8 * sum(site.parameters_per_rank for site in plan.sites) - plan.num_parameters
    assert 0 <= left < max(site.parameters_per_rank for site in plan.sites)


def test_resuming_with_another_total_keeps_the_ranks_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trained(tmp_path, policy="uniform", rank=6)
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(policy="uniform", rank=3)), max_steps=4)
    with caplog.at_level(logging.WARNING):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert ranks_by_block(trainer.model) == [6, 6, 6]
    assert "rank is 3, the checkpoint's 6" in caplog.text


def test_a_misspelt_rule_costs_no_probe(tmp_path: Path) -> None:
    model = build("llama")
    model.forward = None  # which a probe would call
    with pytest.raises(ConfigError, match="rank rule 'tokenz' does not exist"):
        select_ranks(model, rows(), GeLoRAConfig(policy="uniform", rank="tokenz"), progress=False)
