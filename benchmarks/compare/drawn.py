"""Methods at equal LoRA parameters where each seed draws its own training rows. How it is judged: PREREGISTRATION.md.

    python -m benchmarks.compare.drawn cola mrpc rte stsb sst2 gsm8k dolly_open_qa --data DIR [--jobs 2]

Rows are drawn from DIR/TASK/train.jsonl.gz, whole; the test rows are from DIR/TASK/validation.jsonl.gz. What is
recorded in benchmarks/results/compare-drawn/TASK/runs.jsonl is kept, so a stopped script goes on.
"""

import argparse
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.compare.completion_tokens import measure_completions
from benchmarks.compare.tasks import MINILM, SMOLLM2, from_files, minilm, with_line_ends
from benchmarks.machine import RESULTS, machine
from gelora_plugins import GeLoRAConfig, json_files
from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.run import compare, default_plans, planned
from gelora_plugins.compare.task import Task
from gelora_plugins.demo import smollm2

ARMS: dict[str, Any] = {"allocations": ("plan", "uniform", "permuted"), "methods": ("lora",)}
# Rates, epochs and batches with which uniform rank 8 learned in trials that were scored on training rows. What learned
# little in a minute (CoLA, RTE) is kept small, and so is what takes a minute for few rows (SmolLM2). But for SST-2 one
# rate is given to all methods: a rate that is chosen with few seeds can pass for a difference between them.
SMALL = replace(MINILM, **ARMS, rates=(1e-3,), batch_size=8)
LARGE = replace(SMOLLM2, **ARMS, rates=(3e-3,))
TASKS: dict[str, tuple[Settings, dict[str, Any]]] = {
    "cola": (replace(SMALL, rows_per_seed=2000, epochs=4), {}),
    "mrpc": (replace(SMALL, rows_per_seed=600, epochs=4), {}),
    "rte": (replace(SMALL, rows_per_seed=400), {}),
    "stsb": (replace(SMALL, rows_per_seed=1500, epochs=5), {}),
    "stsb_lower_rate": (replace(SMALL, rows_per_seed=1500, epochs=5, rates=(5e-4,)), {}),
    "sst2": (replace(MINILM, **ARMS, rates=(1e-3, 3e-3), rate_seeds=3, rows_per_seed=600, seeds=10), {}),
    "sst2_held_out": (replace(MINILM, **ARMS, rates=(1e-3,), rows_per_seed=600, seeds=10), {}),
    "gsm8k": (replace(LARGE, rows_per_seed=64), {"test_rows": 30}),
    "dolly_open_qa": (replace(LARGE, rows_per_seed=96), {"test_rows": 40}),
}
PLANS = {
    "cola": ("budget",),
    "mrpc": ("budget",),
    "rte": ("budget",),
    "stsb_lower_rate": ("budget",),
    "sst2_held_out": ("budget", "ranks of sst2"),
    "gsm8k": ("budget", "completion"),
    "dolly_open_qa": ("published",),  # its budget is recorded without drawn rows
}


def task_and_settings(name: str, data: Path) -> tuple[str, Task, Settings]:
    """(model, task, settings)."""
    settings, sizes = TASKS[name]
    if name == "sst2_held_out":
        task = held_out_sst2(data)
    else:
        task = from_files(name.removesuffix("_lower_rate"), data, train_rows=None, **sizes)
    task = replace(task, name=name)
    return (smollm2(), with_line_ends(task), settings) if task.kind == "causal-lm" else (minilm(), task, settings)


def held_out_sst2(data: Path) -> Task:
    """SST-2 with 2,000 rows of its training file to test on, in place of its validation file."""
    rows = list(from_files("sst2", data, train_rows=None).train)
    random.Random(1).shuffle(rows)
    return Task("sst2_held_out", "classification", rows[2000:], rows[:2000], max_length=48)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=list(TASKS))
    parser.add_argument("--data", type=Path, required=True, help="folder of the tasks")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--rates", help="learning rates, with commas; one is not chosen but taken")
    parser.add_argument("--output", type=Path, default=RESULTS / "compare-drawn")
    options = parser.parse_args()
    for name in options.tasks:
        model, task, settings = task_and_settings(name, options.data)
        if options.rates:
            settings = replace(settings, rates=tuple(map(float, options.rates.split(","))))
        wanted, bench = PLANS.get(name, ("published", "budget")), Bench(model, task, settings, options.output / name)
        plans = default_plans(bench, GeLoRAConfig())
        if "completion" in wanted:
            plans["completion"] = planned(bench, measure_completions(bench), GeLoRAConfig(), "budget")
        if "ranks of sst2" in wanted:
            model, other, others = task_and_settings("sst2", options.data)
            there = default_plans(Bench(model, other, others, RESULTS / "compare-drawn" / "sst2"), GeLoRAConfig())
            plans["ranks of sst2"] = replace(plans["budget"], ranks=there["budget"].ranks, rank_changes=())
        plans = {plan: plans[plan] for plan in wanted}
        print(name, {plan: found.ranks for plan, found in plans.items()}, flush=True)
        found = compare(model, task, options.output, settings, plans=plans, jobs=options.jobs)
        found.write(options.output)
        print(found.table(name), flush=True)
    print("\n".join(found.lines()))
    json_files.write_json(options.output / "machine.json", machine())


if __name__ == "__main__":
    main()
