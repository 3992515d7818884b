"""Training methods in TRL's SFTTrainer, which makes the loss itself."""

from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from tests.support.methods import METHODS, STEPS, Seen, adapted, even_rows, loaded, logits
from tests.support.tiny import VOCABULARY


def tokenizer() -> PreTrainedTokenizerFast:
    words = {"?": 0, "<s>": 1, "</s>": 2, **{f"w{i}": i for i in range(3, VOCABULARY)}}
    made = Tokenizer(models.WordLevel(words, "?"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?", eos_token="</s>", pad_token="?")


@pytest.mark.parametrize("name", METHODS)
def test_a_method_trains_with_gradient_checkpointing_and_is_saved_as_plain_lora(tmp_path: Path, name: str) -> None:
    args = SFTConfig(
        str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        gradient_checkpointing=True,
        learning_rate=0.02,
        bf16=False,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        save_strategy="no",
    )
    seen = Seen()
    trainer = SFTTrainer(
        model=adapted(),
        args=args,
        train_dataset=Dataset.from_list(even_rows()),
        processing_class=tokenizer(),
        callbacks=[METHODS[name](), seen],
    )
    trainer.train()
    assert seen.first.equal(seen.base)
    live = logits(trainer.model)
    assert not live.equal(seen.base)
    trainer.save_model(str(tmp_path / "adapter"))
    torch.testing.assert_close(logits(loaded(tmp_path / "adapter")), live, atol=1e-6, rtol=1e-6)
