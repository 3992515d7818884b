"""GeLoRACallback in transformers.Trainer, on tiny random models: what is trained, by every way to attach it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, TaskType, get_peft_model
from safetensors.torch import load_file
from torch import nn

from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, apply_plan, prepare_trainer, select_ranks
from gelora_plugins.errors import (
    TooLateError,
)
from tests.support.tiny import build
from tests.support.training import (
    LORA,
    Watch,
    layers,
    matrices,
    peft_model,
    ranks_by_block,
    rows,
    saved_plan,
    trainer_for,
)

# What a user gets


@pytest.mark.parametrize("policy", ["gelora", "budget"])
def test_the_saved_adapter_has_the_ranks_of_the_plan_and_every_matrix_was_trained(tmp_path: Path, policy: str) -> None:
    watch = Watch()
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(policy=policy)))
    trainer.add_callback(watch)
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))

    plan = saved_plan(tmp_path)
    assert ranks_by_block(trainer.model) == list(plan.ranks)
    assert set(plan.ranks) != {4}, "the case shows nothing unless some rank differs from r"
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        shapes = [t.shape for name, t in tensors.items() if f".{site.name}." in name]
        assert len(shapes) == 14
        assert all(rank in shape for shape in shapes)
    for name, value in matrices(trainer.model).items():
        assert not torch.equal(value, watch.before[name]), f"{name} was not trained"
    assert {layer.scaling["default"] for layer in layers(trainer.model).values()} == {2.0}


def test_the_saved_adapter_loads_with_the_same_logits(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")))
    trainer.train()
    trainer.save_model(str(tmp_path / "adapter"))
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    model = trainer.model.eval()
    expected = model(input_ids=ids).logits
    reloaded = PeftModel.from_pretrained(build("llama"), tmp_path / "adapter").eval()
    assert torch.equal(reloaded(input_ids=ids).logits, expected)
    torch.testing.assert_close(reloaded.merge_and_unload()(input_ids=ids).logits, expected, atol=1e-5, rtol=1e-5)


def test_the_report_is_shown_and_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = rows() + rows()[:7]
    trainer_for(peft_model(), tmp_path, GeLoRACallback(), train_dataset=dataset).train()
    shown = capsys.readouterr().out
    plan = saved_plan(tmp_path)
    for site in plan.sites:
        assert site.name in shown
    assert "7 repeated inputs were left out" in shown
    assert f"{plan.num_parameters:,} as planned" in shown
    report = json.loads((tmp_path / "gelora" / "report.json").read_text())
    assert RankPlan.from_dict(report["plan"]) == plan
    assert report["trainable_parameters"] == {"before": plan.num_base_parameters, "after": plan.num_parameters}
    assert "| model.layers.0 |" in (tmp_path / "gelora" / "report.md").read_text()
    assert (tmp_path / "gelora" / "ranks.png").read_bytes().startswith(b"\x89PNG")


def test_budget_costs_what_the_users_rank_would(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")))
    before = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    trainer.train()
    assert sum(p.numel() for p in trainer.model.parameters() if p.requires_grad) == before


@pytest.mark.parametrize("family", ["gpt2", "bert", "t5"])
def test_other_architectures_train_with_the_planned_ranks(tmp_path: Path, family: str) -> None:
    task = {"gpt2": TaskType.CAUSAL_LM, "bert": TaskType.SEQ_CLS, "t5": TaskType.SEQ_2_SEQ_LM}[family]
    dataset: list[dict[str, Any]] = rows(200)
    if family == "bert":
        dataset = [{"input_ids": row["input_ids"], "labels": row["input_ids"][0] % 2} for row in dataset]
    model = peft_model(family, task_type=task)
    watch = Watch()
    trainer = trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget")), train_dataset=dataset)
    trainer.add_callback(watch)
    trainer.train()
    plan = saved_plan(tmp_path)
    for name, layer in layers(model).items():
        rank = [r for s, r in zip(plan.sites, plan.ranks, strict=True) if f".{s.name}." in name]
        assert [layer.r["default"]] == (rank or [4]), "outside the blocks, BERT's pooler, the rank stays"
    moved = {name for name, value in matrices(model).items() if not torch.equal(value, watch.before[name])}
    assert moved == set(watch.before)


# Ways to attach it


def test_a_model_with_add_adapter(tmp_path: Path) -> None:
    model = build("llama")
    model.add_adapter(LoraConfig(**{**LORA, "target_modules": ["q_proj", "v_proj"]}))
    trainer_for(model, tmp_path, GeLoRACallback(GeLoRAConfig(policy="budget"))).train()
    assert ranks_by_block(model) == list(saved_plan(tmp_path).ranks)
    model.save_pretrained(tmp_path / "adapter")
    again = build("llama")
    again.load_adapter(str(tmp_path / "adapter"))
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(again.eval()(input_ids=ids).logits, model.eval()(input_ids=ids).logits)


@pytest.mark.parametrize("init", [True, "pissa", "olora"])
def test_a_model_without_adapter_gets_one(tmp_path: Path, init: Any) -> None:
    callback = GeLoRACallback(GeLoRAConfig(policy="budget"), lora_config=LoraConfig(**LORA, init_lora_weights=init))
    trainer = trainer_for(build("llama"), tmp_path, callback)
    trainer.train()
    assert isinstance(trainer.model, PeftModel)
    assert ranks_by_block(trainer.model) == list(saved_plan(tmp_path).ranks)
    assert trainer.model.peft_config["default"].init_lora_weights == init


def test_a_saved_plan_is_used_and_nothing_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plan = select_ranks(peft_model(), rows(), GeLoRAConfig(policy="budget"), progress=False)
    path = tmp_path / "plan.json"
    changed = dataclasses.replace(plan, ranks=(2, 7, 3))
    changed.save(path)
    model = peft_model()
    trainer_for(model, tmp_path / "out", GeLoRACallback(plan=str(path))).train()
    assert ranks_by_block(model) == [2, 7, 3]
    assert saved_plan(tmp_path / "out") == changed


def test_select_ranks_serves_a_loop_of_ones_own() -> None:
    plan = select_ranks(build("llama"), rows(), GeLoRAConfig(policy="budget"), progress=False)
    model = get_peft_model(build("llama"), LoraConfig(target_modules="all-linear", **plan.lora_config_kwargs()))
    assert ranks_by_block(model) == list(plan.ranks)
    in_place = peft_model(r=8, lora_alpha=8)
    apply_plan(in_place, plan)
    assert ranks_by_block(in_place) == list(plan.ranks)
    assert in_place.peft_config["default"].rank_pattern == model.peft_config["default"].rank_pattern


def test_prepare_trainer_works_on_a_trainer_that_exists(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, None)
    prepare_trainer(trainer, GeLoRAConfig(policy="budget"))
    trainer.train()
    assert ranks_by_block(trainer.model) == list(saved_plan(tmp_path).ranks)


class Streamed(torch.utils.data.IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter(rows())


def test_an_iterable_dataset(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(), train_dataset=Streamed())
    trainer.train()
    assert ranks_by_block(trainer.model) == list(saved_plan(tmp_path).ranks)


def test_rows_that_only_the_collator_understands(tmp_path: Path) -> None:
    def collate(batch: list[Any]) -> dict[str, torch.Tensor]:
        ids = nn.utils.rnn.pad_sequence([torch.tensor(row["words"]) for row in batch], batch_first=True)
        return {"input_ids": ids, "attention_mask": (ids > 0).long(), "labels": ids}

    dataset = [{"words": row["input_ids"]} for row in rows()]
    options = {"train_dataset": dataset, "data_collator": collate, "remove_unused_columns": False}
    trainer = trainer_for(peft_model(), tmp_path, GeLoRACallback(), **options)
    trainer.train()
    plain = select_ranks(peft_model(), rows(), progress=False)
    assert saved_plan(tmp_path).ranks == plain.ranks


# Not at all


def test_keep_on_failure_trains_with_the_users_ranks_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_for(
        peft_model(), tmp_path, GeLoRACallback(GeLoRAConfig(on_failure="keep")), train_dataset=rows(20)
    )
    trainer.train()
    assert ranks_by_block(trainer.model) == [4, 4, 4]
    assert "GeLoRA chose no ranks" in caplog.text
    assert "20 distinct documents" in caplog.text


def test_keep_on_failure_still_refuses_a_callback_that_came_too_late(tmp_path: Path) -> None:
    trainer = trainer_for(peft_model(), tmp_path, None)
    trainer.add_callback(GeLoRACallback(GeLoRAConfig(on_failure="keep")))
    with pytest.raises(TooLateError):
        trainer.train()
