"""Supervised fine-tuning with TRL, LoRA ranks chosen from the data: python examples/trl_sft.py

With your own: python examples/trl_sft.py --model MODEL --data FILE.jsonl, whose rows have `text`, `messages`, or
`prompt` and `completion`.
"""

import argparse

import torch
from datasets import Dataset, load_dataset
from peft import LoraConfig
from transformers import AutoTokenizer
from trl import SFTConfig

from gelora_plugins import GeLoRAConfig, GeLoRASFTTrainer
from gelora_plugins.demo import passages, smollm2

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
parser.add_argument("--data", help="default: passages of Python's own documentation")
parser.add_argument("--output", default="out/trl_sft")
parser.add_argument("--samples", type=int, default=1024, help="documents to measure on")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

model = options.model or smollm2()
if options.data:
    dataset = load_dataset("json", data_files=options.data, split="train")
else:
    dataset = Dataset.from_list(passages(AutoTokenizer.from_pretrained(model), options.samples))

trainer = GeLoRASFTTrainer(
    model,
    args=SFTConfig(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        bf16=torch.cuda.is_available(),
        report_to="none",
    ),
    train_dataset=dataset,
    peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"),
    gelora=GeLoRAConfig(policy="budget", probe_samples=options.samples),
)
trainer.train()
trainer.save_model()
