"""A loop of your own with accelerate, LoRA ranks chosen from the data: accelerate launch examples/accelerate_loop.py

With your own: --model MODEL --data FILE.jsonl, whose rows have `text`. Several processes share the measurement.
"""

import argparse

import torch
from accelerate import Accelerator
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from gelora_plugins import GeLoRAConfig, select_ranks, with_plan
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.probe.distributed import Processes

parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
parser.add_argument("--data", help="default: passages of Python's own documentation")
parser.add_argument("--output", default="out/accelerate")
parser.add_argument("--samples", type=int, default=1024, help="documents to measure on")
parser.add_argument("--steps", type=int, default=20)
options = parser.parse_args()

accelerator = Accelerator()
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

# The ranks come first: the optimizer and `prepare` take the adapter as it is.
model = AutoModelForCausalLM.from_pretrained(path).to(accelerator.device)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
plan = select_ranks(
    model,
    dataset,
    GeLoRAConfig(policy="budget", probe_samples=options.samples),
    lora_config=config,
    processes=Processes.all(),
)
accelerator.print(plan)
model = get_peft_model(model, with_plan(config, plan, model))

batches = DataLoader(
    dataset, batch_size=2, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
)
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
model, optimizer, batches = accelerator.prepare(model, optimizer, batches)
model.train()
for step, batch in zip(range(options.steps), batches, strict=False):
    loss = model(**batch).loss
    accelerator.backward(loss)
    optimizer.step()
    optimizer.zero_grad()
    accelerator.print(f"step {step + 1}: loss {loss.item():.4f}")

if accelerator.is_main_process:
    accelerator.unwrap_model(model).save_pretrained(options.output)
    plan.save(f"{options.output}/gelora/plan.json")
accelerator.end_training()
