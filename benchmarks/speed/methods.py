"""Seconds and memory of a training step of each method beside plain LoRA's: python -m benchmarks.speed.methods

    python -m benchmarks.speed.methods [--steps 8] [--rows 2] [--tokens 64] [--rounds 3] [--only flat_lora,...]

One model, one adapter of rank 8 on every linear map of the blocks (SmolLM2-135M), transformers' own Trainer. Every run
is a process of its own; in a round each method runs once, and its median step is divided by LoRA's of the same round.
The first two steps are left out. Memory is the most that the process, or its accelerator, ever held, less LoRA's.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments

from benchmarks.machine import record
from gelora_plugins.compare.bench import peak_memory
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.methods.by_name import make_method
from gelora_plugins.plugins import available

LORA = "lora"
WARM = 2


FEW = {"diffora": "diffora search=2", "xgblora": "xgblora blocks=30"}  # what needs many steps otherwise
OTHERS = ("flat_lora mode=swap", "lora_pro mode=efficient")


def in_few_steps(method: str) -> str:
    """The method with options for a training as short as this."""
    return FEW.get(method, method)


class Clock(TrainerCallback):
    """The time at the beginning of each step."""

    def __init__(self) -> None:
        self.ticks: list[float] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        if torch.accelerator.is_available():
            torch.accelerator.synchronize()
        self.ticks.append(time.perf_counter())


def run_one(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One training in this process: seconds of its median step, and the most memory that the process held."""
    rows = passages(AutoTokenizer.from_pretrained(smollm2()), options.rows * options.steps, options.tokens)
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"))
    clock = Clock()
    with tempfile.TemporaryDirectory() as scratch:
        arguments = TrainingArguments(
            scratch,
            max_steps=options.steps,
            per_device_train_batch_size=options.rows,
            learning_rate=1e-4,
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            use_cpu=not torch.accelerator.is_available(),
            disable_tqdm=True,
        )
        callbacks = [clock] if method == LORA else [clock, make_method(method)]
        Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
    steps = [later - earlier for earlier, later in zip(clock.ticks[WARM:], clock.ticks[WARM + 1 :], strict=False)]
    return {
        "seconds": statistics.median(steps),
        "peak_bytes": peak_memory(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", help="methods beside LoRA, with commas; all of them if not given")
    parser.add_argument("--one", help="one run in this process; prints JSON and records nothing")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options)))
        return
    named = options.only.split(",") if options.only else [*map(in_few_steps, available("method")), *OTHERS]
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in (LORA, *named)}
    for _ in range(options.rounds):
        for method, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.speed.methods", *sys.argv[1:], "--one", method]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{method:22s}{found[-1]['seconds']:8.2f} s{found[-1]['peak_bytes'] / 2**20:9.0f} MiB", flush=True)
    rows = []
    for method, found in runs.items():
        beside = list(zip(found, runs[LORA], strict=True))
        rows.append(
            {
                "method": method,
                "ratio": statistics.median(run["seconds"] / lora["seconds"] for run, lora in beside),
                "more_bytes": statistics.median(run["peak_bytes"] - lora["peak_bytes"] for run, lora in beside),
                "runs": found,
            }
        )
        print(f"{method:22s} {rows[-1]['ratio']:.2f} {rows[-1]['more_bytes'] / 2**20:+.0f} MiB")
    shown = {name: getattr(options, name) for name in ("steps", "rows", "tokens", "rounds")}
    record("methods", {**shown, "methods": rows})


if __name__ == "__main__":
    main()
