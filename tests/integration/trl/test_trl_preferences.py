"""GeLoRA in the trainers of TRL that learn from preferences and rewards."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from gelora_plugins import GeLoRACallback, select_ranks
from gelora_plugins.errors import ProbeError
from tests.support.trl_runs import DOCUMENTS, GELORA, LORA, RANKS, arguments, check_saved, data, plan_of

pytestmark = pytest.mark.usefixtures("fixed_policy")

# Preference trainers. What each row must count as is written out here, from the columns that the trainer made.
PREFERENCE_CASES = {
    "dpo": (DPOTrainer, DPOConfig, "preference", ("prompt_ids", "chosen_ids")),
    "dpo chat": (DPOTrainer, DPOConfig, "chat preference", ("prompt_ids", "chosen_ids")),
    "dpo streamed": (DPOTrainer, DPOConfig, "preference", ("prompt_ids", "chosen_ids")),
    "kto": (KTOTrainer, KTOConfig, "unpaired", ("prompt_ids", "completion_ids")),
    "reward": (RewardTrainer, RewardConfig, "preference", ("chosen_ids",)),
}


@pytest.mark.parametrize("case", PREFERENCE_CASES)
def test_preference_rows_are_one_document_each(case: str, model_path: str, tokenizer: Any, tmp_path: Path) -> None:
    trainer_class, config_class, kind, columns = PREFERENCE_CASES[case]
    dataset = data(kind)
    lora = LoraConfig(**LORA)
    model: Any = model_path
    if case == "reward":
        lora = LoraConfig(**LORA, task_type="SEQ_CLS")
        model = AutoModelForSequenceClassification.from_pretrained(model_path, num_labels=1)
    trainer = trainer_class(
        model,
        args=arguments(config_class, tmp_path, max_length=64),
        train_dataset=dataset.to_iterable_dataset() if "streamed" in case else dataset,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[GeLoRACallback(GELORA)],
    )
    rows = [{"input_ids": [token for name in columns for token in row[name]]} for row in trainer.train_dataset]
    # A stream is sampled in another way than a list.
    expected = select_ranks(trainer.model, iter(rows) if "streamed" in case else rows, GELORA, progress=False)
    trainer.train()
    trainer.save_model()
    plan = plan_of(tmp_path)
    assert plan.profile.num_documents == DOCUMENTS
    assert plan.profile.data_fingerprint == expected.profile.data_fingerprint
    assert plan.profile.estimates == expected.profile.estimates
    assert plan.ranks == RANKS
    check_saved(tmp_path, plan)


def dpo_with_reference(model_path: str, tokenizer: Any, directory: Path, **options: Any) -> DPOTrainer:
    """A DPO trainer that is given a PeftModel adds a copy of its adapter, "ref", with the same configuration object."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(model_path)
    return DPOTrainer(
        get_peft_model(base, LoraConfig(**LORA, task_type="CAUSAL_LM")),
        args=arguments(DPOConfig, directory, max_length=64, **options),
        train_dataset=data("preference"),
        processing_class=tokenizer,
        callbacks=[GeLoRACallback(GELORA)],
    )


def shapes(model: PeftModel, adapter: str) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in model.named_parameters() if f".{adapter}." in name}


def test_dpo_reference_adapter_is_left_alone_and_resumes(model_path: str, tokenizer: Any, tmp_path: Path) -> None:
    saving = {"save_strategy": "steps", "save_steps": 2}
    trainer = dpo_with_reference(model_path, tokenizer, tmp_path, max_steps=4, **saving)
    assert list(trainer.model.peft_config) == ["default", "ref"]
    reference = {name: p.clone() for name, p in trainer.model.named_parameters() if ".ref." in name}
    trainer.train()
    plan = plan_of(tmp_path)
    check_saved(tmp_path / "checkpoint-2", plan)
    assert not trainer.model.peft_config["ref"].rank_pattern
    for name, p in trainer.model.named_parameters():
        if ".ref." in name:
            torch.testing.assert_close(p, reference[name], rtol=0, atol=0)
            assert not p.requires_grad
    written = (tmp_path / "gelora" / "plan.json").read_bytes()

    resumed = dpo_with_reference(model_path, tokenizer, tmp_path, max_steps=4, **saving)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "gelora" / "plan.json").read_bytes() == written
    assert shapes(resumed.model, "default") == shapes(trainer.model, "default")
    # The steps after the checkpoint are the same operations in the same order.
    for (name, p), (_, q) in zip(trainer.model.named_parameters(), resumed.model.named_parameters(), strict=True):
        if ".default." in name:
            torch.testing.assert_close(p, q, rtol=0, atol=1e-6)


def reward(completions: list[str], **kwargs: Any) -> list[float]:
    return [float(len(completion)) for completion in completions]


@pytest.mark.parametrize(("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)])
def test_trainers_with_prompts_only_need_a_plan(
    trainer_class: Any, config_class: Any, model_path: str, tokenizer: Any, tmp_path: Path
) -> None:
    def made(callback: GeLoRACallback) -> Any:
        options = {"num_generations": 2, "max_completion_length": 4}
        return trainer_class(
            model_path,
            reward_funcs=reward,
            args=arguments(config_class, tmp_path / "run", **options),
            train_dataset=data("prompt"),
            processing_class=tokenizer,
            peft_config=LoraConfig(**LORA),
            callbacks=[callback],
        )

    with pytest.raises(ProbeError, match=r"has prompts only \(prompt\).*plan='plan.json'"):
        made(GeLoRACallback(GELORA)).train()

    rows = [{"input_ids": tokenizer(row["text"])["input_ids"]} for row in data("text")]
    base = AutoModelForCausalLM.from_pretrained(model_path)
    plan = select_ranks(base, rows, GELORA, lora_config=LoraConfig(**LORA), progress=False)
    plan.save(tmp_path / "plan.json")
    trainer = made(GeLoRACallback(plan=str(tmp_path / "plan.json")))
    trainer.train()
    trainer.save_model()
    tensors = load_file(tmp_path / "run" / "adapter_model.safetensors")
    for site, rank in zip(plan.sites, plan.ranks, strict=True):
        assert {t.shape[0] for name, t in tensors.items() if f".{site.name}." in name and ".lora_A." in name} == {rank}
