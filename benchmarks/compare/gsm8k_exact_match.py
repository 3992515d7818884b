"""Whether exact match on GSM8K tells anything of SmolLM2-135M: answered as it is, with worked examples, and trained.

    python -m benchmarks.compare.gsm8k_exact_match --data DIR

Rows, adapter and rate are those of uniform rank 8 in compare_drawn.py, its first seed. Answers are greedy. A row counts
when the last number of the answer is the final answer.
"""

import argparse
import re
from pathlib import Path
from typing import Any

import torch

from benchmarks.compare.drawn import task_and_settings
from benchmarks.compare.tasks import from_files
from benchmarks.machine import RESULTS, machine
from gelora_plugins import json_files
from gelora_plugins.compare.allocations import lora
from gelora_plugins.compare.bench import Bench
from gelora_plugins.compare.train import adapted, fit, total_steps
from gelora_plugins.findings.record import Run

ROWS, EXAMPLES, NEW_TOKENS, BATCH, RATE = 60, 3, 160, 20, 3e-3
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def exact_match(model: Any, tokenizer: Any, prompts: list[str], answers: list[str]) -> int:
    """How many of the prompts the model answers with the number in `answers`."""
    tokenizer.padding_side = "left"
    right = 0
    for start in range(0, len(prompts), BATCH):
        batch = tokenizer(prompts[start : start + BATCH], return_tensors="pt", padding=True)
        with torch.no_grad():
            tokens = model.generate(
                **batch, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id
            )
        texts = tokenizer.batch_decode(tokens[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(
            last_number(text) == float(answer.replace(",", ""))
            for text, answer in zip(texts, answers[start : start + BATCH], strict=True)
        )
    return right


def last_number(text: str) -> float | None:
    """The last number of an answer, which ends where the model begins a question of its own."""
    found = NUMBER.findall(text.split("\n\n")[0])
    return float(found[-1].replace(",", "")) if found else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    data = parser.parse_args().data
    name, task, settings = task_and_settings("gsm8k", data)
    bench = Bench(name, task, settings, RESULTS)
    test = from_files("gsm8k", data, test_rows=ROWS).test
    prompts, answers = [row["prompt"] + "\n" for row in test], [row["final_answer"] for row in test]
    examples = "".join(f"{row['prompt']}{row['completion']}\n\n" for row in task.train[:EXAMPLES])
    recipe = lora([8] * len(bench.sites), bench.sites)
    made, steps = (
        Run("exact match", "uniform", recipe, 0, RATE, choosing=False),
        total_steps(bench, len(bench.drawn(0))),
    )
    model = adapted(bench, recipe, 0)
    fit(bench, model, made, bench.drawn(0), steps)
    found = {
        "pretrained": exact_match(bench.load(0).eval(), bench.tokenizer, prompts, answers),
        "pretrained, worked examples": exact_match(
            bench.load(0).eval(), bench.tokenizer, [examples + prompt for prompt in prompts], answers
        ),
        "trained, uniform rank 8": exact_match(model.eval(), bench.tokenizer, prompts, answers),
    }
    print(found)
    json_files.write_json(
        RESULTS / "gsm8k_exact_match.json",
        {"machine": machine(), "rows": len(test), "examples": EXAMPLES, "right": found},
    )


if __name__ == "__main__":
    main()
