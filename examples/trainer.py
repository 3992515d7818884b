"""Fine-tuning with transformers.Trainer, LoRA ranks chosen from the data: python examples/trainer.py

With your own: python examples/trainer.py --model MODEL --data FILE.jsonl, whose rows have `text`.
"""

import argparse

from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from gelora_plugins import GeLoRACallback, GeLoRAConfig
from gelora_plugins.demo import passages, smollm2

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
parser.add_argument("--data", help="default: passages of Python's own documentation")
parser.add_argument("--output", default="out/trainer")
parser.add_argument("--samples", type=int, default=1024, help="documents to measure on")
parser.add_argument("--steps", type=int, default=20)
parser.add_argument("--report-to", default="none", help="tensorboard, wandb, trackio, mlflow, ...")
options = parser.parse_args()

path = options.model or smollm2()
tokenizer = AutoTokenizer.from_pretrained(path)
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
if options.data:
    dataset = load_dataset("json", data_files=options.data, split="train")
    dataset = dataset.map(
        lambda row: tokenizer(row["text"], truncation=True, max_length=512), remove_columns=dataset.column_names
    )
else:
    dataset = passages(tokenizer, options.samples)

model = AutoModelForCausalLM.from_pretrained(path)
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
trainer = Trainer(
    model=model,
    args=TrainingArguments(
        options.output,
        max_steps=options.steps,
        per_device_train_batch_size=2,
        learning_rate=1e-3,
        logging_steps=1,
        report_to=options.report_to,
    ),
    train_dataset=dataset,
    data_collator=DataCollatorForLanguageModeling(tokenizer, mlm=False),
    callbacks=[GeLoRACallback(GeLoRAConfig(policy="budget", probe_samples=options.samples))],
)
trainer.train()
trainer.save_model()
