"""How the plan for SmolLM2-135M depends on what the paper leaves open: `gelora probe --sensitivity` on English prose.

python -m benchmarks.statistics.sensitivity [--rows 1024] [--tokens 128] [--rank 8]
"""

import argparse
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.machine import record
from gelora_plugins import GeLoRAConfig
from gelora_plugins.demo import passages, smollm2
from gelora_plugins.sensitivity import measure_sensitivity


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(smollm2(), dtype=torch.float32)
    rows = passages(AutoTokenizer.from_pretrained(smollm2()), options.rows, options.tokens)
    config = GeLoRAConfig(probe_samples=options.rows, probe_max_length=options.tokens)
    started = time.perf_counter()
    found = measure_sensitivity(model, rows, config, base_rank=options.rank)
    seconds = time.perf_counter() - started
    print(found, *found.lines(), sep="\n")
    kept = {name: value for name, value in found.to_dict().items() if name not in ("schema", "kind", "profile")}
    errors = found.profile.growth_std_errors()
    record("sensitivity", {"rows": len(rows), "tokens": options.tokens, "seconds": seconds, "errors": errors, **kept})


if __name__ == "__main__":
    main()
