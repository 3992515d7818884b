"""TRL's DPO trainer with images, on a tiny random LLaVA: of each pair the first is measured, with its image."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from gelora_plugins.integrations.training_rows import collator_of
from peft import LoraConfig
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from trl import DPOConfig, DPOTrainer

from gelora_plugins import GeLoRACallback, RankPlan
from tests.support.tiny import BLOCKS, build

WORDS = ["<pad>", "<s>", "</s>", "<image>", *(f"w{i}" for i in range(60))]
PAIRS = 52


def processor() -> LlavaProcessor:
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=words, extra_special_tokens={"image_token": "<image>"}, **special
    )
    side = {"height": 8, "width": 8}
    images = CLIPImageProcessorPil(size=side, crop_size=side)
    return LlavaProcessor(
        images, tokenizer, patch_size=4, vision_feature_select_strategy="default", num_additional_image_tokens=1
    )


def pairs() -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)

    def words(count: int) -> str:
        return " ".join(WORDS[i] for i in rng.integers(4, len(WORDS), count))

    return [
        {
            "images": [Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))],
            "prompt": f"<image> {words(3)}",
            "chosen": words(int(rng.integers(2, 6))),
            "rejected": words(4),
        }
        for _ in range(PAIRS)
    ]


@pytest.fixture
def trainer(tmp_path: Path) -> DPOTrainer:
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision, text_config=build("llama").config, image_token_index=3, vision_feature_layer=-1
    )
    args = DPOConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=None,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    return DPOTrainer(
        model=LlavaForConditionalGeneration(config),
        args=args,
        train_dataset=Dataset.from_list(pairs()),
        processing_class=processor(),
        peft_config=LoraConfig(r=4, target_modules=["q_proj", "v_proj"]),
        callbacks=[GeLoRACallback()],
    )


def test_pairs_with_images_are_planned_and_trained(trainer: DPOTrainer, tmp_path: Path) -> None:
    trainer.train()
    plan = RankPlan.load(tmp_path / "gelora" / "plan.json")
    assert plan.profile.num_documents == PAIRS
    assert [site.name for site in plan.sites] == [f"model.language_model.layers.{i}" for i in range(BLOCKS)]


def test_the_first_of_each_pair_is_read_with_its_image(trainer: DPOTrainer) -> None:
    rows = [trainer.train_dataset[i] for i in range(3)]
    kept = [dict(row) for row in rows]
    batch = collator_of(trainer)(rows)
    assert rows == kept
    tokenizer = trainer.processing_class.tokenizer
    for row, read, pixels in zip(pairs(), batch["input_ids"], batch["pixel_values"], strict=False):
        text = [word for word in tokenizer.decode(read).split() if word.startswith("w")]
        assert text == f"{row['prompt']} {row['chosen']}".split()[1:]
        alone = trainer.processing_class(images=row["images"], text="<image>", return_tensors="pt")
        assert torch.equal(pixels, alone["pixel_values"][0])
    assert {len(value) for value in batch.values()} == {3}
