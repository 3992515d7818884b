"""GeLoRA's probe and plan beside PEFT's EVA initialisation: time and memory on the same model and rows (SmolLM2-135M).

    python -m benchmarks.speed.against_eva [--rows 128] [--tokens 128] [--batch 16] [--rounds 3]

Both start from a fresh LoRA adapter of rank 8 on every linear map of the blocks and end with a rank for each. EVA
(Paischer et al., arXiv 2410.07170; `initialize_lora_eva_weights` of PEFT 0.21, its defaults) also makes the initial
weights, from a singular value decomposition of the inputs of every target module, and reads the rows again until that
has converged. Every run is a process of its own. Memory is the peak beyond what the process held before, with the model
loaded and used.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model, initialize_lora_eva_weights
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import record
from gelora_plugins import GeLoRAConfig, select_ranks
from gelora_plugins.demo import passages, smollm2

METHODS = ("gelora", "eva")
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def memory(name: str) -> int:
    """VmRSS or VmHWM (the peak of it) of this process in bytes; Linux only."""
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return 1024 * int(line.split()[1])


def batches(rows: list[dict[str, list[int]]], size: int) -> list[dict[str, torch.Tensor]]:
    """Equally long rows as batches for EVA, which asks a loader for its length and goes over it again and again."""
    return [
        {name: torch.tensor([row[name] for row in rows[i : i + size]]) for name in ("input_ids", "labels")}
        for i in range(0, len(rows), size)
    ]


def run_one(method: str, options: argparse.Namespace) -> dict[str, Any]:
    """One run of a method in this process: seconds, peak memory, batches that went through the model."""
    rows = passages(AutoTokenizer.from_pretrained(smollm2()), options.rows, options.tokens)
    base = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    initialisation: Any = "eva" if method == "eva" else True
    lora = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=initialisation)
    model = get_peft_model(base, lora)
    loader = batches(rows, options.batch)
    with torch.no_grad():
        model(**loader[0])  # the first pass of a process is slower
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    base.get_submodule("model.layers.0").register_forward_hook(count)
    CLEAR.write_text("5")  # proc(5): sets the peak back to what is held now
    before, started = memory("VmRSS"), time.perf_counter()
    if method == "eva":
        initialize_lora_eva_weights(model, loader, show_progress_bar=False)
    else:
        config = GeLoRAConfig(
            policy="budget",
            probe_samples=options.rows,
            probe_max_length=options.tokens,
            probe_batch_size=options.batch,
        )
        select_ranks(model, rows, config, progress=False)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": memory("VmHWM") - before, "batches": passes}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=METHODS, help="One run in this process; prints JSON and records nothing.")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(run_one(options.one, options)))
        return
    runs: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method, found in runs.items():
            command = [sys.executable, "-m", "benchmarks.speed.against_eva", *sys.argv[1:], "--one", method]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            found.append(json.loads(done.stdout.splitlines()[-1]))
            last = found[-1]
            print(f"{method:7s}{last['seconds']:8.1f} s{last['peak_bytes'] / 2**20:9.0f} MiB", flush=True)
    pairs = list(zip(runs["eva"], runs["gelora"], strict=True))
    record(
        "against_eva",
        {
            "rows": options.rows,
            "tokens": options.tokens,
            "batch": options.batch,
            "runs": runs,
            "median_seconds": {m: statistics.median(run["seconds"] for run in runs[m]) for m in METHODS},
            "median_peak_bytes": {m: statistics.median(run["peak_bytes"] for run in runs[m]) for m in METHODS},
            "median_ratio_of_seconds": statistics.median(eva["seconds"] / own["seconds"] for eva, own in pairs),
        },
    )


if __name__ == "__main__":
    main()
