"""GeLoRA in the trainers of TRL, on a tiny random Llama with SmolLM2's tokenizer."""

from pathlib import Path
from typing import Any

import pytest
import torch
from gelora_plugins.integrations.trl import GeLoRASFTTrainer
from peft import LoraConfig
from safetensors.torch import load_file
from transformers import BitsAndBytesConfig
from trl import SFTConfig, SFTTrainer

from gelora_plugins import GeLoRACallback
from gelora_plugins.errors import ApplyError, ConfigError
from tests.support.tiny import BLOCKS
from tests.support.trl_runs import DOCUMENTS, GELORA, LORA, RANKS, arguments, check_saved, data, plan_of

pytestmark = pytest.mark.usefixtures("fixed_policy")

SFT_CASES = {
    "text": ("text", {}),
    "prompt-completion": ("prompt-completion", {}),
    "loss on the prompt too": ("prompt-completion", {"completion_only_loss": False}),
    "chat": ("chat", {}),
    "chat prompt-completion": ("chat prompt-completion", {}),
    "assistant masks": ("chat", {"assistant_only_loss": True}),
    "padding-free": ("text", {"padding_free": True, "max_length": None}),
    "packed bfd": ("text", {"packing": True, "max_length": 48}),
}


@pytest.mark.parametrize("case", SFT_CASES)
def test_sft_trains_and_saves_the_planned_ranks(case: str, model_path: str, tmp_path: Path) -> None:
    kind, options = SFT_CASES[case]
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, tmp_path, **options),
        train_dataset=data(kind),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    trainer.train()
    trainer.save_model()
    plan = plan_of(tmp_path)
    assert plan.profile.num_documents == DOCUMENTS
    assert plan.ranks == RANKS
    check_saved(tmp_path, plan)


def profile_of(model_path: str, directory: Path, **options: Any) -> Any:
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, directory, max_steps=1, **options),
        train_dataset=data("text"),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    trainer.train()
    return trainer, plan_of(directory).profile


def test_packed_documents_are_points_of_their_own(model_path: str, tmp_path: Path) -> None:
    _, unpacked = profile_of(model_path, tmp_path / "unpacked", max_length=48)
    for name, options in {
        "bfd": {"packing": True, "packing_strategy": "bfd", "max_length": 48},
        "padding-free": {"padding_free": True, "max_length": None},
    }.items():
        trainer, profile = profile_of(model_path, tmp_path / name, **options)
        assert (len(trainer.train_dataset) < DOCUMENTS / 2) == (name == "bfd")
        assert profile.num_documents == unpacked.num_documents == DOCUMENTS
        assert profile.num_tokens == unpacked.num_tokens
        for one, other in zip(profile.estimates, unpacked.estimates, strict=True):
            assert one.value == pytest.approx(other.value, abs=1e-3)


def test_wrapped_packing_counts_rows_and_says_so(
    model_path: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"packing": True, "packing_strategy": "wrapped", "max_length": 8}
    trainer, profile = profile_of(model_path, tmp_path, **options)
    assert profile.num_documents == min(DOCUMENTS, len(trainer.train_dataset))
    assert "Each packed row counts as one document" in caplog.text


def test_callback_and_drop_in_choose_the_same_ranks(model_path: str, tmp_path: Path) -> None:
    tensors = {}
    for name in ("callback", "drop-in"):
        args = arguments(SFTConfig, tmp_path / name)
        common = {"args": args, "train_dataset": data("text"), "peft_config": LoraConfig(**LORA)}
        trainer = (
            SFTTrainer(model_path, callbacks=[GeLoRACallback(GELORA)], **common)
            if name == "callback"
            else GeLoRASFTTrainer(model_path, gelora=GELORA, **common)
        )
        trainer.train()
        trainer.save_model()
        tensors[name] = load_file(tmp_path / name / "adapter_model.safetensors")
    assert plan_of(tmp_path / "callback").ranks == plan_of(tmp_path / "drop-in").ranks
    assert tensors["callback"].keys() == tensors["drop-in"].keys()
    # Both do the same operations in the same order.
    for name, tensor in tensors["callback"].items():
        torch.testing.assert_close(tensor, tensors["drop-in"][name], rtol=0, atol=0)


def test_drop_in_and_callback_together_are_refused(model_path: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="given a GeLoRACallback as well"):
        GeLoRASFTTrainer(
            model_path,
            args=arguments(SFTConfig, tmp_path),
            train_dataset=data("text"),
            peft_config=LoraConfig(**LORA),
            callbacks=[GeLoRACallback()],
        )


def test_drop_in_without_an_adapter_is_an_error(model_path: str, tmp_path: Path) -> None:
    trainer = GeLoRASFTTrainer(model_path, args=arguments(SFTConfig, tmp_path), train_dataset=data("text"))
    with pytest.raises(ApplyError, match="no LoRA adapter"):
        trainer.train()


def test_streamed_rows(model_path: str, tmp_path: Path) -> None:
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, tmp_path),
        train_dataset=data("text").to_iterable_dataset(),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    trainer.train()
    assert plan_of(tmp_path).profile.num_documents == DOCUMENTS


def test_four_bit_adapter_keeps_the_dtype_that_trl_gave_it(model_path: str, tmp_path: Path) -> None:
    trainer = GeLoRASFTTrainer(
        model_path,
        args=arguments(SFTConfig, tmp_path),
        train_dataset=data("text"),
        quantization_config=BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4"),
        peft_config=LoraConfig(**LORA),
        gelora=GELORA,
    )
    before = {name: p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name}
    base = {name: p.clone() for name, p in trainer.model.named_parameters() if p.dtype == torch.uint8}
    trainer.train()
    assert {name: p.dtype for name, p in trainer.model.named_parameters() if ".lora_" in name} == before
    assert set(before.values()) == {torch.bfloat16}
    assert len(base) == BLOCKS * 7
    for name, p in trainer.model.named_parameters():
        assert name not in base or torch.equal(p, base[name])  # bitsandbytes repacks them when it is left to
    trainer.save_model()
    check_saved(tmp_path, plan_of(tmp_path))
