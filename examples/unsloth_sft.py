"""Unsloth, LoRA ranks from a plan that was made before: python examples/unsloth_sft.py train.jsonl

gelora probe unsloth/SmolLM2-135M-Instruct train.jsonl -o profile.json
gelora plan profile.json --policy budget --rank 8 --alpha 16 -o plan.json
"""

import sys

from unsloth import FastLanguageModel  # isort: skip  # first: it patches transformers and TRL when it is imported

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

from gelora_plugins import RankPlan, check_plan

plan = RankPlan.load("plan.json")
model, tokenizer = FastLanguageModel.from_pretrained("unsloth/SmolLM2-135M-Instruct", max_seq_length=512)
model = FastLanguageModel.get_peft_model(
    model,
    target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    lora_dropout=0,
    **plan.lora_config_kwargs(),
)
check_plan(model, plan)  # patterns that match no module are only warned of by PEFT
trainer = SFTTrainer(
    model=model,
    processing_class=tokenizer,
    train_dataset=load_dataset("json", data_files=sys.argv[1], split="train"),
    args=SFTConfig("out/unsloth", max_steps=20, per_device_train_batch_size=2, report_to="none"),
)
trainer.train()
trainer.save_model()
plan.save("out/unsloth/gelora/plan.json")
