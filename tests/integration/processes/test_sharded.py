"""Sharded models (FSDP2, 2 processes, gloo): ranks by the LoRA configuration, or in place before they are sharded."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gelora_plugins.integrations.sharding import is_sharded, is_still_whole
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import load_file

from gelora_plugins import GeLoRACallback, RankPlan, select_ranks
from tests.support import groups
from tests.support.forks import run_together, said
from tests.support.groups import adapted
from tests.support.tiny import build
from tests.support.training import LORA, ranks_by_block, rows, trainer_for


@pytest.fixture
def plan(tmp_path: Path) -> RankPlan:
    """A plan made in one process and saved, with the model that it is for."""
    base = build("llama")
    base.save_pretrained(tmp_path / "base")
    found = select_ranks(base, rows(), lora_config=LoraConfig(**LORA), progress=False)
    found.save(tmp_path / "plan.json")
    return found


@pytest.mark.parametrize("how", ["accelerate", "transformers"])
def test_a_sharded_model_trains_with_the_ranks_of_a_plan_as_one_that_is_whole(
    tmp_path: Path, how: str, plan: RankPlan
) -> None:
    assert run_together(tmp_path, 2, groups.train_sharded, how) == [0, 0], said(tmp_path).read_text()
    parts = [json.loads((tmp_path / f"here-{rank}.json").read_text()) for rank in range(2)]
    for name, (_, size) in parts[0].items():
        # transformers shards what it loads; the adapter, made later, is whole in every process
        copies = 2 if how == "transformers" and "lora_" in name else 1
        assert sum(part[name][0] for part in parts) == copies * size, name

    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert min(plan.ranks) == 1  # fewer rows of lora_A than processes: one of them holds nothing
    assert tuple(ranks_by_block(PeftModel.from_pretrained(build("llama"), tmp_path / "adapter"))) == plan.ranks

    whole = adapted(build("llama"), tmp_path / "plan.json")
    before = {name: value.clone() for name, value in get_peft_model_state_dict(whole).items()}
    trainer_for(whole, tmp_path / "whole", None, gradient_accumulation_steps=2, **groups.SGD).train()
    after = get_peft_model_state_dict(whole)
    assert saved.keys() == before.keys()
    assert [name for name, value in saved.items() if value.equal(before[name])] == []
    # Three steps of SGD; each changes a matrix by 0.05 of a gradient, which float32 knows to some 1e-6.
    torch.testing.assert_close(saved, dict(after), rtol=1e-4, atol=1e-6)


def test_an_adapter_of_a_sharded_model_that_is_not_the_plans_is_refused(tmp_path: Path, plan: RankPlan) -> None:
    ran = run_together(tmp_path, 2, groups.train_sharded_with_another_plan, "transformers")
    assert ran == [0, 0], said(tmp_path).read_text()
    for rank in range(2):
        words = (tmp_path / f"refused-{rank}").read_text()
        assert words.startswith("PlanError: ")
        assert "target modules have another rank or scaling than the plan gives them" in words


@pytest.mark.parametrize("how", ["accelerate", "the first alone"])
def test_a_model_that_is_yet_to_be_sharded_gets_its_ranks_in_place_as_one_that_is_whole(
    tmp_path: Path, how: str
) -> None:
    assert run_together(tmp_path, 2, groups.choose_sharded, how) == [0, 0], said(tmp_path).read_text()
    found = [json.loads((tmp_path / f"found-{rank}.json").read_text()) for rank in range(2)]
    whole = adapted(build("llama"))
    options = {"gradient_accumulation_steps": 2, "lr_scheduler_type": "constant", **groups.SGD}
    trainer_for(whole, tmp_path / "whole", GeLoRACallback(), **options).train()
    assert [part["ranks"] for part in found] == [ranks_by_block(whole)] * 2
    assert len(set(found[0]["ranks"])) > 1
    # Three steps of SGD; each changes a matrix by 0.05 of a gradient, which float32 knows to some 1e-6.
    saved = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    torch.testing.assert_close(saved, dict(get_peft_model_state_dict(whole)), rtol=1e-4, atol=1e-6)
    assert all(part["off"] <= 1e-6 for part in found), "resumed at its second step, it ends as it did"
    assert RankPlan.load(tmp_path / "gelora" / "plan.json").ranks == tuple(found[0]["ranks"])


def test_a_model_that_is_loaded_sharded_is_refused_in_place_in_every_process_with_the_way_out(tmp_path: Path) -> None:
    build("llama").save_pretrained(tmp_path / "base")
    assert run_together(tmp_path, 2, groups.resize_sharded, "transformers") == [0, 0], said(tmp_path).read_text()
    words = [(tmp_path / f"refused-{rank}").read_text() for rank in range(2)]
    assert words[0] == words[1]
    assert words[0].startswith("ApplyError: The adapter cannot be resized in this model: it is sharded")
    for way_out in ("gelora probe MODEL DATA -o profile.json", "gelora plan profile.json -o plan.json", "LoraConfig("):
        assert way_out in words[0]
    assert not (tmp_path / "gelora").exists()


@pytest.mark.parametrize(
    ("version", "quantised", "loaded_sharded", "whole"),
    [(2, False, False, True), (1, False, False, False), (2, True, False, False), (2, False, True, False)],
)
def test_what_can_be_waited_for(version: int, quantised: bool, loaded_sharded: bool, whole: bool) -> None:
    model = build("llama")
    model.is_quantized = quantised
    state = SimpleNamespace(fsdp_plugin=SimpleNamespace(fsdp_version=version))
    trainer: Any = SimpleNamespace(
        model=model,
        is_fsdp_enabled=True,
        is_distributed_loading_by_transformers=loaded_sharded,
        accelerator=SimpleNamespace(state=state),
    )
    assert is_sharded(trainer)
    assert is_still_whole(trainer) is whole
    state.fsdp_plugin = None
    assert not is_still_whole(trainer), "DeepSpeed ZeRO-3 has partitioned it"
