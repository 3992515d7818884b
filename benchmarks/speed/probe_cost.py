"""What the probe costs beside bare forward passes of the same backbone on the same batches (SmolLM2-135M).

    python -m benchmarks.speed.probe_cost [--rows 512] [--tokens 128] [--rounds 5]

The probe is `measure`, everything in it: choosing documents, hooks, pooling, neighbours, dimensions. For time the two
take turns in one process, and the ratio is taken round by round. For memory each runs in a fresh process, and what
counts is the peak of the resident memory (VmHWM) above the model; the memory of the probe beyond the bare forward is
given relative to the size of the pooled features.
"""

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import record
from gelora_plugins import GeLoRAConfig, measure
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.probe.documents import choose_documents


def bare(model: Any, rows: list[Any], config: GeLoRAConfig) -> None:
    with torch.no_grad():
        for batch in choose_documents(rows, config, model.config, None).batches(config.probe_batch_size):
            model.base_model(**batch, use_cache=False)


def probe(model: Any, rows: list[Any], config: GeLoRAConfig) -> None:
    measure(model, rows, config, progress=False)


RUNS = {"bare": bare, "probe": probe}


def setting(options: argparse.Namespace) -> tuple[Any, list[Any], GeLoRAConfig]:
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    rows = passages(AutoTokenizer.from_pretrained(smollm2()), options.rows, options.tokens)
    config = GeLoRAConfig(
        probe_samples=options.rows, probe_max_length=options.tokens, feature_storage=options.feature_storage
    )
    return model, rows, config


def status(name: str) -> int:
    """A size from /proc/self/status, in bytes (Linux)."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def print_peak(options: argparse.Namespace) -> None:
    """In a process of its own: the peak above the model, whose pages are all read before."""
    model, rows, config = setting(options)
    for parameter in model.parameters():
        parameter.sum()
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak so far, of loading, is forgotten
    RUNS[options.peak_of](model, rows, config)
    pooled = (model.config.num_hidden_layers + 1) * model.config.hidden_size * 4 * len(rows)
    print("peak", status("VmHWM") - before, pooled)


def peaks(options: argparse.Namespace) -> dict[str, Any]:
    found: dict[str, list[int]] = {name: [] for name in RUNS}
    pooled = 0
    for _ in range(options.repeats):
        for name in RUNS:
            arguments = [f"--{key}={getattr(options, key)}" for key in ("rows", "tokens", "feature_storage")]
            command = [sys.executable, "-m", "benchmarks.speed.probe_cost", f"--peak_of={name}", *arguments]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            _, peak, size = next(line for line in output.splitlines() if line.startswith("peak ")).split()
            found[name].append(int(peak))
            pooled = int(size)
        print(*(f"{name} {values[-1] / 2**20:.0f} MiB above the model" for name, values in found.items()), flush=True)
    beyond = statistics.median(found["probe"]) - statistics.median(found["bare"])
    print(f"pooled features {pooled / 2**20:.0f} MiB; probe beyond bare forward: {beyond / pooled:.2f} of that")
    return {"peak_bytes": found, "pooled_bytes": pooled, "beyond_bare_over_pooled": beyond / pooled}


def times(options: argparse.Namespace) -> dict[str, Any]:
    model, rows, config = setting(options)
    bare(model, rows[:64], config)  # the first passes of a process are slower
    seconds: dict[str, list[float]] = {name: [] for name in RUNS}
    for _ in range(options.rounds):
        for name, run in RUNS.items():
            started = time.perf_counter()
            run(model, rows, config)
            seconds[name].append(time.perf_counter() - started)
        print(f"bare {seconds['bare'][-1]:.1f} s, probe {seconds['probe'][-1]:.1f} s", flush=True)
    ratio = statistics.median(p / b for p, b in zip(seconds["probe"], seconds["bare"], strict=True))
    print(f"probe / bare forward: {ratio:.3f}, median of {options.rounds} rounds")
    return {"rows": len(rows), "tokens": options.tokens, "seconds": seconds, "median_ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5, help="fresh processes for each peak of memory")
    parser.add_argument("--feature_storage", default="memory")
    parser.add_argument("--peak_of", choices=list(RUNS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak_of:
        print_peak(options)
        return
    memory = peaks(options)
    record("probe_cost", {**times(options), "feature_storage": options.feature_storage, "memory": memory})


if __name__ == "__main__":
    main()
