"""Every training method on SmolLM2-135M with planned ranks, in TRL and Axolotl: is what is saved what was trained?

    python -m benchmarks.methods_on_smollm2 [--steps 6] [--only sora,...] [--axolotl PYTHON] [--jobs 2]

One plan is made. Then each method trains it with TRL's SFTTrainer and GeLoRACallback, and, with the interpreter of an
environment that has Axolotl, by a YAML file with a section `gelora`. Each run is a process of its own. In a --directory
of before what has ended is not repeated. Another process loads what was saved by PEFT alone. These few steps say
nothing of quality.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from benchmarks import reloaded
from benchmarks.machine import record
from gelora_plugins import GeLoRACallback, GeLoRAConfig, RankPlan, select_ranks
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.methods.xgblora import is_possible
from gelora_plugins.plugins import available

TOKENS = 64
DOCUMENTS = 64
LORA = {"r": 4, "lora_alpha": 8}
ENVIRONMENT = {
    **os.environ,
    "AXOLOTL_DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_WAIT_POLICY": "passive",
    "PYTHONPATH": str(Path(__file__).parent),  # of Axolotl's plugin, `reloaded`
}
ENDED = "ended"  # a file beside the adapter of a training that has
CLOSE = 1e-4  # logits of about 20, after 30 blocks in float32
FEW = {  # options for trainings as short as these; others as they come
    "beamlora": {"period": 2},
    "diffora": {"search": 2},
    "sora": {"shrinkage": 0.1},
}


def make_plan(directory: Path) -> RankPlan:
    """The rows of all trainings, as data.jsonl, and ranks that are chosen from them, as plan.json."""
    tokenizer = AutoTokenizer.from_pretrained(smollm2())
    texts = [tokenizer.decode(row["input_ids"]) for row in passages(tokenizer, DOCUMENTS, TOKENS)]
    (directory / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    config = LoraConfig(**LORA, target_modules="all-linear", task_type="CAUSAL_LM")
    rows = [{"text": text, "input_ids": tokenizer(text)["input_ids"]} for text in texts]
    # A least rank of 2 keeps the largest rank near the mean, so that the boosters of XGBLoRA are few.
    plan = select_ranks(model, rows, GeLoRAConfig(probe_samples=DOCUMENTS, min_rank=2), lora_config=config)
    plan.save(directory / "plan.json")
    return plan


def options_of(method: str, plan: RankPlan) -> dict[str, Any]:
    """Options with which `method` does in a few steps all that it does."""
    if method == "xgblora":
        sizes = range(1, len(plan.ranks) + 1)
        return {"blocks": max(size for size in sizes if is_possible(plan.ranks, size))}
    return FEW.get(method, {})


def train_in_trl(directory: Path, output: Path, method: str, steps: int) -> None:
    """In this process; the adapter is in `output`, and what the model says in its live.pt."""
    trainer = SFTTrainer(
        smollm2(),
        args=SFTConfig(
            str(output),
            max_steps=steps,
            max_length=TOKENS,
            per_device_train_batch_size=2,
            learning_rate=1e-3,
            lr_scheduler_type="constant",
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            bf16=False,
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=load_dataset("json", data_files=str(directory / "data.jsonl"), split="train"),
        peft_config=LoraConfig(**LORA, target_modules="all-linear"),
        callbacks=[GeLoRACallback(plan=str(directory / "plan.json")), make_method(method)],
    )
    trainer.train()
    trainer.save_model()
    torch.save(reloaded.logits(trainer.model), output / reloaded.LIVE)


def axolotl_config(directory: Path, output: Path, section: dict[str, Any], steps: int) -> str:
    """The same training as YAML."""
    return yaml.safe_dump(
        {
            "base_model": smollm2(),
            "plugins": ["gelora", "reloaded.LiveLogits"],
            "gelora": {"plan": str(directory / "plan.json"), "method": section},
            "adapter": "lora",
            "lora_r": LORA["r"],
            "lora_alpha": LORA["lora_alpha"],
            "lora_target_linear": True,
            "lora_mlp_kernel": False,
            "lora_qkv_kernel": False,
            "lora_o_kernel": False,
            "bf16": False,
            "datasets": [{"path": str(directory / "data.jsonl"), "ds_type": "json", "type": "completion"}],
            "dataset_prepared_path": str(directory / "prepared"),
            "dataset_num_proc": 1,
            "sequence_len": TOKENS,
            "special_tokens": {"pad_token": "<|im_end|>"},
            "output_dir": str(output),
            "max_steps": steps,
            "micro_batch_size": 2,
            "gradient_accumulation_steps": 1,
            "learning_rate": 0.001,
            "lr_scheduler": "constant",
            "optimizer": "adamw_torch",
            "logging_steps": 1,
            "save_strategy": "no",
            "seed": 42,
        }
    )


@dataclass(frozen=True)
class Work:
    """Where all is kept, and how long a training is."""

    directory: Path
    interpreters: dict[str, str]
    steps: int

    def run(self, framework: str, method: str, options: dict[str, Any]) -> dict[str, Any]:
        """One training; of one that fails the end of what it said. The adapter is in FRAMEWORK-METHOD."""
        output = self.directory / f"{framework}-{method}"
        made = {"method": method, "options": options, "framework": framework}
        if (output / ENDED).is_file():
            return made
        if framework == "TRL":
            text = " ".join([method, *(f"{name}={value}" for name, value in options.items())])
            own = ["--steps", str(self.steps), "--directory", str(self.directory), "--one", text]
            command = [self.interpreters[framework], "-m", "benchmarks.methods_on_smollm2", *own]
        else:
            path = self.directory / f"{output.name}.yml"
            path.write_text(axolotl_config(self.directory, output, {"name": method, **options}, self.steps))
            axolotl = str(Path(self.interpreters[framework]).with_name("axolotl"))
            command = [axolotl, "train", str(path), "--launcher", "python"]
        done = subprocess.run(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        print(f"{method:10s} {framework:8s} {done.stdout[-4000:] if done.returncode else ENDED}", flush=True)
        if done.returncode:
            return {**made, "failed": done.stdout[-4000:]}
        (output / ENDED).touch()
        return made

    def compare(self, framework: str, runs: list[dict[str, Any]]) -> None:
        """Write into each of `runs`, all with one framework, what came of it."""
        folders = [str(self.directory / f"{framework}-{made['method']}") for made in runs]
        again = [self.interpreters[framework], str(Path(reloaded.__file__)), smollm2(), *folders]
        said = subprocess.run(again, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True, check=True).stdout
        for made, found in zip(runs, json.loads(said.splitlines()[-1]), strict=True):
            good = found["kind"] == "LORA" and found["moved"] > 10 * CLOSE and found["difference"] < CLOSE
            made |= {"good": good, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--only", help="methods, with commas; all of them if not given")
    parser.add_argument("--axolotl", help="the interpreter of an environment with Axolotl 0.21")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--directory", type=Path, help="keeps all; a temporary one if not given")
    parser.add_argument("--one", help="one training with TRL in this process, with the plan in --directory")
    options = parser.parse_args()
    directory = options.directory or Path(tempfile.mkdtemp())
    if options.one:
        train_in_trl(directory, directory / f"TRL-{options.one.split()[0]}", options.one, options.steps)
        return
    interpreters = {"TRL": sys.executable, **({"Axolotl": options.axolotl} if options.axolotl else {})}
    work = Work(directory, interpreters, options.steps)
    saved = directory / "plan.json"
    plan = RankPlan.load(saved) if saved.is_file() else make_plan(directory)
    names = options.only.split(",") if options.only else sorted(available("method"))
    with ThreadPoolExecutor(options.jobs) as pool:
        jobs = [pool.submit(work.run, f, name, options_of(name, plan)) for name in names for f in interpreters]
    runs = [job.result() for job in jobs]
    for framework in interpreters:
        work.compare(framework, [made for made in runs if made["framework"] == framework and "failed" not in made])
    shown = {"steps": options.steps, "rows": 2, "tokens": TOKENS, "ranks": plan.ranks}
    record("methods_on_smollm2", {**shown, "parameters": plan.num_parameters, "runs": runs})
    if not all(made.get("good") for made in runs):
        sys.exit("Not every training ended as plain LoRA that says what the model said.")


if __name__ == "__main__":
    main()
