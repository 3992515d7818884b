"""Methods that change the steps in TRL's SFTTrainer, which computes its own loss."""

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from gelora_plugins.methods.base import TrainingMethod
from tests.support.steps import METHODS, NEUTRAL, STEPS, assert_equal, logits
from tests.support.tiny import VOCABULARY, build
from tests.support.training import LORA, losses, matrices, rows


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({"<pad>": 0, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}, "<pad>"))
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="<pad>", unk_token="<pad>")


def train(
    directory: Path, tokenizer: Any, method: TrainingMethod | None, resume: Path | None = None, **options: Any
) -> SFTTrainer:
    torch.manual_seed(0)
    ours = {"max_steps": STEPS, "per_device_train_batch_size": 2, "learning_rate": 0.05, "logging_steps": 1}
    args = SFTConfig(str(directory), **ours, save_steps=3, use_cpu=True, bf16=False, report_to=[], disable_tqdm=True)
    trainer = SFTTrainer(
        model=build("llama"),
        args=args,
        train_dataset=Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows()]),
        processing_class=tokenizer,
        peft_config=LoraConfig(**{**LORA, **options}),
        callbacks=[] if method is None else [method],
    )
    trainer.train(resume_from_checkpoint=None if resume is None else str(resume))
    return trainer


@pytest.mark.parametrize("name", [name for name in METHODS if " " not in name])
def test_sft_trains_resumes_and_saves_plain_lora(tmp_path: Path, tokenizer: Any, name: str) -> None:
    whole = train(tmp_path, tokenizer, METHODS[name]())
    plain = train(tmp_path / "plain", tokenizer, None)
    assert losses(whole)[0] == losses(plain)[0]
    assert losses(whole)[2:] != losses(plain)[2:]
    resumed = train(tmp_path / "resumed", tokenizer, METHODS[name](), tmp_path / "checkpoint-3")
    assert_equal(matrices(resumed.model), matrices(whole.model))
    loaded = PeftModel.from_pretrained(build("llama"), tmp_path / f"checkpoint-{STEPS}")
    assert logits(loaded).equal(logits(whole.model))


@pytest.mark.parametrize("name", NEUTRAL)
def test_neutral_options_are_sft_with_lora(tmp_path: Path, tokenizer: Any, name: str) -> None:
    options = {"r": 1} if name == "xgblora" else {}
    plain = train(tmp_path, tokenizer, None, **options)
    neutral = train(tmp_path, tokenizer, NEUTRAL[name](), **options)
    assert losses(neutral) == losses(plain)
    assert_equal(matrices(neutral.model), matrices(plain.model))
