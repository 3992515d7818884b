"""Lightning, LoRA ranks chosen from the data: python examples/lightning_loop.py

With your own: --model MODEL --data FILE.jsonl, whose rows have `text`.
"""

import argparse

import lightning
import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, DataCollatorForLanguageModeling

from gelora_plugins import GeLoRAConfig, select_ranks, with_plan
from gelora_plugins.demo import passages, smollm2


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, index):
        loss = self.model(**batch).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.AdamW((p for p in self.parameters() if p.requires_grad), lr=1e-3)


parser = argparse.ArgumentParser()
parser.add_argument("--model", help="default: SmolLM2-135M-Instruct")
parser.add_argument("--data", help="default: passages of Python's own documentation")
parser.add_argument("--output", default="out/lightning")
parser.add_argument("--samples", type=int, default=1024, help="documents to measure on")
parser.add_argument("--steps", type=int, default=20)
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

# The ranks come first: a strategy of Lightning shards or copies the module as it is when `fit` begins.
model = AutoModelForCausalLM.from_pretrained(path)
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
plan = select_ranks(model, dataset, GeLoRAConfig(policy="budget", probe_samples=options.samples), lora_config=config)
print(plan)
model = get_peft_model(model, with_plan(config, plan, model))

batches = DataLoader(
    dataset, batch_size=2, shuffle=True, collate_fn=DataCollatorForLanguageModeling(tokenizer, mlm=False)
)
trainer = lightning.Trainer(max_steps=options.steps, default_root_dir=options.output, logger=False)
trainer.fit(Module(model), batches)
model.save_pretrained(options.output)
plan.save(f"{options.output}/gelora/plan.json")
