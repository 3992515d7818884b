"""What the probe costs beside bare forward passes of the same backbone on the same batches (SmolLM2-135M).

    python benchmarks/probe_cost.py [--rows 512] [--tokens 128] [--rounds 5]

The probe is `measure`, everything in it: choosing documents, hooks, pooling, neighbours, dimensions. The two take turns
in one process; the ratio is taken round by round.
"""

import argparse
import statistics
import time
from typing import Any

import torch
from machine import record
from transformers import AutoModelForCausalLM, AutoTokenizer

from gelora_plugins import GeLoRAConfig, measure
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.probe_set import choose_documents


def bare(model: Any, rows: list[Any], config: GeLoRAConfig) -> None:
    with torch.no_grad():
        for batch in choose_documents(rows, config, model.config, None).batches():
            model.base_model(**batch, use_cache=False)


def probe(model: Any, rows: list[Any], config: GeLoRAConfig) -> None:
    measure(model, rows, config, progress=False)


def setting(options: argparse.Namespace) -> tuple[Any, list[Any], GeLoRAConfig]:
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32).eval()
    rows = passages(AutoTokenizer.from_pretrained(smollm2()), options.rows, options.tokens)
    return model, rows, GeLoRAConfig(probe_samples=options.rows, probe_max_length=options.tokens)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    model, rows, config = setting(options)
    runs = {"bare": bare, "probe": probe}
    bare(model, rows[:64], config)  # the first passes of a process are slower
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run(model, rows, config)
            seconds[name].append(time.perf_counter() - started)
        print(f"bare {seconds['bare'][-1]:.1f} s, probe {seconds['probe'][-1]:.1f} s", flush=True)
    ratio = statistics.median(p / b for p, b in zip(seconds["probe"], seconds["bare"], strict=True))
    print(f"probe / bare forward: {ratio:.3f}, median of {options.rounds} rounds")
    found = {"rows": len(rows), "tokens": options.tokens, "seconds": seconds, "median_ratio": ratio}
    record("probe_cost", found)


if __name__ == "__main__":
    main()
